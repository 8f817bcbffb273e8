//! The pods' side: each answers at every address of a network of its own, and says which pod it is.

use std::{
    io::{IoSlice, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use fairlead_lab::{Lab, Pod, sys};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt::Ipv4PacketInfo,
};

/// The port that endpoints listen on.
pub(super) const TARGET: u16 = 8_080;
/// How long a stop may take.
const TICK: Duration = Duration::from_millis(50);

/// Which of the two pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// `pod-a`.
    A,
    /// `pod-b`.
    B,
}

impl Side {
    /// The other one.
    pub(super) const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// What its answers end with.
    pub(super) const fn mark(self) -> u8 {
        match self {
            Self::A => b'a',
            Self::B => b'b',
        }
    }

    /// The nth address of its network, a /16.
    pub(super) fn address(self, n: u32) -> Ipv4Addr {
        let network = match self {
            Self::A => Ipv4Addr::new(10, 245, 0, 0),
            Self::B => Ipv4Addr::new(10, 246, 0, 0),
        };
        Ipv4Addr::from(u32::from(network) + n)
    }
}

/// Two pods that answer. Dropping it ends them.
pub(super) struct Answers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Answers {
    /// Gives both pods their networks and lets them answer.
    pub(super) fn start(lab: &Lab) -> Result<Self> {
        let mut answers = Self { stop: Arc::default(), threads: Vec::new() };
        for (side, pod) in [Side::A, Side::B].into_iter().zip(&lab.pods) {
            own_network(lab, pod, side)?;
            let socket = pod.ns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, TARGET)))?;
            let socket = socket.with_context(|| format!("cannot listen in {}", pod.name))?;
            // Answers leave from the address that was asked.
            setsockopt(&socket, Ipv4PacketInfo, &true).context("IP_PKTINFO")?;
            socket.set_read_timeout(Some(TICK))?;
            sys::set_receive_buffer(&socket, 8 << 20)?;
            let stop = Arc::clone(&answers.stop);
            let thread = std::thread::Builder::new().name(pod.name.clone());
            answers.threads.push(thread.spawn(move || answer(&socket, side, &stop)).context("cannot start a thread")?);
        }
        Ok(answers)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("{error:#}"),
                Err(_) => eprintln!("a pod panicked"),
            }
        }
    }
}

/// Fifty thousand addresses are a route, not fifty thousand entries.
fn own_network(lab: &Lab, pod: &Pod, side: Side) -> Result<()> {
    let network = side.address(0);
    pod.ns.ip_batch(&format!("route add local {network}/16 dev lo\n"))?;
    lab.node.ns.ip_batch(&format!("route add {network}/16 via {} dev {} onlink\n", pod.v4, pod.node_device))
}

fn answer(socket: &UdpSocket, side: Side, stop: &AtomicBool) -> Result<()> {
    let mut space = nix::cmsg_space!(libc::in_pktinfo);
    let mut question = [0; 8];
    while !stop.load(Ordering::Relaxed) {
        let mut parts = [IoSliceMut::new(&mut question)];
        let received = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty());
        let received = match received {
            Ok(received) => received,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error).context("a pod cannot receive"),
        };
        let asked = received.cmsgs().context("what IP_PKTINFO says")?.find_map(|message| match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(info.ipi_addr),
            _ => None,
        });
        let (Some(asked), Some(client), 8) = (asked, received.address, received.bytes) else { continue };
        let from = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: asked, ipi_addr: asked };
        let mark = [side.mark()];
        let parts = [IoSlice::new(&question), IoSlice::new(&mark)];
        let control = [ControlMessage::Ipv4PacketInfo(&from)];
        match sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&client)) {
            // A full device: the question is asked again anyway.
            Ok(_) | Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EAGAIN) => {}
            Err(error) => return Err(error).context("a pod cannot answer"),
        }
    }
    Ok(())
}

/// A question: a number that comes back.
pub(super) const fn question(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

/// Who answered which question.
pub(super) fn read_answer(answer: &[u8]) -> Option<(u64, Side)> {
    let (number, mark) = answer.split_at_checked(8)?;
    let side = [Side::A, Side::B].into_iter().find(|side| mark == [side.mark()])?;
    Some((u64::from_be_bytes(number.try_into().ok()?), side))
}

/// Where a Service is asked.
pub(super) fn service(n: u32) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 16, 0)) + n).into(), PORT)
}

/// The port of every Service.
pub(super) const PORT: u16 = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_who_gave_it_to_what() {
        let answer = [&question(4711)[..], &[Side::B.mark()]].concat();
        assert_eq!(read_answer(&answer), Some((4711, Side::B)));
        assert_eq!(read_answer(&answer[..8]), None);
        assert_eq!(read_answer(b"too short"), None, "nine bytes, of which the last is no mark");
    }

    #[test]
    fn the_networks_of_the_pods_do_not_meet() {
        assert_eq!(Side::A.address(65_535).to_string(), "10.245.255.255");
        assert_eq!(Side::B.address(0).to_string(), "10.246.0.0");
        assert_eq!(service(4_999).to_string(), "10.96.35.135:80");
    }
}
