//! The programs are exchanged under traffic, for another build and back: nothing may be lost, nothing may leave
//! untranslated.

use std::{
    collections::BTreeSet,
    fmt,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    Agent, AgentOptions, Ask, Capture, Lab, LabConfig, Load, LoadPlan, Namespace, Netfilter, Proto, Report, Server,
    ServiceSpec, Shape, manifest::EndpointSpec, sys, topology::UPLINK,
};

use crate::services::{PORT, TARGET};

/// UDP flows that never pause.
const STREAMS: usize = 8;
/// Datagrams of a stream each millisecond: far below what the path carries, so that a loss is ours.
const PER_BEAT: u32 = 2;
/// Time between two bursts of a stream.
const BEAT: Duration = Duration::from_millis(1);
/// How long the last replies may take.
const DRAIN: Duration = Duration::from_secs(10);
/// Time between two exchanges.
const PAUSE: Duration = Duration::from_millis(500);

/// What was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    exchanges: u32,
    /// Exchanges after which packets met other instructions than before.
    changed: u32,
    sent: u64,
    lost: u64,
    leaked: usize,
    connections: Report,
}

impl Seen {
    /// True if nothing was lost and nothing left untranslated.
    pub fn holds(&self) -> bool {
        self.changed == self.exchanges
            && self.sent > 0
            && self.lost == 0
            && self.leaked == 0
            && self.connections.failures().is_empty()
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} exchanges of the programs, {} of them for another build", self.exchanges, self.changed)?;
        writeln!(f, "UDP: {} requests, {} without their reply", self.sent, self.lost)?;
        writeln!(f, "packets with the Service's address beyond the node: {}", self.leaked)?;
        write!(f, "new TCP connections meanwhile: {}", self.connections)
    }
}

/// An object of the same sources by other settings of the compiler: other instructions over the same maps.
fn other_build() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let options = proxy_ebpf_build::Options {
        workspace: &workspace,
        target_dir: &target.join("ebpf-other"),
        features: &[],
        opt_level: Some("2"),
        subcommand: "build",
    };
    let built = proxy_ebpf_build::build(&options).context("the other object cannot be built")?;
    std::path::absolute(&built.object).with_context(|| format!("cannot find {}", built.object.display()))
}

/// Runs it in a lab of its own: the agent stops and starts again on its pins, this many times, by turns with another
/// build of the programs and with its own.
pub fn run(exchanges: u32) -> Result<Seen> {
    let other = other_build()?;
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None))?;
    let mut agent = Agent::start(&lab, AgentOptions::default())?;
    let service = ServiceSpec::both("exchange", &[Ipv4Addr::new(10, 96, 2, 1).into()], PORT, TARGET);
    let pods: Vec<_> = lab.pods.iter().map(|pod| EndpointSpec::here(pod.ip(false))).collect();
    agent.manifests.apply(&service, &pods)?;
    let servers: Result<Vec<_>> = lab
        .pods
        .iter()
        .map(|pod| Server::start(&pod.ns, &pod.name, &[(Proto::Tcp, SocketAddr::new(pod.ip(false), TARGET))]))
        .collect();
    let _servers = servers?;
    let stop = Arc::<AtomicBool>::default();
    let echoes: Result<Vec<_>> =
        lab.pods.iter().map(|pod| echo(&pod.ns, SocketAddr::new(pod.ip(false), TARGET), &stop)).collect();
    let echoes = echoes?;
    let vip = service.vip(false).context("the Service has an IPv4 address")?;
    wait_for(&lab, vip)?;

    let capture = Capture::start(&lab.ext.ns, UPLINK)?;
    let halt = Arc::<AtomicBool>::default();
    let streams: Result<Vec<_>> = (0..STREAMS).map(|_| stream(&lab.client.ns, vip, &halt)).collect();
    let streams = streams?;
    let load = LoadPlan { workers: 1, pause: Duration::from_millis(2), ..LoadPlan::new(Proto::Tcp, vip) };
    let load = Load::start(&lab.client.ns, load)?;
    let (mut tags, mut changed) = (agent.program_tags()?, 0);
    for n in 0..exchanges {
        std::thread::sleep(PAUSE);
        agent.stop().with_context(|| format!("exchange {n}"))?;
        agent.options.args =
            if n % 2 == 0 { vec!["--ebpf-object".into(), other.clone().into_os_string()] } else { Vec::new() };
        agent.restart(&lab).with_context(|| format!("exchange {n}"))?;
        let before = std::mem::replace(&mut tags, agent.program_tags()?);
        changed += u32::from(tags != before);
    }
    std::thread::sleep(PAUSE);
    let connections = load.stop();
    halt.store(true, Ordering::Relaxed);
    let (mut sent, mut lost) = (0, 0);
    for stream in streams {
        let (asked, missing) = stream.join().map_err(|_| anyhow::anyhow!("a stream panicked"))??;
        sent += asked;
        lost += missing;
    }
    let is_vip = |addr: IpAddr| addr == vip.ip();
    let leaked = capture.stop().iter().filter(|packet| is_vip(packet.dst) || is_vip(packet.src)).count();
    stop.store(true, Ordering::Relaxed);
    for echo in echoes {
        echo.join().map_err(|_| anyhow::anyhow!("an echo server panicked"))??;
    }
    Ok(Seen { exchanges, changed, sent, lost, leaked, connections })
}

fn wait_for(lab: &Lab, vip: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    loop {
        let attempt = Ask::new(Proto::Tcp, vip).once(&lab.client.ns)?;
        if attempt.outcome.answer().is_some() {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "the Service does not answer: {attempt}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends every datagram back.
fn echo(ns: &Namespace, addr: SocketAddr, stop: &Arc<AtomicBool>) -> Result<JoinHandle<Result<()>>> {
    let socket = ns.run(|| UdpSocket::bind(addr))?.with_context(|| format!("cannot listen on {addr}/UDP"))?;
    sys::set_receive_buffer(&socket, 32 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let stop = Arc::clone(stop);
    std::thread::Builder::new()
        .name("echo".to_owned())
        .spawn(move || {
            let mut buffer = [0; 64];
            while !stop.load(Ordering::Relaxed) {
                match socket.recv_from(&mut buffer) {
                    Ok((n, peer)) => drop(socket.send_to(&buffer[..n], peer).context("cannot answer")?),
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                    Err(error) => return Err(error).context("the echo server cannot receive"),
                }
            }
            Ok(())
        })
        .context("cannot start a thread")
}

/// Numbered datagrams on one flow. Yields how many were sent, and how many came back never.
fn stream(ns: &Namespace, vip: SocketAddr, halt: &Arc<AtomicBool>) -> Result<JoinHandle<Result<(u64, u64)>>> {
    let socket = ns.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(vip)?;
        Ok::<_, std::io::Error>(socket)
    })?;
    let socket = socket.with_context(|| format!("cannot connect to {vip}"))?;
    sys::set_receive_buffer(&socket, 32 << 20)?;
    socket.set_nonblocking(true)?;
    let halt = Arc::clone(halt);
    std::thread::Builder::new()
        .name("stream".to_owned())
        .spawn(move || {
            let (mut next, mut open) = (0u64, BTreeSet::new());
            while !halt.load(Ordering::Relaxed) {
                for _ in 0..PER_BEAT {
                    socket.send(&next.to_be_bytes()).context("cannot send")?;
                    open.insert(next);
                    next += 1;
                }
                take_replies(&socket, &mut open)?;
                std::thread::sleep(BEAT);
            }
            let begun = Instant::now();
            while !open.is_empty() && begun.elapsed() < DRAIN {
                take_replies(&socket, &mut open)?;
                std::thread::sleep(BEAT);
            }
            Ok((next, open.len() as u64))
        })
        .context("cannot start a thread")
}

fn take_replies(socket: &UdpSocket, open: &mut BTreeSet<u64>) -> Result<()> {
    let mut reply = [0; 8];
    loop {
        match socket.recv(&mut reply) {
            Ok(8) => {
                open.remove(&u64::from_be_bytes(reply));
            }
            Ok(n) => anyhow::bail!("a reply of {n} bytes"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("a stream cannot receive"),
        }
    }
}
