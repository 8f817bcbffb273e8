//! Servers that say who they are: one thread each, sockets in the pod's namespace.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::{
    netns::Namespace,
    sys,
    wire::{self, Answer, Proto},
};

/// What a server counted.
#[derive(Debug, Default)]
pub struct Counters {
    /// TCP connections accepted.
    pub connections: AtomicU64,
    /// Requests answered.
    pub requests: AtomicU64,
}

/// A running server. Dropping it closes its sockets, as the death of a pod does.
#[derive(Debug)]
pub struct Server {
    /// The name it answers with.
    pub name: String,
    /// What it counted.
    pub counters: Arc<Counters>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

enum Socket {
    Listener(TcpListener),
    Datagrams(UdpSocket),
    Connection { stream: TcpStream, pending: Vec<u8> },
}

/// Longest request line, bytes; a client that sends more without an end of line is cut off.
const MAX_LINE: usize = 64 << 20;
/// How long a client may take to make room for an answer, milliseconds.
const WRITE_MS: u16 = 5000;
/// How long a stop may take, milliseconds.
const TICK_MS: u16 = 20;

impl Server {
    /// Listens on each address and transport inside the namespace.
    pub fn start(ns: &Namespace, name: &str, listen: &[(Proto, SocketAddr)]) -> Result<Self> {
        let sockets = ns.run(|| open(listen))?.with_context(|| format!("server {name} in {}", ns.name()))?;
        let mut worker = Worker {
            name: name.to_owned(),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create")?,
            sockets: HashMap::new(),
            next: 0,
            counters: Arc::default(),
            stop: Arc::default(),
        };
        for socket in sockets {
            worker.add(socket).context("epoll_ctl")?;
        }
        let (counters, stop) = (Arc::clone(&worker.counters), Arc::clone(&worker.stop));
        let thread = std::thread::Builder::new()
            .name(format!("server-{name}"))
            .spawn(move || worker.run())
            .context("cannot start a server thread")?;
        Ok(Self { name: name.to_owned(), counters, stop, thread: Some(thread) })
    }

    /// Listens on one port of an address for both transports.
    pub fn both(ns: &Namespace, name: &str, addrs: &[SocketAddr]) -> Result<Self> {
        let listen: Vec<_> = addrs.iter().flat_map(|&addr| Proto::ALL.map(|proto| (proto, addr))).collect();
        Self::start(ns, name, &listen)
    }

    /// Requests answered so far.
    pub fn requests(&self) -> u64 {
        self.counters.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the server thread has been printed; the sockets are closed either way.
            thread.join().ok();
        }
    }
}

fn open(listen: &[(Proto, SocketAddr)]) -> Result<Vec<Socket>> {
    listen
        .iter()
        .map(|&(proto, addr)| {
            let socket = match proto {
                Proto::Tcp => {
                    let listener = TcpListener::bind(addr).with_context(|| format!("cannot listen on {addr}/TCP"))?;
                    // The standard library's backlog of 128 is too short for bursts of new connections.
                    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
                    listener.set_nonblocking(true)?;
                    Socket::Listener(listener)
                }
                Proto::Udp => {
                    let socket = UdpSocket::bind(addr).with_context(|| format!("cannot listen on {addr}/UDP"))?;
                    socket.set_nonblocking(true)?;
                    sys::set_receive_buffer(&socket, 8 << 20)?;
                    Socket::Datagrams(socket)
                }
            };
            Ok(socket)
        })
        .collect()
}

struct Worker {
    name: String,
    epoll: Epoll,
    sockets: HashMap<u64, Socket>,
    next: u64,
    counters: Arc<Counters>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn add(&mut self, socket: Socket) -> io::Result<()> {
        self.next += 1;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.next);
        match &socket {
            Socket::Listener(listener) => self.epoll.add(listener.as_fd(), event)?,
            Socket::Datagrams(socket) => self.epoll.add(socket.as_fd(), event)?,
            Socket::Connection { stream, .. } => self.epoll.add(stream.as_fd(), event)?,
        }
        self.sockets.insert(self.next, socket);
        Ok(())
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 256];
        while !self.stop.load(Ordering::Relaxed) {
            let count = match self.epoll.wait(&mut events, EpollTimeout::from(TICK_MS)) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => panic!("server {}: epoll_wait: {error}", self.name),
            };
            for event in &events[..count] {
                self.serve(event.data());
            }
        }
    }

    fn serve(&mut self, id: u64) {
        let mut accepted = Vec::new();
        let keep = match self.sockets.get_mut(&id) {
            Some(Socket::Listener(listener)) => {
                while let Ok((stream, _)) = listener.accept() {
                    accepted.push(stream);
                }
                true
            }
            Some(Socket::Datagrams(socket)) => {
                answer_datagrams(&self.name, socket, &self.counters);
                true
            }
            Some(Socket::Connection { stream, pending }) => {
                answer_lines(&self.name, stream, pending, &self.counters).unwrap_or(false)
            }
            None => true,
        };
        if !keep {
            self.sockets.remove(&id);
        }
        for stream in accepted {
            self.counters.connections.fetch_add(1, Ordering::Relaxed);
            // A connection that cannot be served is closed; its client says so.
            if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_ok()
                && let Err(error) = self.add(Socket::Connection { stream, pending: Vec::new() })
            {
                eprintln!("server {}: cannot watch a connection: {error}", self.name);
            }
        }
    }
}

/// Answers what is there; `Ok(false)` when the client has closed.
fn answer_lines(name: &str, stream: &mut TcpStream, pending: &mut Vec<u8>, counters: &Counters) -> io::Result<bool> {
    let mut buffer = [0; 1 << 16];
    let known = pending.len();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => pending.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    if !pending[known..].contains(&b'\n') {
        return Ok(pending.len() <= MAX_LINE);
    }
    let (peer, local) = (wire::canonical(stream.peer_addr()?), wire::canonical(stream.local_addr()?));
    while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
        let line: Vec<u8> = pending.drain(..=end).collect();
        let Some((nonce, size)) = wire::parse_request(&line) else { return Ok(false) };
        counters.requests.fetch_add(1, Ordering::Relaxed);
        write_fully(
            stream,
            &wire::answer(&Answer { server: name.to_owned(), peer, local }, nonce, size.min(MAX_LINE)),
        )?;
    }
    Ok(pending.len() <= MAX_LINE)
}

/// Writes everything to a non-blocking stream; long answers wait for their reader.
fn write_fully(stream: &mut TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(WRITE_MS))? == 0 {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn answer_datagrams(name: &str, socket: &UdpSocket, counters: &Counters) {
    let mut buffer = [0; 1 << 16];
    let Ok(local) = socket.local_addr().map(wire::canonical) else { return };
    // An error here is one of an earlier datagram (ICMP); the next one is read on the next turn.
    while let Ok((count, from)) = socket.recv_from(&mut buffer) {
        let Some((nonce, size)) = wire::parse_request(&buffer[..count]) else { continue };
        counters.requests.fetch_add(1, Ordering::Relaxed);
        let said = Answer { server: name.to_owned(), peer: wire::canonical(from), local };
        if let Err(error) = socket.send_to(&wire::answer(&said, nonce, size), from) {
            // A client that has closed its socket leaves ICMP errors behind; only the unusual is worth a word.
            if !matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock) {
                eprintln!("server {name}: fd {}: cannot answer {from}: {error}", socket.as_raw_fd());
            }
        }
    }
}

/// Waits until a condition holds, looking every millisecond.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = std::time::Instant::now();
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() >= limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
