//! What became of first packets: where they came out and what they looked like there, or what their client was told.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    io::IoSliceMut,
    net::{IpAddr, SocketAddr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use fairlead_lab::{Capture, sys};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg};

use super::{
    post,
    probe::{Proto, Shot},
    world::{Side, is_the_nodes},
};

/// Whom the receiver of a packet takes for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SeenAs {
    /// The client, by its own address and port.
    Client,
    /// The client's address with another port.
    OtherPort,
    /// The Service's address, where that is not the node's.
    Service,
    /// Somebody else: the node, after a masquerade.
    Address(IpAddr),
}

/// What may become of a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fate {
    /// It reached this endpoint.
    Reached { at: &'static str, endpoint: SocketAddr, as_from: SeenAs },
    /// It came out here with the destination that it was sent to.
    Untouched { at: &'static str, as_from: SeenAs },
    /// A reset.
    Reset,
    /// ICMP: port unreachable.
    Unreachable,
    /// Another ICMP error.
    Error { kind: u8, code: u8 },
    /// Nothing at all was seen of it.
    Silence,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reached { at, endpoint, as_from } => write!(f, "{endpoint} at {at} from {as_from:?}"),
            Self::Untouched { at, as_from } => write!(f, "untouched at {at} from {as_from:?}"),
            other => write!(f, "{other:?}"),
        }
    }
}

/// An IP packet as far as it matters here.
struct Seen {
    at: &'static str,
    src: IpAddr,
    dst: IpAddr,
    proto: u8,
    l4: Vec<u8>,
}

/// How long the last packets may be under way.
const SETTLE: Duration = Duration::from_millis(60);

/// Sends the packets and says what became of each, in their order.
pub(super) fn fates(side: &Side, shots: &[Shot]) -> Vec<Fate> {
    if side.tracks {
        // The entries of the batch before: the kernel says "cannot" where there is none.
        side.lab.node.ns.output("conntrack", &["-F"]).ok();
    }
    let lab = &side.lab;
    let places =
        [("pod-a", &lab.pods[0].ns), ("pod-b", &lab.pods[1].ns), ("client", &lab.client.ns), ("outside", &lab.ext.ns)];
    let captures = places.map(|(name, ns)| (name, Capture::start(ns, "eth0").expect("a capture")));
    let node = NodeEar::open(side);
    post::send(side, shots);
    std::thread::sleep(SETTLE);
    let mut seen: Vec<Seen> = captures
        .into_iter()
        .flat_map(|(at, capture)| capture.stop().into_iter().map(move |packet| (at, packet)))
        .filter(|(_, packet)| !packet.outgoing)
        .filter_map(|(at, packet)| {
            let (proto, from) = match packet.src {
                IpAddr::V4(_) => (packet.frame[23], 14 + usize::from(packet.frame[14] & 15) * 4),
                IpAddr::V6(_) => (packet.frame[20], 54),
            };
            Some(Seen { at, src: packet.src, dst: packet.dst, proto, l4: packet.frame.get(from..)?.to_vec() })
        })
        .collect();
    seen.extend(node.heard());
    judge(shots, &seen)
}

/// What arrives is looked at first: a host that was reached may well answer that it knows nothing of it.
fn judge(shots: &[Shot], seen: &[Seen]) -> Vec<Fate> {
    let by_nonce: HashMap<u32, usize> = shots.iter().enumerate().map(|(at, shot)| (shot.nonce, at)).collect();
    let by_tuple: HashMap<_, usize> =
        shots.iter().enumerate().map(|(at, shot)| ((shot.proto, shot.src, shot.dst), at)).collect();
    let (mut arrived, mut answered) = (vec![BTreeSet::new(); shots.len()], vec![BTreeSet::new(); shots.len()]);
    for seen in seen {
        if let Some((at, fate)) = arrival(shots, &by_nonce, seen) {
            arrived[at].insert(fate);
        } else if let Some((at, fate)) = answer(shots, &by_nonce, &by_tuple, seen) {
            answered[at].insert(fate);
        }
    }
    let one = |(shot, (arrived, answered)): (&Shot, (BTreeSet<Fate>, BTreeSet<Fate>))| {
        let fates = if arrived.is_empty() { answered } else { arrived };
        assert!(fates.len() < 2, "one packet, {shot:?}, had several fates: {fates:?}");
        fates.first().copied().unwrap_or(Fate::Silence)
    };
    shots.iter().zip(arrived.into_iter().zip(answered)).map(one).collect()
}

fn port(l4: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(l4.get(at..at + 2)?.try_into().ok()?))
}

fn word(l4: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(l4.get(at..at + 4)?.try_into().ok()?))
}

/// A first packet itself.
fn arrival(shots: &[Shot], by_nonce: &HashMap<u32, usize>, seen: &Seen) -> Option<(usize, Fate)> {
    let proto = Proto::of_number(seen.proto)?;
    if proto == Proto::Tcp && seen.l4.get(13)? & 0x16 != 0x02 {
        return None;
    }
    let index = *by_nonce.get(&word(&seen.l4, proto.nonce_at())?)?;
    let shot = &shots[index];
    let (src, dst) = (SocketAddr::new(seen.src, port(&seen.l4, 0)?), SocketAddr::new(seen.dst, port(&seen.l4, 2)?));
    let as_from = match src.ip() {
        _ if src == shot.src => SeenAs::Client,
        ip if ip == shot.src.ip() => SeenAs::OtherPort,
        ip if ip == shot.dst.ip() && !is_the_nodes(ip) => SeenAs::Service,
        ip => SeenAs::Address(ip),
    };
    let fate = match dst == shot.dst {
        true => Fate::Untouched { at: seen.at, as_from },
        false => Fate::Reached { at: seen.at, endpoint: dst, as_from },
    };
    (shot.proto == proto).then_some((index, fate))
}

/// A reset, or an ICMP error that quotes the packet as its client sent it.
fn answer(
    shots: &[Shot],
    by_nonce: &HashMap<u32, usize>,
    by_tuple: &HashMap<(Proto, SocketAddr, SocketAddr), usize>,
    seen: &Seen,
) -> Option<(usize, Fate)> {
    if seen.proto == 6 {
        let index = *by_nonce.get(&word(&seen.l4, 8)?.wrapping_sub(1))?;
        let (src, dst) = (SocketAddr::new(seen.src, port(&seen.l4, 0)?), SocketAddr::new(seen.dst, port(&seen.l4, 2)?));
        let is_answer = (dst, src) == (shots[index].src, shots[index].dst) && seen.l4.get(13)? & 0x04 != 0;
        return is_answer.then_some((index, Fate::Reset));
    }
    let (kind, code, quoted) = (*seen.l4.first()?, *seen.l4.get(1)?, seen.l4.get(8..)?);
    let (proto, src, dst, ports): (u8, IpAddr, IpAddr, &[u8]) = match seen.proto {
        1 if kind == 3 || kind == 11 => {
            let ip = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(quoted.get(at..at + 4)?).ok()?));
            (*quoted.get(9)?, ip(12)?, ip(16)?, quoted.get(20..)?)
        }
        58 if kind < 128 => {
            let ip = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(quoted.get(at..at + 16)?).ok()?));
            (*quoted.get(6)?, ip(8)?, ip(24)?, quoted.get(40..)?)
        }
        _ => return None,
    };
    let tuple =
        (Proto::of_number(proto)?, SocketAddr::new(src, port(ports, 0)?), SocketAddr::new(dst, port(ports, 2)?));
    let fate = match (seen.proto, kind, code) {
        (1, 3, 3) | (58, 1, 4) => Fate::Unreachable,
        _ => Fate::Error { kind, code },
    };
    Some((*by_tuple.get(&tuple)?, fate))
}

/// What is delivered to the node itself, behind every translation and every filter.
struct NodeEar(Vec<(u8, OwnedFd)>);

impl NodeEar {
    fn open(side: &Side) -> Self {
        let open = || {
            let one = |v6, proto| (proto, sys::raw_socket(v6, proto).expect("a raw socket"));
            let v4 = [1, 6, 17, 132].map(|proto| one(false, proto));
            v4.into_iter().chain([58, 6, 17, 132].map(|proto| one(true, proto))).collect()
        };
        Self(side.lab.node.ns.run(open).expect("inside"))
    }

    fn heard(self) -> Vec<Seen> {
        let mut seen = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        for (proto, socket) in self.0 {
            while let Some(one) = hear(&socket, proto, &mut buffer) {
                seen.push(one);
            }
        }
        seen
    }
}

/// The next packet of a raw socket. That of IPv4 comes with its header, that of IPv6 without.
fn hear(socket: &OwnedFd, proto: u8, buffer: &mut [u8]) -> Option<Seen> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let heard = recvmsg::<nix::sys::socket::SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    );
    let heard = heard.ok()?;
    let info = heard.cmsgs().ok()?.find_map(|message| match message {
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::from(info.ipi6_addr.s6_addr)),
        _ => None,
    });
    let (length, from) = (heard.bytes, heard.address?);
    let (src, dst, start) = match (info, from.as_sockaddr_in6()) {
        (Some(dst), Some(from)) => (IpAddr::V6(SockaddrIn6::ip(from)), dst, 0),
        _ => {
            let from = SocketAddrV4::from(*from.as_sockaddr_in()?);
            let dst = <[u8; 4]>::try_from(buffer.get(16..20)?).ok()?;
            ((*from.ip()).into(), dst.into(), usize::from(buffer[0] & 15) * 4)
        }
    };
    Some(Seen { at: "node", src, dst, proto, l4: buffer.get(start..length)?.to_vec() })
}
