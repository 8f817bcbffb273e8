//! Short connections by the hundred thousand through one masquerading NodePort to one endpoint, beside connections that
//! the node itself has with that endpoint. A nonce tells each of them from all others.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    Agent, AgentOptions, Lab, LabConfig, Namespace, Netfilter, ServiceSpec, Shape, manifest::EndpointSpec,
    server::wait_until,
};
use serde::Serialize;
use tokio::sync::Notify;

use crate::services::{MASQUERADED, PORT, TARGET};

/// Connections at a time.
const WORKERS: u64 = 16;
/// A connection that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where the pool begins that `ip_local_port_range` leaves; half of the node's own sockets lie in it.
const IN_POOL: u16 = 1_100;
/// What failed is described up to this often.
const MOST_FAILURES: usize = 10;

/// How much.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Plan {
    /// Short connections.
    pub connections: u64,
    /// At most so many a second; 0: as many as go.
    pub rate: u64,
    /// Connections of the node's own.
    pub own: u16,
}

/// What was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    plan: Plan,
    took: Duration,
    pool: String,
    resent: u64,
    failed: u64,
    failures: Vec<String>,
    own_lost: Vec<String>,
}

impl Seen {
    /// True if every connection reached its own socket and no other.
    pub fn holds(&self) -> bool {
        self.failed == 0 && self.own_lost.is_empty()
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Plan { connections, own, .. }, took) = (self.plan, self.took.as_secs_f64());
        writeln!(
            f,
            "{connections} connections in {took:.1} s, {:.0} a second; {}",
            connections as f64 / took,
            self.pool
        )?;
        writeln!(f, "refused, late or with somebody else's answer: {}", self.failed)?;
        writeln!(f, "segments sent again: {}", self.resent)?;
        write!(f, "the node's own connections: {} of {own} are lost", self.own_lost.len())?;
        self.failures.iter().chain(&self.own_lost).try_for_each(|failure| write!(f, "\n  {failure}"))
    }
}

/// Runs it in a lab of its own.
pub fn run(plan: Plan) -> Result<Seen> {
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None))?;
    let agent = Agent::start(&lab, AgentOptions::default())?;
    let vips = [Ipv4Addr::new(10, 96, 1, 1).into()];
    let service = ServiceSpec::both("masqueraded", &vips, PORT, TARGET).node_port(MASQUERADED);
    let remote = Lab::remote_pods(false)[0];
    agent.manifests.apply(&service, &[EndpointSpec::elsewhere(remote)])?;
    let (endpoint, to) = (SocketAddr::new(remote, TARGET), SocketAddr::new(lab.node.ip(false), MASQUERADED));
    let client = &lab.client.ns;
    // One client must do for all: its ports come round quickly.
    for (key, value) in [("net.ipv4.ip_local_port_range", "1024 65535"), ("net.ipv4.tcp_tw_reuse", "1")] {
        client.sysctl(key, value)?;
    }
    let _server = Server::start(&lab.ext.ns, endpoint)?;
    let ready = client.run(|| wait_until(PATIENCE, || short(to, nonce(u64::MAX, 0)).is_ok()))?;
    ensure!(ready, "{to} does not answer");

    let mut own = own_connections(&lab.node.ns, lab.node.ip(false), endpoint, plan.own)?;
    let resent = client.segments_resent()? + lab.ext.ns.segments_resent()?;
    let begun = Instant::now();
    let work = Arc::new(Work::default());
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (work, client) = (Arc::clone(&work), client.clone());
            thread::spawn(move || client.run(|| work.carry_out(plan, worker, to, begun)))
        })
        .collect();
    // The node's own connections go on meanwhile.
    let mut own_lost = Vec::new();
    while workers.iter().any(|worker| !worker.is_finished()) {
        ask_all(&mut own, &mut own_lost);
        thread::sleep(Duration::from_millis(500));
    }
    for worker in workers {
        worker.join().map_err(|_| anyhow::anyhow!("a worker ended by a panic"))??;
    }
    let took = begun.elapsed();
    ask_all(&mut own, &mut own_lost);
    let resent = client.segments_resent()? + lab.ext.ns.segments_resent()? - resent;
    let failures = work.failures.lock().map(|failures| failures.clone()).unwrap_or_default();
    let pool = "source ports 1024-29999 and 61000-65535 for one endpoint".to_owned();
    Ok(Seen { plan, took, pool, resent, failed: work.failed.load(Ordering::Relaxed), failures, own_lost })
}

/// What the workers share.
#[derive(Debug, Default)]
struct Work {
    next: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Work {
    fn carry_out(&self, plan: Plan, worker: u64, to: SocketAddr, begun: Instant) {
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= plan.connections {
                return;
            }
            if plan.rate != 0 {
                let due = Duration::from_secs_f64(n as f64 / plan.rate as f64);
                thread::sleep(due.saturating_sub(begun.elapsed()));
            }
            if let Err(error) = short(to, nonce(worker, n)) {
                self.failed.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut failures) = self.failures.lock()
                    && failures.len() < MOST_FAILURES
                {
                    failures.push(format!("connection {n}, after {:?}: {error}", begun.elapsed()));
                }
            }
        }
    }
}

fn nonce(worker: u64, n: u64) -> [u8; 16] {
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&n.to_le_bytes());
    nonce[8..].copy_from_slice(&worker.to_le_bytes());
    nonce
}

fn short(to: SocketAddr, nonce: [u8; 16]) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(&mut stream, nonce)?;
    // The client ends it first, so that the endpoint's tuple is free at once; the port is in TIME_WAIT here.
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(io::Error::other("more than the answer came")),
    }
}

/// One nonce there, and the same one back.
fn ask(stream: &mut TcpStream, nonce: [u8; 16]) -> io::Result<()> {
    stream.write_all(&nonce)?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer)?;
    if answer == nonce { Ok(()) } else { Err(io::Error::other("the answer is somebody else's")) }
}

/// Connections of the node itself with the endpoint: half with ports that the kernel chooses, half with ports out of those
/// that masquerade uses.
fn own_connections(ns: &Namespace, node: std::net::IpAddr, endpoint: SocketAddr, count: u16) -> Result<Vec<TcpStream>> {
    let open = |n: u16| {
        let port = if n.is_multiple_of(2) { 0 } else { IN_POOL + n };
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(node, port).into())?;
        socket.connect_timeout(&endpoint.into(), PATIENCE)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok::<_, io::Error>(stream)
    };
    ns.run(|| (0..count).map(open).collect::<io::Result<Vec<_>>>())?.context("the node cannot reach the endpoint")
}

fn ask_all(own: &mut Vec<TcpStream>, lost: &mut Vec<String>) {
    let mut n = 0;
    own.retain_mut(|stream| {
        n += 1;
        let result = ask(stream, nonce(u64::MAX, n));
        if let Err(error) = &result {
            lost.push(format!("the node's own {:?}: {error}", stream.local_addr()));
        }
        result.is_ok()
    });
}

/// Says to each connection what that says, until it ends.
struct Server {
    stop: Arc<Notify>,
    thread: Option<thread::JoinHandle<Result<()>>>,
}

impl Server {
    fn start(ns: &Namespace, at: SocketAddr) -> Result<Self> {
        let listener = ns.run(|| TcpListener::bind(at))?.with_context(|| format!("cannot listen on {at}"))?;
        // The standard library's backlog of 128 is too short for so many.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                loop {
                    let accepted = tokio::select! {
                        () = stopped.notified() => return Ok(()),
                        accepted = listener.accept() => accepted,
                    };
                    let (stream, _) = accepted.context("accepting a connection")?;
                    // How it ended is the client's to judge.
                    tokio::spawn(async move { echo(&stream).await.unwrap_or_default() });
                }
            })
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

async fn echo(stream: &tokio::net::TcpStream) -> io::Result<()> {
    let mut said = [0; 16];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut said) {
            Ok(0) => return Ok(()),
            // So little always has room.
            Ok(n) => ensure_whole(stream.try_write(&said[..n])?, n)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

fn ensure_whole(written: usize, wanted: usize) -> io::Result<()> {
    if written == wanted { Ok(()) } else { Err(io::Error::other("half an answer was written")) }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.notify_one();
        // A panic has been printed.
        if let Some(Ok(Err(error))) = self.thread.take().map(thread::JoinHandle::join) {
            eprintln!("the endpoint: {error:#}");
        }
    }
}
