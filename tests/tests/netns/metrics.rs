//! A running agent's metrics, compared with what was sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Result, ensure};
use fairlead_lab::{AgentOptions, Ask, Capture, Outcome, Proto, http};

use crate::cell::{Cell, Cluster, answered, eventually};

/// Questions of a run.
const MANY: u64 = 25;

/// Samples by name and labels.
type Samples = BTreeMap<String, f64>;

fn scrape(cluster: &Cluster) -> Result<Samples> {
    let answer = http::get(&cluster.lab.node.ns, SocketAddr::from(([127, 0, 0, 1], 10_249)), "/metrics")?;
    ensure!(answer.status == 200, "{answer:?}");
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ensure!(answer.header("content-type") == Some(kind), "{answer:?}");
    ensure!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(answer.body.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
}

fn own(args: &[&str]) -> Cluster {
    let args = args.iter().map(Into::into).collect();
    Cluster::own(Cell::named("routed_conntrack"), AgentOptions { args, ..AgentOptions::default() })
}

fn checked(case: fn(&Cluster) -> Result<()>, args: &[&str]) {
    let cluster = own(args);
    case(&cluster).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.agent_log_tail()));
}

/// How a sample has grown; one that is not there is 0.
fn grown(before: &Samples, after: &Samples, sample: &str) -> u64 {
    let value = |samples: &Samples| samples.get(sample).copied().unwrap_or(0.0);
    (value(after) - value(before)) as u64
}

fn outcome(name: &str, kind: &str) -> String {
    format!("fairlead_packets_total{{outcome=\"{name}\",kind=\"{kind}\"}}")
}

#[test]
fn packets_are_counted_by_what_became_of_them() {
    checked(packets, &[]);
}

fn packets(cluster: &Cluster) -> Result<()> {
    let (service, client) = (cluster.service("counted"), &cluster.lab.client);
    let nobody = cluster.service("nobody");
    let (tcp, udp) = (Ask::new(Proto::Tcp, service.vip(false)), Ask::new(Proto::Udp, service.vip(true)));
    let refusing = Ask::new(Proto::Tcp, nobody.vip(false));
    service.serve(&service.pods(&[0, 1]), &client.ns, tcp)?;
    eventually("an answer", &client.ns, udp, |attempt| attempt.outcome.answer().is_some())?;
    cluster.manifests.apply(&nobody.spec, &[])?;
    eventually("a refusal", &client.ns, refusing, |attempt| attempt.outcome == Outcome::Refused)?;
    // What closes the connections of before is on its way for a moment.
    std::thread::sleep(Duration::from_millis(200));

    let before = scrape(cluster)?;
    let seen = Capture::start(&client.ns, "eth0")?;
    for _ in 0..MANY {
        answered(&client.ns, tcp)?;
        answered(&client.ns, udp)?;
        crate::cell::refused(&client.ns, refusing)?;
    }
    std::thread::sleep(Duration::from_millis(200));
    let after = scrape(cluster)?;
    let seen = seen.stop();
    let count = |to: SocketAddr, outgoing: bool| {
        let of = |packet: &&fairlead_lab::packet::Packet| {
            packet.outgoing == outgoing
                && packet.sockets().is_some_and(|(from, at)| if outgoing { at == to } else { from == to })
        };
        seen.iter().filter(of).count() as u64
    };
    let sum = |begin: &str| {
        let begin = format!("fairlead_packets_total{{outcome=\"{begin}");
        let samples = after.keys().filter(|sample| sample.starts_with(&begin) && sample.contains("kind=\"translate\""));
        samples.map(|sample| grown(&before, &after, sample)).sum::<u64>()
    };
    let served = [service.vip(false), service.vip(true)];
    let requests = served.map(|to| count(to, true)).iter().sum::<u64>();
    let replies = served.map(|to| count(to, false)).iter().sum::<u64>();
    ensure!(requests > 4 * MANY && replies > 3 * MANY, "{requests} requests, {replies} replies were captured");
    ensure!(sum("request") == requests, "{requests} requests: {after:?}");
    ensure!(sum("reply") == replies, "{replies} replies: {after:?}");
    ensure!(sum("request_new") == 2 * MANY, "each question is a flow: {after:?}");
    let rejected = grown(&before, &after, &outcome("reject_no_endpoint", "reject"));
    let refused = count(refusing.to, true);
    ensure!(rejected == refused && rejected >= MANY, "{rejected} refusals of {refused} attempts");
    let drops =
        after.keys().filter(|sample| sample.contains("kind=\"drop\"")).map(|s| grown(&before, &after, s)).sum::<u64>();
    ensure!(drops == 0, "nothing was dropped: {after:?}");
    Ok(())
}

#[test]
fn the_control_plane_and_the_maps_are_counted() {
    checked(control_plane, &["--sweep-interval", "1s", "--max-services", "64"]);
}

fn control_plane(cluster: &Cluster) -> Result<()> {
    let (service, client) = (cluster.service("measured"), &cluster.lab.client);
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    let before = scrape(cluster)?;
    service.serve(&service.pods(&[0, 1, 2]), &client.ns, ask)?;
    eventually("an answer", &client.ns, Ask::new(Proto::Tcp, service.vip(true)), |a| a.outcome.answer().is_some())?;
    let after = scrape(cluster)?;
    let grown = |sample: &str| grown(&before, &after, sample);
    // Two families × two protocols, three endpoints each.
    for (map, n) in [("SERVICES_V4", 2), ("SERVICES_V6", 2), ("CLUSTER_IPS_V4", 1), ("PORTS", 4), ("LIVE", 12)] {
        let sample = format!("fairlead_map_entries{{map=\"{map}\"}}");
        ensure!(grown(&sample) == n, "{sample} grew by {}, not {n}: {after:?}", grown(&sample));
    }
    let capacity = |map: &str| after.get(&format!("fairlead_map_capacity{{map=\"{map}\"}}")).copied();
    ensure!(capacity("SERVICES_V4") == Some(64.0) && capacity("FLOWS_V6") == Some(262_144.0), "{after:?}");
    let attached = "fairlead_devices{role=\"uplink\",state=\"attached\"}";
    let pods = "fairlead_devices{role=\"pod\",state=\"attached\"}";
    let own = cluster.lab.all_pods().count() as f64;
    ensure!(after.get(attached) == Some(&1.0) && after.get(pods) == Some(&own), "{after:?}");
    ensure!(grown("fairlead_services{state=\"served\"}") == 1, "{after:?}");
    ensure!(grown("fairlead_objects{kind=\"EndpointSlice\"}") == 2, "{after:?}");
    ensure!(grown("fairlead_sync_duration_seconds_count") >= 1, "{after:?}");
    ensure!(grown("fairlead_sync_changes_total{result=\"done\"}") >= 1, "{after:?}");
    ensure!(grown("fairlead_sync_writes_total") >= 10, "{after:?}");
    ensure!(after.get("fairlead_sync_changes_total{result=\"failed\"}") == Some(&0.0), "{after:?}");

    // One Service more than fit into a map of 64: two addresses a family each.
    let many: Vec<_> = (0..32).map(|_| cluster.service("many")).collect();
    for service in &many {
        cluster.manifests.apply(&service.spec, &[])?;
    }
    let failed = |samples: &Samples| samples.get("fairlead_services{state=\"failed\"}").copied();
    let began = std::time::Instant::now();
    let full = loop {
        let now = scrape(cluster)?;
        if failed(&now) == Some(1.0) {
            break now;
        }
        ensure!(began.elapsed() < crate::cell::PATIENCE, "{now:?}");
    };
    ensure!(full.get("fairlead_map_entries{map=\"SERVICES_V4\"}") == Some(&64.0), "{full:?}");
    ensure!(full.get("fairlead_services{state=\"served\"}") == Some(&32.0), "{full:?}");
    let livez = http::get(&cluster.lab.node.ns, SocketAddr::from(([127, 0, 0, 1], 10_256)), "/livez")?;
    ensure!(livez.status == 200, "a Service that does not fit is no reason to restart: {livez:?}");
    ensure!(scrape(cluster)?.get("kubeproxy_proxy_livez_total{code=\"200\"}") == Some(&1.0));

    // Flows are counted by the sweep, once a second here.
    let flows = "fairlead_map_entries{map=\"FLOWS_V4\"}";
    let began = std::time::Instant::now();
    while scrape(cluster)?.get(flows).copied().unwrap_or(0.0) < 2.0 {
        ensure!(began.elapsed() < crate::cell::PATIENCE, "no flow is counted");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn every_metric_is_described_in_the_documentation() {
    let cluster = own(&[]);
    let answer = http::get(&cluster.lab.node.ns, SocketAddr::from(([127, 0, 0, 1], 10_249)), "/metrics").unwrap();
    let families: BTreeSet<_> =
        answer.body.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    assert!(families.len() > 10, "{}", answer.body);
    let text = include_str!("../../../docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let described: BTreeSet<_> =
        rows.map(|(name, rest)| (name, rest.split_once(' ').map_or("", |(kind, _)| kind))).collect();
    let exposed = families.into_iter().map(|(name, kind)| match kind {
        "counter" => (format!("{name}_total"), kind),
        _ => (name.to_owned(), kind),
    });
    let exposed: BTreeSet<_> = exposed.collect();
    let described: BTreeSet<_> = described.into_iter().map(|(name, kind)| (name.to_owned(), kind)).collect();
    assert_eq!(exposed, described, "docs/metrics.md against what the agent shows");
}
