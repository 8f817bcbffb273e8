//! The client's side: when a change is seen by traffic, and when the last Service answers.

use std::{
    collections::{BTreeSet, VecDeque},
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll, ppoll},
    sys::time::TimeSpec,
};

use super::answers::{Side, question, read_answer, service};

/// Time between two questions to the Service that changes.
const PERIOD: Duration = Duration::from_micros(500);
/// Questions that may be unanswered at a time.
const WINDOW: usize = 64;
/// The first of the ports that are asked from.
const FIRST_PORT: u16 = 1_024;
/// Services that are asked one after the other before answers are read.
const BURST: usize = 64;
/// How long answers to a round of questions are waited for.
const ROUND: Duration = Duration::from_millis(4);

/// A socket on the port that was used longest ago: half a minute at least, after which nobody knows of its last flow. A
/// port by chance would soon come again, and netfilter leads it to where that flow went.
fn new_flow() -> Result<UdpSocket> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut failed = None;
    for _ in 0..WINDOW * 2 {
        let port = FIRST_PORT + (NEXT.fetch_add(1, Ordering::Relaxed) % u32::from(u16::MAX - FIRST_PORT)) as u16;
        match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Ok(socket) => return Ok(socket),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.map_or_else(|| anyhow::anyhow!("no port was tried"), Into::into).context("cannot make a socket"))
}

struct Question {
    socket: UdpSocket,
    number: u64,
}

/// Asks a Service every half millisecond, each time as a new flow, until this pod answers, and says when that was. The
/// caller stands in the client's namespace. `None` if it was told to give up.
pub(super) fn first_answer(to: SocketAddr, from: Side, give_up: &AtomicBool) -> Result<Option<Instant>> {
    let mut open = VecDeque::<Question>::with_capacity(WINDOW);
    let mut next = Instant::now();
    for number in 0.. {
        if give_up.load(Ordering::Relaxed) {
            break;
        }
        if open.len() == WINDOW {
            open.pop_front();
        }
        let socket = new_flow()?;
        socket.set_nonblocking(true)?;
        // Not reachable yet is what a probe is for.
        if socket.connect(to).and_then(|()| socket.send(&question(number))).is_ok() {
            open.push_back(Question { socket, number });
        }
        // A thread that was late does not ask in a burst what it has missed.
        next = (next + PERIOD).max(Instant::now());
        loop {
            if let Some(heard) = collect(&mut open, from)? {
                return Ok(Some(heard));
            }
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut polled: Vec<_> = open.iter().map(|q| PollFd::new(q.socket.as_fd(), PollFlags::POLLIN)).collect();
            // An interruption is a reason to look, like a time-out.
            ppoll(&mut polled, Some(TimeSpec::from_duration(left)), None).ok();
        }
    }
    Ok(None)
}

fn collect(open: &mut VecDeque<Question>, wanted: Side) -> Result<Option<Instant>> {
    let mut buffer = [0; 16];
    let (mut heard, mut failed) = (None, None);
    open.retain(|question| match question.socket.recv(&mut buffer) {
        Ok(count) => {
            let at = Instant::now();
            if read_answer(&buffer[..count]) == Some((question.number, wanted)) && heard.is_none() {
                heard = Some(at);
            }
            false
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => true,
        // By ICMP: that question is over.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH)) =>
        {
            false
        }
        Err(error) => {
            failed = Some(error);
            false
        }
    });
    match failed {
        Some(error) => Err(error).context("the probe cannot receive"),
        None => Ok(heard),
    }
}

/// Asks again who answers this Service, this many times; yields how often it was not that pod.
pub(super) fn others(to: SocketAddr, wanted: Side, times: u32) -> Result<u32> {
    let mut others = 0;
    for number in 0..u64::from(times) {
        let socket = new_flow()?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.connect(to).and_then(|()| socket.send(&question(number))).context("cannot ask")?;
        let mut buffer = [0; 16];
        let answer = socket.recv(&mut buffer).ok().and_then(|count| read_answer(&buffer[..count]));
        others += u32::from(answer != Some((number, wanted)));
    }
    Ok(others)
}

/// Asks all Services until each has answered, and says when the last one did. Few questions at first, so that asking
/// takes no time from who is being measured: all are asked once those few are answered.
pub(super) fn last_served(services: u32, limit: Duration, mut alive: impl FnMut() -> bool) -> Result<Instant> {
    let begun = Instant::now();
    let mut unserved: BTreeSet<u32> = (0..services).collect();
    let mut last = begun;
    let mut all = false;
    while !unserved.is_empty() {
        if !alive() {
            bail!("it ended with {} of {services} Services not served", unserved.len());
        }
        if begun.elapsed() > limit {
            bail!("{} of {services} Services are not served after {limit:?}", unserved.len());
        }
        let step = if all { 1 } else { unserved.len().div_ceil(BURST) };
        let asked: Vec<_> = unserved.iter().copied().step_by(step).collect();
        let heard = ask(&asked, &mut last)?;
        all = heard.len() == asked.len();
        unserved.retain(|service| !heard.contains(service));
    }
    Ok(last)
}

/// One question to each of these, from one socket: a port that no earlier round has used.
fn ask(services: &[u32], last: &mut Instant) -> Result<BTreeSet<u32>> {
    let socket = new_flow()?;
    socket.set_nonblocking(true)?;
    let mut heard = BTreeSet::new();
    for burst in services.chunks(BURST) {
        for n in burst {
            // Neither a full device nor an ICMP error about an earlier one matters: it is asked again.
            socket.send_to(&question(u64::from(*n)), service(*n)).ok();
        }
        hear(&socket, &mut heard, last);
    }
    let until = Instant::now() + ROUND;
    while heard.len() < services.len() && Instant::now() < until {
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::from(1u8)).ok();
        hear(&socket, &mut heard, last);
    }
    Ok(heard)
}

fn hear(socket: &UdpSocket, heard: &mut BTreeSet<u32>, last: &mut Instant) {
    let mut buffer = [0; 16];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((count, from)) => {
                let number = read_answer(&buffer[..count]).and_then(|(number, _)| u32::try_from(number).ok());
                // The answer has to come from the Service's address.
                if let Some(n) = number.filter(|n| service(*n) == from)
                    && heard.insert(n)
                {
                    *last = Instant::now();
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            // An ICMP error about one of the questions.
            Err(_) => {}
        }
    }
}
