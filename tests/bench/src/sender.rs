//! A sender that keeps one core busy and knows what each packet costs there.
//!
//! Packets leave in bursts, one system call each. Between veths the kernel carries a packet through all namespaces to
//! the receiving socket before the call returns, so the time of the call is the cost of the whole path, on this core.
//! A slice's figure is the median of its bursts: a burst during which something else had the core is an outlier.

use std::{
    io, mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use fairlead_lab::{frame, packet::Mac};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{SockaddrLike as _, SockaddrStorage},
    unistd::Pid,
};

use crate::stats;

/// Packets of a burst: some tens of microseconds, far below a scheduler's time slice.
const BURST: usize = 64;
/// Payload of every packet, bytes.
const PAYLOAD: [u8; 22] = *b"how much does it cost?";
/// Source ports of a source address, from the lowest unprivileged one.
const PORTS: u32 = 60_000;
/// Length of an Ethernet header, which raw sockets do not want.
const ETHERNET: usize = 14;

/// What a slice found.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    /// Nanoseconds per packet: the median of the bursts.
    pub ns: f64,
    /// Packets sent.
    pub sent: u64,
}

/// Binds the calling thread to a core.
pub fn pin_to(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).with_context(|| format!("core {core}"))
}

/// Sends packets of one kind.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
    packets: Vec<Vec<u8>>,
    /// Where each goes; a connected socket knows.
    to: Option<Vec<SockaddrStorage>>,
    vary: Option<Vary>,
}

/// Gives every packet a source of its own.
#[derive(Clone, Copy, Debug)]
struct Vary {
    v6: bool,
    next: u32,
    /// One's complement sum over the UDP checksum's range, without source port and the low half of the source address.
    sum: u32,
}

impl Sender {
    /// Datagrams of a connected socket.
    pub fn connected(socket: std::net::UdpSocket) -> Self {
        Self { socket: socket.into(), packets: vec![PAYLOAD.to_vec(); BURST], to: None, vary: None }
    }

    /// Packets by a raw socket of the calling thread's namespace, to these addresses by turns; each packet comes from
    /// another port, and when all ports were used, from the next address of `source`'s /112 or /16.
    pub fn new_flows(source: IpAddr, to: &[SocketAddr]) -> io::Result<Self> {
        let v6 = source.is_ipv6();
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        // SAFETY: plain integers.
        let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given it to us.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let (mut packets, mut addresses) = (Vec::new(), Vec::new());
        let mut sum = 0;
        for to in to.iter().cycle().take(BURST) {
            let mac = Mac([0; 6]);
            let mut packet = frame::udp((mac, mac), SocketAddr::new(source, 0), *to, &PAYLOAD).split_off(ETHERNET);
            if !v6 {
                // The kernel would draw an identification for zero.
                packet[5] = 1;
            }
            packets.push(packet);
            addresses.push(SockaddrStorage::from(SocketAddr::new(to.ip(), 0)));
        }
        if let Some(first) = packets.first() {
            let at = udp_offset(v6) + 6;
            sum = u32::from(!u16::from_be_bytes([first[at], first[at + 1]]));
        }
        let vary = Vary { v6, next: 0, sum };
        let mut sender = Self { socket, packets, to: Some(addresses), vary: Some(vary) };
        sender.resum();
        Ok(sender)
    }

    /// Destinations differ, and so do their sums; with one sum for all, each packet carries the difference in its
    /// payload's last word, which is summed too.
    fn resum(&mut self) {
        let Some(Vary { v6, sum, .. }) = self.vary else { return };
        let at = udp_offset(v6) + 6;
        for packet in &mut self.packets {
            let own = u32::from(!u16::from_be_bytes([packet[at], packet[at + 1]]));
            let end = packet.len() - 2;
            let word = u32::from(u16::from_be_bytes([packet[end], packet[end + 1]]));
            let word = fold(word + sum + u32::from(!(own as u16)));
            packet[end..].copy_from_slice(&word.to_be_bytes());
        }
    }

    /// Sends for about `duration`.
    pub fn slice(&mut self, duration: Duration) -> Result<Slice> {
        let begun = Instant::now();
        let mut bursts = Vec::with_capacity(8_192);
        // At least one burst, however long something else had the core.
        loop {
            self.freshen();
            let took = self.burst()?;
            bursts.push(took.as_nanos() as f64 / BURST as f64);
            if begun.elapsed() >= duration {
                break;
            }
        }
        let ns = stats::median(&bursts).context("a slice without a burst")?;
        Ok(Slice { ns, sent: (bursts.len() * BURST) as u64 })
    }

    /// Gives each packet of the next burst its source.
    fn freshen(&mut self) {
        let Some(vary) = &mut self.vary else { return };
        let source_low = if vary.v6 { 22 } else { 14 };
        let udp = udp_offset(vary.v6);
        for packet in &mut self.packets {
            let (low, port) = ((vary.next / PORTS) as u16, 1_024 + (vary.next % PORTS) as u16);
            vary.next = vary.next.wrapping_add(1);
            packet[source_low..source_low + 2].copy_from_slice(&low.to_be_bytes());
            packet[udp..udp + 2].copy_from_slice(&port.to_be_bytes());
            let sum = match !fold(vary.sum + u32::from(low) + u32::from(port)) {
                0 => 0xffff,
                sum => sum,
            };
            packet[udp + 6..udp + 8].copy_from_slice(&sum.to_be_bytes());
        }
    }

    /// One system call's worth of packets; returns the time of the call.
    fn burst(&mut self) -> Result<Duration> {
        let mut vectors: Vec<libc::iovec> = self
            .packets
            .iter_mut()
            .map(|packet| libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() })
            .collect();
        let mut headers: Vec<libc::mmsghdr> = vectors
            .iter_mut()
            .enumerate()
            .map(|(n, vector)| {
                // SAFETY: mmsghdr is integers and pointers; zero and null are values of each.
                let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
                header.msg_hdr.msg_iov = vector;
                header.msg_hdr.msg_iovlen = 1;
                if let Some(to) = &self.to {
                    header.msg_hdr.msg_name = to[n].as_ptr().cast_mut().cast();
                    header.msg_hdr.msg_namelen = to[n].len();
                }
                header
            })
            .collect();
        let begun = Instant::now();
        let mut sent = 0;
        while sent < headers.len() {
            let rest = &mut headers[sent..];
            // SAFETY: each header points to one iovec and at most one address, each iovec to a packet; all live
            // through the call, and sending writes to none of them.
            let count = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0) };
            match usize::try_from(count) {
                Ok(count) => sent += count,
                Err(_) => return Err(io::Error::last_os_error()).context("sending a burst"),
            }
        }
        Ok(begun.elapsed())
    }
}

/// Where UDP begins in a packet without Ethernet header and options.
const fn udp_offset(v6: bool) -> usize {
    if v6 { 40 } else { 20 }
}

const fn fold(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum over pseudo header and UDP of a whole packet: all ones if its checksum is right.
    fn verify(packet: &[u8], v6: bool) -> u16 {
        let udp = udp_offset(v6);
        let addresses = if v6 { &packet[8..40] } else { &packet[12..20] };
        let mut sum = 17 + (packet.len() - udp) as u32;
        for pair in addresses.chunks(2).chain(packet[udp..].chunks(2)) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
        }
        fold(sum)
    }

    #[test]
    fn every_packet_has_its_own_source_and_a_right_checksum() {
        for (source, to) in
            [("10.250.0.0", ["10.0.0.1:80", "10.0.7.9:80"]), ("fd00:250::", ["[fd00::1]:80", "[fd00::7:9]:80"])]
        {
            let source: IpAddr = source.parse().unwrap();
            let Ok(mut sender) = Sender::new_flows(source, &to.map(|to| to.parse().unwrap())) else {
                println!("no raw sockets here: {}", io::Error::last_os_error());
                return;
            };
            let mut seen = std::collections::HashSet::new();
            for _ in 0..2_000 {
                sender.freshen();
                for packet in &sender.packets {
                    assert_eq!(verify(packet, source.is_ipv6()), 0xffff, "{packet:02x?}");
                    let end = udp_offset(source.is_ipv6()) + 2;
                    seen.insert(packet[if source.is_ipv6() { 8 } else { 12 }..end].to_vec());
                }
            }
            assert!(seen.len() >= 2_000 * BURST, "{} different flows", seen.len());
        }
    }
}
