//! What is shown, step by step. Each step fails if what it shows is not so.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{Ask, Host, Lab, Load, LoadPlan, Namespace, Outcome, Proto, Report};

use crate::{cluster::Cluster, show::Screen};

/// One step: what it is called, and what it does; the result is a line of the summary.
pub(crate) struct Step {
    pub(crate) title: &'static str,
    pub(crate) run: fn(&Screen, &mut Cluster) -> Result<String>,
}

/// All steps, in order.
pub(crate) const ALL: [Step; 6] = [
    Step { title: "Balancing over three pods, from a pod", run: |screen, c| balance(screen, c, &c.lab.client) },
    Step { title: "Balancing over three pods, from the node itself", run: |screen, c| balance(screen, c, &c.lab.node) },
    Step { title: "An endpoint removed and added, under load", run: churn },
    Step { title: "NodePort with externalTrafficPolicy: Local", run: node_port },
    Step { title: "A Service without endpoints", run: refused },
    Step { title: "What the maps hold", run: maps },
];

/// Requests of each balancing run.
const REQUESTS: usize = 300;
/// Each of three pods must have at least this many of them: a fair choice falls below once in 10^8 runs.
const FAIR: usize = REQUESTS / 3 - 45;

const fn family(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

/// Every transport of every family.
fn each() -> impl Iterator<Item = (Proto, bool)> {
    Proto::ALL.into_iter().flat_map(|proto| [(proto, false), (proto, true)])
}

fn vip(cluster: &Cluster, v6: bool) -> Result<SocketAddr> {
    cluster.services.web.vip(v6).context("the example is dual stack")
}

fn balance(screen: &Screen, cluster: &Cluster, from: &Host) -> Result<String> {
    let (mut total, mut seen) = (0, Vec::new());
    for (proto, v6) in each() {
        let to = vip(cluster, v6)?;
        let begun = Instant::now();
        let report = from.ns.run(|| -> Result<BTreeMap<String, usize>> {
            let mut counts = BTreeMap::new();
            for n in 0..REQUESTS {
                let attempt = Ask::new(proto, to).timeout(Duration::from_secs(3)).here();
                let server =
                    attempt.outcome.server().with_context(|| format!("request {n} to {to}/{proto}: {attempt}"))?;
                *counts.entry(server.to_owned()).or_default() += 1;
            }
            Ok(counts)
        })??;
        let took = begun.elapsed().as_millis();
        screen.saw(&format!(
            "{proto}/{} {} → {to}: {REQUESTS} connections in {took} ms, none failed",
            family(v6),
            from.name
        ));
        screen.shares(&report);
        let fair = report.len() == 3 && report.values().all(|&count| count >= FAIR);
        ensure!(fair, "{to}/{proto} is not balanced over three pods: {report:?}");
        total += REQUESTS;
        seen.extend(report.into_values());
    }
    let (least, most) = (seen.iter().min().unwrap_or(&0), seen.iter().max().unwrap_or(&0));
    Ok(format!("{total} requests, 0 failed, between {least} and {most} of {REQUESTS} for each pod"))
}

/// How long traffic may take to follow a change until it is a failure: the machine may be busy with something else.
const LIMIT: Duration = Duration::from_millis(700);
/// Load between two changes; longer than the limit, so that traffic which never moves is found out.
const PHASE: Duration = Duration::from_millis(800);

fn churn(screen: &Screen, cluster: &mut Cluster) -> Result<String> {
    let (mut requests, mut slowest) = (0, Duration::ZERO);
    for (proto, v6) in [(Proto::Tcp, false), (Proto::Udp, true)] {
        let to = vip(cluster, v6)?;
        let plan = match proto {
            Proto::Tcp => LoadPlan { workers: 8, pause: Duration::from_millis(1), ..LoadPlan::new(proto, to) },
            // UDP keeps its sockets: flows that exist must move too. So many, that each pod has some.
            Proto::Udp => {
                LoadPlan { workers: 32, pause: Duration::from_millis(5), fresh: false, ..LoadPlan::new(proto, to) }
            }
        };
        let load = Load::start(&cluster.lab.client.ns, plan)?;
        let (manifests, web) = (&cluster.agent.manifests, &cluster.services.web);
        std::thread::sleep(PHASE);
        let removed = Instant::now();
        manifests.endpoints(web, &cluster.endpoints(2))?;
        std::thread::sleep(PHASE);
        let added = Instant::now();
        manifests.endpoints(web, &cluster.endpoints(3))?;
        std::thread::sleep(PHASE);
        // A socket that was open before keeps the pod it has: only new ones can show that pod-c is back.
        let back = match proto {
            Proto::Tcp => None,
            Proto::Udp => Some(first_answer(&cluster.lab.client.ns, to, "pod-c")?),
        };
        let report = load.stop();
        screen.saw(&format!("{proto}/{}: {report}", family(v6)));
        let failures = report.failures().len();
        ensure!(failures == 0, "{failures} requests failed");
        let moved = moved_away(&report, "pod-c", removed, added)?;
        screen.saw(&format!("pod-c removed: its last request was {} later", millis(moved)));
        if back.is_none() {
            let back = report.first_answer_by("pod-c", added).context("pod-c never came back")? - added;
            screen.saw(&format!("pod-c added: its first answer was {} later", millis(back)));
            slowest = slowest.max(back);
        }
        slowest = slowest.max(moved);
        ensure!(slowest < LIMIT, "traffic followed a change only after {}", millis(slowest));
        requests += report.samples.len();
    }
    Ok(format!("{requests} requests, 0 failed; traffic followed each change within {}", millis(slowest)))
}

fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// From the change until the last request began that the removed server answered.
fn moved_away(report: &Report, server: &str, removed: Instant, added: Instant) -> Result<Duration> {
    let of = |from: Option<Instant>, to: Instant| {
        let began = move |start: Instant| from.is_none_or(|from| start >= from) && start < to;
        report.samples.iter().filter(move |s| began(s.start) && s.attempt.outcome.server() == Some(server))
    };
    ensure!(of(None, removed).count() > 0, "{server} answered nothing before it was removed");
    Ok(of(Some(removed), added).map(|sample| sample.start - removed).max().unwrap_or_default())
}

fn first_answer(ns: &Namespace, to: SocketAddr, server: &str) -> Result<Instant> {
    fairlead_lab::probe::until_answer(ns, to, true, LIMIT, |name| name == server).map(|found| found.at)
}

fn node_port(screen: &Screen, cluster: &mut Cluster) -> Result<String> {
    let port = cluster.services.external.ports[0].node_port.context("the example has a NodePort")?;
    let mut count = 0;
    for (proto, v6) in each() {
        let to = SocketAddr::new(cluster.lab.node.ip(v6), port);
        for client in Lab::external_clients(v6) {
            let attempt = Ask::new(proto, to).from(SocketAddr::new(client, 0)).once(&cluster.lab.ext.ns)?;
            let Some(answer) = attempt.outcome.answer() else { bail!("{client} → {to}/{proto}: {attempt}") };
            screen.saw(&format!("{proto}  {client} → {to}: {} saw {}", answer.server, answer.peer));
            ensure!(answer.peer.ip() == client, "the client's address did not arrive: {}", answer.peer);
            count += 1;
        }
    }
    Ok(format!("{count} external clients, each seen with its own address by the pod"))
}

fn refused(screen: &Screen, cluster: &mut Cluster) -> Result<String> {
    let mut slowest = Duration::ZERO;
    for (proto, v6) in each() {
        let to = cluster.services.nobody.vip(v6).context("the example is dual stack")?;
        for from in [&cluster.lab.client.host, &cluster.lab.node] {
            let attempt = Ask::new(proto, to).timeout(Duration::from_secs(2)).once(&from.ns)?;
            screen.saw(&format!("{proto}  {} → {to}: {attempt}", from.name));
            ensure!(attempt.outcome == Outcome::Refused, "expected a refusal");
            slowest = slowest.max(attempt.elapsed);
        }
    }
    Ok(format!("refused in every case, within {}", millis(slowest)))
}

fn maps(screen: &Screen, cluster: &mut Cluster) -> Result<String> {
    let maps = ["SERVICES_V4", "SLOTS_V4", "FLOWS_V4"];
    for name in maps {
        let pin = cluster
            .agent
            .pin(name)
            .with_context(|| format!("no pin called {name} under {}", cluster.agent.pin_path.display()))?;
        let path = pin.to_string_lossy().into_owned();
        screen.saw(&format!("# bpftool map dump pinned {path}     (the first entry)"));
        let entry = first_entry(&["map", "dump", "pinned", &path])?;
        let named = ["\"key\"", "\"value\"", "\"octets\"", "\"flags\""].iter().all(|field| entry.contains(field));
        ensure!(named, "{name} is not shown with named fields:\n{entry}");
        screen.note(&entry);
    }
    screen.saw("# fairlead services");
    screen.note(cluster.agent.fairlead(&["services"])?.trim_end());
    Ok(format!("named fields in {}", maps.join(", ")))
}

/// The first entry that bpftool writes; the maps hold more than anyone reads.
fn first_entry(args: &[&str]) -> Result<String> {
    let mut child = Command::new("bpftool")
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run bpftool, which shows what the maps hold; `./x setup` installs it")?;
    let stdout = child.stdout.take().context("a pipe was asked for")?;
    let mut shown = String::new();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading from bpftool")?;
        if line.trim() == "},{" {
            shown += "    }, …";
            break;
        }
        shown += &line;
        shown.push('\n');
    }
    // The pipe is closed by now: bpftool stops where nobody reads on.
    child.kill().ok();
    let complaint = child.wait_with_output().context("waiting for bpftool")?.stderr;
    ensure!(!shown.is_empty(), "bpftool {}: {}", args.join(" "), String::from_utf8_lossy(&complaint).trim());
    Ok(shown)
}
