//! `--keep`: a cluster that stays up after the demo, and what one does with it.

use std::{collections::BTreeMap, net::SocketAddr, os::unix::process::CommandExt as _, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{Ask, Namespace, Proto, Server, agent, janitor, server::wait_until};
use nix::sys::signal::Signal;

use crate::{
    cluster::{Cluster, kept_prefix, pod_addrs},
    show::Screen,
};

/// The id of the one cluster that is kept.
pub(crate) const ID: &str = "fairlead-lab-demo";

/// Removes the kept cluster; there may be none.
pub(crate) fn clean() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "removing network namespaces needs root: run this as root (sudo)");
    let pins = std::path::Path::new(janitor::BPF_FS).join(format!("{ID}-pins"));
    if let (true, Ok(binary), Ok(node)) = (pins.exists(), agent::find_binary(), Namespace::open(&format!("{ID}-node")))
    {
        for pid in node.pids()? {
            // The agent; it may end by itself in this moment.
            nix::sys::signal::kill(pid, Signal::SIGTERM).ok();
        }
        // It also puts back what the agent changed in the node, and refuses as long as the agent is there.
        let mut cleaned = Ok(String::new());
        wait_until(Duration::from_secs(5), || {
            cleaned = fairlead_lab::netns::run(node.command(&binary).arg("cleanup").arg("--pin-path").arg(&pins));
            cleaned.is_ok()
        });
        cleaned?;
    }
    janitor::remove(&kept_prefix())
}

/// Hands the servers over to processes of their own, and says how to go on.
pub(crate) fn leave(screen: &Screen, cluster: Cluster) -> Result<()> {
    let Cluster { mut agent, servers, mut lab, services } = cluster;
    let program = std::env::current_exe().context("cannot find this program's path")?;
    // They close their sockets, so that the processes can take them over.
    drop(servers);
    for pod in &lab.pods {
        let mut command = pod.ns.command(&program);
        command.args(["serve", &pod.name]).args(pod_addrs(pod.ip(false), pod.ip(true)).map(|addr| addr.to_string()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        janitor::spawn(&mut command).with_context(|| format!("cannot start the server of {}", pod.name))?;
    }
    for pod in &lab.pods {
        let ask = Ask::new(Proto::Tcp, pod_addrs(pod.ip(false), pod.ip(true))[0]);
        let answers = || ask.once(&pod.ns).is_ok_and(|attempt| attempt.outcome.answer().is_some());
        ensure!(wait_until(Duration::from_secs(5), answers), "the server of {} does not answer", pod.name);
    }
    agent.keep();
    lab.keep();
    let demo = program.display();
    let vip = services.web.vip(false).context("the example has IPv4")?;
    screen.step("The cluster stays up. To play with it:");
    for line in [
        format!("{demo} ask client tcp {vip} 30          # from a pod; also: node, ext, pod-a"),
        format!("{demo} ask ext udp {}:30080 5", lab.node.v4),
        format!("nsenter --net={}            # a shell in the node", lab.node.ns.path().display()),
        format!("ls {}                  # edit these; the agent follows", agent.manifests.dir().display()),
        format!("fairlead services --pin-path {}", agent.pin_path.display()),
        format!("bpftool map dump pinned {}/…", agent.pin_path.display()),
        format!("tail -f {}", agent.log.display()),
        format!("{demo} --clean                              # removes everything"),
    ] {
        screen.saw(&line);
    }
    Ok(())
}

/// `serve NAME ADDRESS…`: a pod's server, in the namespace it was started in.
pub(crate) fn serve(args: &[String]) -> Result<()> {
    let [name, addrs @ ..] = args else { bail!("serve takes a name and addresses") };
    let addrs = addrs
        .iter()
        .map(|addr| addr.parse::<SocketAddr>().with_context(|| format!("{addr:?} is no address with a port")))
        .collect::<Result<Vec<_>>>()?;
    let here = Namespace::current()?;
    let _server = Server::both(&here, name, &addrs)?;
    loop {
        std::thread::park();
    }
}

/// `ask HOST tcp|udp ADDRESS:PORT [COUNT]`: requests from inside the kept cluster.
pub(crate) fn ask(args: &[String]) -> Result<()> {
    let (host, proto, to, count) = match args {
        [host, proto, to] => (host, proto, to, 1),
        [host, proto, to, count] => (host, proto, to, count.parse().with_context(|| format!("COUNT {count:?}"))?),
        _ => bail!("ask takes HOST tcp|udp ADDRESS:PORT [COUNT]"),
    };
    let proto = match proto.to_lowercase().as_str() {
        "tcp" => Proto::Tcp,
        "udp" => Proto::Udp,
        other => bail!("{other:?} is neither tcp nor udp"),
    };
    let to = to.parse().with_context(|| format!("{to:?} is no address with a port, such as 10.96.0.10:80"))?;
    let ns = Namespace::open(&format!("{ID}-{host}")).context("is a cluster up? `fairlead-demo --keep` makes one")?;
    let ask = Ask::new(proto, to).timeout(Duration::from_secs(2));
    let (mut counts, mut failed) = (BTreeMap::new(), 0);
    for _ in 0..count {
        let attempt = ask.once(&ns)?;
        match attempt.outcome.server() {
            Some(server) => *counts.entry(server.to_owned()).or_default() += 1,
            None => failed += 1,
        }
        println!("{attempt}");
    }
    if count > 1 {
        Screen::new().shares(&counts);
    }
    ensure!(failed == 0, "{failed} of {count} requests were not answered");
    Ok(())
}
