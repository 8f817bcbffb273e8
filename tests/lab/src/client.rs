//! Clients: one request or a conversation, over TCP or UDP, with a typed outcome.

use std::{
    fmt, io,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, getsockopt, setsockopt, sockopt},
};

use crate::{
    netns::Namespace,
    schedule, sys,
    wire::{self, Answer, Proto},
};

/// Silence is judged after this: an answer takes a hundredth of it.
pub const SILENCE: Duration = Duration::from_millis(300);
/// How long an answer is waited for. A busy machine makes a test slower, not red: what is lost shows in other ways, a
/// datagram by an answer that never comes, a segment by [`Outcome::Resent`].
pub const PATIENCE: Duration = Duration::from_secs(10);
/// A pause of the machine that may make TCP send again what was not lost: half of its shortest timer.
const SPURIOUS: Duration = Duration::from_millis(100);

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A server answered, and its answer belongs to the request.
    Answered(Answer),
    /// A reset in answer to a SYN, or ICMP port unreachable.
    Refused,
    /// Nothing came.
    Timeout,
    /// The connection was there and ended before the answer.
    Reset,
    /// ICMP host or network unreachable, or prohibited.
    Unreachable,
    /// It ended so, but only after a TCP segment had been sent again: a packet was lost.
    Resent(Box<Self>),
    /// Anything else, in words.
    Broken(String),
}

impl Outcome {
    /// The answer, if there was one.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Answered(answer) => Some(answer),
            _ => None,
        }
    }

    /// The same, also of an answer that took a segment sent again.
    pub fn answer_at_last(&self) -> Option<&Answer> {
        match self {
            Self::Resent(end) => end.answer(),
            _ => self.answer(),
        }
    }

    /// The name of the server that answered.
    pub fn server(&self) -> Option<&str> {
        self.answer().map(|answer| &*answer.server)
    }

    fn from_io(error: &io::Error, connected: bool) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout,
            io::ErrorKind::ConnectionReset if !connected => Self::Refused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => Self::Reset,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::PermissionDenied => {
                Self::Unreachable
            }
            _ => Self::Broken(error.to_string()),
        }
    }

    /// What an attempt since `start` comes to if it sent so many segments again. A machine that slept sends again what
    /// was not lost.
    fn judged(self, resent: u32, start: Instant) -> Self {
        let ended = matches!(self, Self::Answered(_) | Self::Refused);
        if ended && resent > 0 && schedule::longest_pause(start, Instant::now()) < SPURIOUS {
            Self::Resent(Box::new(self))
        } else {
            self
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(answer) => write!(f, "answered by {} (which saw {})", answer.server, answer.peer),
            Self::Refused => f.write_str("refused"),
            Self::Timeout => f.write_str("timeout"),
            Self::Reset => f.write_str("reset"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Resent(end) => write!(f, "a packet was lost and sent again, then {end}"),
            Self::Broken(why) => write!(f, "broken: {why}"),
        }
    }
}

/// An outcome, and how long it took.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// How it ended.
    pub outcome: Outcome,
    /// From the first system call to the end.
    pub elapsed: Duration,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} after {:.2} ms", self.outcome, self.elapsed.as_secs_f64() * 1e3)
    }
}

/// Whom to ask, and from where.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Transport.
    pub proto: Proto,
    /// Address of the server.
    pub to: SocketAddr,
    /// Source address; port 0 is a fresh one.
    pub from: Option<SocketAddr>,
    /// How long to wait, for the connection and for the answer each.
    pub timeout: Duration,
}

impl Ask {
    /// From any address and a fresh port, with [`PATIENCE`].
    pub fn new(proto: Proto, to: SocketAddr) -> Self {
        Self { proto, to, from: None, timeout: PATIENCE }
    }

    /// With this source port, from any address.
    pub fn port(self, port: u16) -> Self {
        let any = if self.to.is_ipv6() { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        self.from(SocketAddr::new(any, port))
    }

    /// With this source port, from the address it has.
    pub fn from_port(self, port: u16) -> Self {
        match self.from {
            Some(from) => self.from(SocketAddr::new(from.ip(), port)),
            None => self.port(port),
        }
    }

    /// From this address.
    pub fn from(self, from: SocketAddr) -> Self {
        Self { from: Some(from), ..self }
    }

    /// With another patience.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Asks once, from inside the namespace.
    pub fn once(&self, ns: &Namespace) -> Result<Attempt> {
        ns.run(|| self.here())
    }

    /// Asks once, from the namespace of the calling thread.
    pub fn here(&self) -> Attempt {
        let start = Instant::now();
        let (outcome, end) = match Conversation::open_here(self) {
            Ok(mut conversation) => {
                let asked = Instant::now();
                let attempt = conversation.ask();
                (attempt.outcome, asked + attempt.elapsed)
            }
            Err(outcome) => (outcome, Instant::now()),
        };
        Attempt { outcome, elapsed: end - start }
    }

    /// Opens a conversation from inside the namespace: a TCP connection, or a connected UDP socket.
    pub fn open(&self, ns: &Namespace) -> Result<Result<Conversation, Outcome>> {
        ns.run(|| Conversation::open_here(self))
    }
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// A TCP connection or a UDP socket with a fixed port, used for several requests.
#[derive(Debug)]
pub struct Conversation {
    stream: Stream,
    timeout: Duration,
    /// Segments sent again, as far as an attempt has told.
    resent: u32,
}

impl Conversation {
    /// Opens one from the namespace of the calling thread.
    pub fn open_here(ask: &Ask) -> Result<Self, Outcome> {
        let fd = connect(ask)?;
        let conversation = match ask.proto {
            Proto::Tcp => {
                let stream = TcpStream::from(fd);
                stream
                    .set_read_timeout(Some(ask.timeout))
                    .and_then(|()| stream.set_nodelay(true))
                    .map(|()| Stream::Tcp(stream))
            }
            Proto::Udp => {
                let socket = UdpSocket::from(fd);
                socket.set_read_timeout(Some(ask.timeout)).map(|()| Stream::Udp(socket))
            }
        };
        let stream = conversation.map_err(|error| Outcome::from_io(&error, true))?;
        Ok(Self { stream, timeout: ask.timeout, resent: 0 })
    }

    /// Its own address.
    pub fn local(&self) -> io::Result<SocketAddr> {
        match &self.stream {
            Stream::Tcp(stream) => stream.local_addr(),
            Stream::Udp(socket) => socket.local_addr(),
        }
    }

    /// One request, one answer.
    pub fn ask(&mut self) -> Attempt {
        self.ask_bulk(0, 0)
    }

    /// One request with `up` bytes of padding, one answer with `down` bytes; every byte is checked.
    pub fn ask_bulk(&mut self, up: usize, down: usize) -> Attempt {
        let start = Instant::now();
        let nonce = fresh_nonce();
        let request = wire::request(nonce, down, up);
        let answered = match &mut self.stream {
            Stream::Tcp(stream) => ask_stream(stream, &request, nonce),
            Stream::Udp(socket) => ask_socket(socket, &request, nonce, start + self.timeout),
        };
        let elapsed = start.elapsed();
        let outcome = answered.map_or_else(|error| Outcome::from_io(&error, true), Outcome::Answered);
        let resent = match &self.stream {
            Stream::Tcp(stream) => sys::segments_resent(stream.as_fd()),
            Stream::Udp(_) => 0,
        };
        let outcome = outcome.judged(resent - self.resent, start);
        self.resent = resent;
        Attempt { outcome, elapsed }
    }

    /// Ends a TCP connection by a reset, which leaves nothing in TIME_WAIT.
    pub fn abort(self) {
        if let Stream::Tcp(stream) = &self.stream {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            // Without the option the connection closes in the ordinary way.
            setsockopt(stream, sockopt::Linger, &linger).ok();
        }
    }
}

/// A number that no other request of this process carries.
pub fn fresh_nonce() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn connect(ask: &Ask) -> Result<OwnedFd, Outcome> {
    let start = Instant::now();
    let failed = |error: io::Error| Outcome::from_io(&error, false);
    let fd = socket_of(ask).map_err(failed)?;
    match connected(&fd, ask) {
        Ok(()) => Ok(fd),
        Err(error) => Err(failed(error).judged(sys::segments_resent(fd.as_fd()), start)),
    }
}

fn socket_of(ask: &Ask) -> io::Result<OwnedFd> {
    let family = if ask.to.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let kind = match ask.proto {
        Proto::Tcp => SockType::Stream,
        Proto::Udp => SockType::Datagram,
    };
    let fd = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    if let Some(from) = ask.from {
        // One port to several destinations at a time: what Linux does by itself when ports run short.
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    }
    Ok(fd)
}

fn connected(fd: &OwnedFd, ask: &Ask) -> io::Result<()> {
    match socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(ask.to)) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            let timeout = PollTimeout::try_from(ask.timeout).unwrap_or(PollTimeout::MAX);
            if poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)], timeout)? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match getsockopt(fd, sockopt::SocketError)? {
                0 => {}
                code => return Err(io::Error::from_raw_os_error(code)),
            }
        }
        Err(error) => return Err(error.into()),
    }
    sys::set_blocking(fd)
}

fn ask_stream(stream: &mut TcpStream, request: &[u8], nonce: u64) -> io::Result<Answer> {
    stream.write_all(request)?;
    let mut line = Vec::new();
    let mut buffer = [0; 1 << 16];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => line.extend_from_slice(&buffer[..count]),
        }
    }
    match wire::parse_answer(&line) {
        Some((answer, echoed)) if echoed == nonce => Ok(answer),
        _ => Err(io::Error::other(format!("asked {nonce}, heard {}", heard(&line)))),
    }
}

fn ask_socket(socket: &UdpSocket, request: &[u8], nonce: u64, deadline: Instant) -> io::Result<Answer> {
    socket.send(request)?;
    let mut buffer = [0; 1 << 16];
    loop {
        let count = socket.recv(&mut buffer)?;
        match wire::parse_answer(&buffer[..count]) {
            Some((answer, echoed)) if echoed == nonce => return Ok(answer),
            // A late answer to an earlier request.
            Some(_) if Instant::now() < deadline => {}
            Some(_) => return Err(io::ErrorKind::TimedOut.into()),
            None => {
                return Err(io::Error::other(format!("asked {nonce}, heard {}", heard(&buffer[..count]))));
            }
        }
    }
}

/// The beginning of what was heard, and its length.
fn heard(line: &[u8]) -> String {
    format!("{:?} ({} bytes)", String::from_utf8_lossy(&line[..line.len().min(100)]), line.len())
}
