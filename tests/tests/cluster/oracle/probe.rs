//! A question to both proxies: first packets from one kind of client to one address.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use fairlead_tests::packet::{L4, Packet, SYN};

use super::world::{CROWD, Client};

/// A transport, as Services name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Proto {
    Tcp,
    Udp,
    Sctp,
}

impl Proto {
    pub(super) const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    pub(super) fn of_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Where a packet's number stands behind its IP header.
    pub(super) const fn nonce_at(self) -> usize {
        match self {
            Self::Tcp => 4,
            Self::Udp => 8,
            Self::Sctp => 16,
        }
    }
}

/// What of a Service an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    ClusterIp,
    NodePort,
    External,
    Balancer,
    /// The Service's address, but a port or protocol that it has not.
    Unknown,
    /// No Service's.
    Nobodys,
}

/// First packets from one client to one address.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    pub(super) service: String,
    pub(super) kind: Kind,
    pub(super) client: Client,
    /// Not an address of the client's own, but this one.
    pub(super) from: Option<IpAddr>,
    pub(super) proto: Proto,
    pub(super) to: SocketAddr,
    /// How many endpoints may be behind it, at most.
    pub(super) endpoints: usize,
    /// Session affinity: an address of the client's always reaches the same endpoint.
    pub(super) sticky: bool,
}

impl Probe {
    /// True where all of its packets come from one address.
    pub(super) const fn is_from_one(&self) -> bool {
        self.from.is_some() || self.client.is_alone()
    }

    /// So many packets that hardly ever an endpoint is missed; who is not sure asks again, for more.
    pub(super) fn packets(&self, attempt: usize) -> usize {
        let packets = match (self.endpoints, self.sticky) {
            (0 | 1, _) => 2,
            (_, true) => 64,
            (2, _) => 16,
            (3, _) => 26,
            _ => 36,
        };
        packets << attempt
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, kind, client, proto, to, .. } = self;
        let from = self.from.map(|from| format!(" by {from}")).unwrap_or_default();
        write!(f, "{service}: {client:?} → {to}/{} ({kind:?}){from}", proto.name())
    }
}

/// One packet on its way.
#[derive(Clone, Debug)]
pub(super) struct Shot {
    pub(super) nonce: u32,
    pub(super) client: Client,
    pub(super) proto: Proto,
    pub(super) src: SocketAddr,
    pub(super) dst: SocketAddr,
}

impl Shot {
    pub(super) fn packet(&self) -> Packet {
        let nonce = self.nonce.to_be_bytes();
        match self.proto {
            Proto::Tcp => Packet::tcp(self.src, self.dst, SYN).numbered(self.nonce, 0),
            Proto::Udp => Packet::udp(self.src, self.dst, &nonce),
            Proto::Sctp => {
                // INIT: the only chunk that begins an association, under tag 0 (RFC 9260 §3.3.2).
                let mut init = vec![1, 0, 0, 20];
                init.extend(nonce);
                init.extend([0, 1, 0, 0, 0, 10, 0, 10]);
                init.extend(nonce);
                let mut packet = Packet::sctp(self.src, self.dst, &init);
                packet.l4 = L4::Sctp { tag: 0 };
                packet
            }
        }
    }
}

/// Gives packets their numbers, and source ports that no packet had before: the proxies must not know the tuple.
#[derive(Debug, Default)]
pub(super) struct Magazine {
    /// Which pass over the probes it is.
    pub(super) pass: usize,
    nonce: u32,
    used: BTreeMap<(Client, bool), usize>,
}

/// Source ports of probes: those that processes have. No masquerade takes one of them.
const PORTS: std::ops::Range<usize> = 33_000..60_900;

impl Magazine {
    /// The packets of a probe.
    pub(super) fn shots(&mut self, probe: &Probe, count: usize) -> Vec<Shot> {
        let v6 = probe.to.is_ipv6();
        (0..count)
            .map(|_| {
                self.nonce += 1;
                let used = self.used.entry((probe.client, v6)).or_default();
                let ip = probe.from.unwrap_or_else(|| probe.client.address(v6, self.pass, *used));
                // Who has one address only needs a port for each packet.
                let turn = if probe.is_from_one() { *used } else { *used / CROWD };
                *used += 1;
                let port = PORTS.start + turn % PORTS.len();
                let src = SocketAddr::new(ip, port as u16);
                Shot { nonce: self.nonce, client: probe.client, proto: probe.proto, src, dst: probe.to }
            })
            .collect()
    }
}
