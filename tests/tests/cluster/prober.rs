//! A prober that sends a datagram every millisecond for as long as it lives, each from a socket of its own, and notes
//! who answered which one when.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fairlead_lab::{Namespace, client::fresh_nonce, wire};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};

/// One question per period.
const PERIOD: Duration = Duration::from_millis(1);
/// Questions that may be unanswered at a time: this many milliseconds of patience, and sockets.
pub(crate) const PATIENCE: usize = 256;

/// The first source port; each question has the next one, so that a minute passes before one is used again.
const FIRST_PORT: u16 = 2_000;

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    /// When its question was sent.
    pub(crate) asked: Instant,
    /// When it came.
    pub(crate) at: Instant,
    /// Who gave it.
    pub(crate) server: String,
}

/// A running prober.
pub(crate) struct Prober {
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Vec<Heard>>,
    asked: Mutex<Vec<Instant>>,
    news: Condvar,
}

impl Prober {
    /// Starts asking from inside the namespace.
    pub(crate) fn start(netns: &Namespace, to: SocketAddr) -> Self {
        let (stop, shared) = (Arc::new(AtomicBool::new(false)), Arc::<Shared>::default());
        let (netns, stopped, sink) = (netns.clone(), Arc::clone(&stop), Arc::clone(&shared));
        let thread = std::thread::spawn(move || {
            netns.enter().unwrap();
            probe(to, &stopped, &sink);
        });
        Self { stop, shared, thread: Some(thread) }
    }

    /// Waits for the first answer of this server to a question that was asked at `since` or later.
    pub(crate) fn first_answer(&self, server: &str, since: Instant, limit: Duration) -> Option<Heard> {
        let heard = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |heard: &[Heard]| {
            let recent = heard.iter().rev().take_while(|answer| answer.at >= since);
            recent.filter(|answer| answer.asked >= since && answer.server == server).last().cloned()
        };
        let (heard, _) = self
            .shared
            .news
            .wait_timeout_while(heard, limit, |heard| find(heard).is_none())
            .unwrap_or_else(PoisonError::into_inner);
        find(&heard)
    }

    /// The longest time without a question that overlaps the span from `since` to `until`.
    pub(crate) fn longest_pause(&self, since: Instant, until: Instant) -> Duration {
        let asked = self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let overlapping = asked.windows(2).filter(|pair| pair[1] >= since && pair[0] <= until);
        overlapping.map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// When each question so far was asked.
    pub(crate) fn asked(&self) -> Vec<Instant> {
        self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every answer so far.
    pub(crate) fn heard(&self) -> Vec<Heard> {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed.
            thread.join().ok();
        }
    }
}

struct Question {
    socket: UdpSocket,
    nonce: u64,
    asked: Instant,
}

fn probe(to: SocketAddr, stop: &AtomicBool, sink: &Shared) {
    let (mut open, mut ports) = (VecDeque::<Question>::with_capacity(PATIENCE), Ports(FIRST_PORT));
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if open.len() == PATIENCE {
            open.pop_front();
        }
        let socket = ports.socket(to.is_ipv6());
        socket.set_nonblocking(true).unwrap();
        let (nonce, asked) = (fresh_nonce(), Instant::now());
        sink.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
        // Not reachable yet is what a prober is for.
        if socket.connect(to).and_then(|()| socket.send(&wire::request(nonce, 0, 0))).is_ok() {
            open.push_back(Question { socket, nonce, asked });
        }
        next += PERIOD;
        let now = Instant::now();
        if next < now {
            // The thread was not given its turn in time; the questions that were missed are not asked in a burst.
            next = now + PERIOD;
        }
        listen_until(next, &mut open, sink);
    }
}

/// Source ports in turn. A port that is used again while the proxy remembers it is no new flow, and need not lead to where new
/// ones go; the kernel's choice comes back to one of its ports twice as often, and sooner by chance.
struct Ports(u16);

impl Ports {
    fn socket(&mut self, v6: bool) -> UdpSocket {
        let any: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        loop {
            let port = self.0;
            self.0 = port.checked_add(1).unwrap_or(FIRST_PORT);
            // Somebody else's is passed over.
            match UdpSocket::bind((any, port)) {
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
                bound => return bound.unwrap(),
            }
        }
    }
}

/// Collects answers until it is time for the next question.
fn listen_until(next: Instant, open: &mut VecDeque<Question>, sink: &Shared) {
    loop {
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let mut polled: Vec<_> =
            open.iter().map(|question| PollFd::new(question.socket.as_fd(), PollFlags::POLLIN)).collect();
        // An interruption is a reason to look, like a time-out.
        ppoll(&mut polled, Some(TimeSpec::from_duration(left)), None).ok();
        collect(open, sink);
    }
}

fn collect(open: &mut VecDeque<Question>, sink: &Shared) {
    let mut buffer = [0; 512];
    open.retain(|question| {
        let count = match question.socket.recv(&mut buffer) {
            Ok(count) => count,
            // Refused (ICMP) ends the question, like an answer; all else leaves it open.
            Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
        };
        let at = Instant::now();
        match wire::parse_answer(&buffer[..count]) {
            Some((answer, nonce)) if nonce == question.nonce => {
                let heard = Heard { asked: question.asked, at, server: answer.server };
                sink.heard.lock().unwrap_or_else(PoisonError::into_inner).push(heard);
                sink.news.notify_all();
                false
            }
            _ => true,
        }
    });
}
