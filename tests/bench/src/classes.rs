//! The classes of packets: what each costs in the programs alone, and how many look-ups it takes.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    frame,
    packet::{ACK, Mac, Packet, SYN},
};
use fairlead_tests::counters::Counters;
use proxy_agent::dataplane::pin::PinRoot;
use proxy_common::{Outcome, abi::tc_index};
use serde::Serialize;

use crate::{
    harness::{Harness, Hook, Shot, Vary},
    services::{self, ENDPOINTS, NODE_PORT, PORT, Plan, TARGET},
    stats,
};

/// MAC addresses of both ends: the loopback device's own, so that frames are addressed to it.
const MACS: (Mac, Mac) = (Mac([0; 6]), Mac([0; 6]));
/// Any device but none.
const SOME_DEVICE: u32 = 1;
/// Source port of the established flows.
const SPORT: u16 = 40_000;

/// A class of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// To an address that is nobody's, where it arrives.
    OtherArrives,
    /// The same where it leaves.
    OtherLeaves,
    /// To an endpoint's own address, where it arrives.
    DirectArrives,
    /// A request of an established UDP flow.
    UdpRequest,
    /// The same where it leaves towards its endpoint.
    UdpRequestLeaves,
    /// A reply of an established UDP flow, where it leaves towards its client.
    UdpReply,
    /// The same where it arrives from its endpoint.
    UdpReplyArrives,
    /// A segment of an established TCP connection.
    TcpRequest,
    /// A segment back.
    TcpReply,
    /// The first packet of a UDP flow.
    UdpNew,
    /// A further packet of a UDP flow that was not answered yet.
    UdpHalfOpen,
    /// The SYN of a TCP connection.
    TcpNew,
    /// UDP to a Service without endpoints: answered by ICMP.
    UdpRejected,
    /// A SYN to a Service without endpoints: answered by a reset.
    TcpRejected,
    /// A SYN to a port that a ClusterIP does not have.
    TcpUnknownPort,
    /// A request of an established TCP connection to a NodePort.
    NodePortRequest,
    /// The SYN of a TCP connection to a NodePort.
    NodePortNew,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::OtherArrives,
        Self::OtherLeaves,
        Self::DirectArrives,
        Self::UdpRequest,
        Self::UdpRequestLeaves,
        Self::UdpReply,
        Self::UdpReplyArrives,
        Self::TcpRequest,
        Self::TcpReply,
        Self::UdpNew,
        Self::UdpHalfOpen,
        Self::TcpNew,
        Self::UdpRejected,
        Self::TcpRejected,
        Self::TcpUnknownPort,
        Self::NodePortRequest,
        Self::NodePortNew,
    ];

    /// In words.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::OtherArrives => "no Service's, arrives",
            Self::OtherLeaves => "no Service's, leaves",
            Self::DirectArrives => "to an endpoint itself, arrives",
            Self::UdpRequest => "established UDP request, arrives",
            Self::UdpRequestLeaves => "established UDP request, leaves",
            Self::UdpReply => "established UDP reply, leaves",
            Self::UdpReplyArrives => "established UDP reply, arrives",
            Self::TcpRequest => "established TCP request, arrives",
            Self::TcpReply => "established TCP reply, leaves",
            Self::UdpNew => "new UDP flow",
            Self::UdpHalfOpen => "half-open UDP flow",
            Self::TcpNew => "new TCP connection",
            Self::UdpRejected => "UDP rejected, no endpoint",
            Self::TcpRejected => "TCP rejected, no endpoint",
            Self::TcpUnknownPort => "TCP rejected, unknown port",
            Self::NodePortRequest => "established TCP to a NodePort",
            Self::NodePortNew => "new TCP connection to a NodePort",
        }
    }

    /// What the programs must say of it.
    const fn outcome(self) -> Outcome {
        match self {
            Self::OtherArrives
            | Self::OtherLeaves
            | Self::DirectArrives
            | Self::UdpRequestLeaves
            | Self::UdpReplyArrives => Outcome::NotOurs,
            Self::UdpRequest | Self::TcpRequest | Self::NodePortRequest => Outcome::Request,
            Self::UdpReply | Self::TcpReply => Outcome::Reply,
            Self::UdpNew | Self::TcpNew | Self::NodePortNew => Outcome::RequestNew,
            Self::UdpHalfOpen => Outcome::RequestHalfOpen,
            Self::UdpRejected | Self::TcpRejected => Outcome::RejectNoEndpoint,
            Self::TcpUnknownPort => Outcome::RejectUnknownPort,
        }
    }

    const fn is_tcp(self) -> bool {
        !matches!(
            self,
            Self::OtherArrives
                | Self::OtherLeaves
                | Self::DirectArrives
                | Self::UdpRequest
                | Self::UdpRequestLeaves
                | Self::UdpReply
                | Self::UdpReplyArrives
                | Self::UdpNew
                | Self::UdpHalfOpen
                | Self::UdpRejected
        )
    }

    const fn is_new(self) -> bool {
        matches!(self, Self::UdpNew | Self::TcpNew | Self::NodePortNew)
    }
}

/// The addresses of the frames; no device has them.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    v6: bool,
}

impl Addresses {
    fn pod(self, n: u8) -> IpAddr {
        let text = if self.v6 { format!("fd00:10:244:1::{n:x}") } else { format!("10.244.1.{n}") };
        text.parse().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    }

    fn node(self) -> IpAddr {
        let text = if self.v6 { "fd00:192:168:50::10" } else { "192.168.50.10" };
        text.parse().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    }

    fn client(self) -> SocketAddr {
        SocketAddr::new(self.pod(9), SPORT)
    }

    fn service(self, class: Class) -> SocketAddr {
        match class {
            Class::OtherArrives | Class::OtherLeaves => SocketAddr::new(self.pod(200), TARGET),
            Class::DirectArrives => SocketAddr::new(self.pod(10), TARGET),
            Class::UdpRejected | Class::TcpRejected => SocketAddr::new(services::empty_vip(self.v6), PORT),
            Class::TcpUnknownPort => SocketAddr::new(services::vip(self.v6), PORT + 1),
            Class::NodePortRequest | Class::NodePortNew => SocketAddr::new(self.node(), NODE_PORT),
            _ => SocketAddr::new(services::vip(self.v6), PORT),
        }
    }
}

/// What the programs are to serve.
pub fn plan(services: u32) -> Plan {
    let families = [Addresses { v6: false }, Addresses { v6: true }];
    let endpoints = (10..10 + ENDPOINTS).flat_map(|n| families.map(|family| family.pod(n)));
    Plan { services, endpoints: endpoints.collect(), node: families.map(Addresses::node).to_vec() }
}

/// A class in one family, its flow set up, ready to be run.
#[derive(Debug)]
pub struct Prepared {
    class: Class,
    harness: Harness,
    counters: Counters,
}

impl Prepared {
    /// Sets up what the class needs, by the programs pinned here.
    pub fn new(pins: &PinRoot, class: Class, v6: bool) -> Result<Self> {
        let counters = Counters::open(pins)?;
        let shot = shot(pins, class, Addresses { v6 })?;
        let prepared = Self { class, harness: Harness::new(pins, shot)?, counters };
        // The first run may still be of another kind: the half-open flow begins with it.
        prepared.harness.once()?;
        prepared.once()?;
        Ok(prepared)
    }

    /// Runs it once and compares what the programs counted.
    pub fn once(&self) -> Result<()> {
        self.judged(1, |harness| harness.once().map(|_| 0.0)).map(drop)
    }

    /// Nanoseconds of one packet: the median of many means.
    pub fn ns(&self, rounds: usize, repeat: u32) -> Result<f64> {
        let means: Result<Vec<f64>> =
            (0..rounds).map(|_| self.judged(repeat, |harness| Ok(harness.mean(repeat)?.ns))).collect();
        stats::median(&means?).context("no rounds")
    }

    fn judged(&self, packets: u32, run: impl FnOnce(&Harness) -> Result<f64>) -> Result<f64> {
        let before = self.counters.read()?;
        let result = run(&self.harness)?;
        let after = self.counters.since(&before)?;
        let wanted = self.class.outcome();
        let expected = if wanted == Outcome::NotOurs { 0 } else { u64::from(packets) };
        ensure!(
            after.get(&wanted).copied().unwrap_or(0) == expected && after.len() == usize::from(expected != 0),
            "{}: {packets} packets were judged as {after:?}, expected is {wanted:?}",
            self.class.describe()
        );
        Ok(result)
    }
}

/// The frame of a class, after its flow was set up.
fn shot(pins: &PinRoot, class: Class, at: Addresses) -> Result<Shot> {
    let mut client = at.client();
    // Flows of different classes keep out of each other's way.
    client.set_port(SPORT + class as u16);
    let service = at.service(class);
    let (syn, data) =
        (|from, to| frame::tcp(MACS, from, to, SYN, 1, 0), |from, to| frame::udp(MACS, from, to, b"data"));
    let first = if class.is_tcp() { syn(client, service) } else { data(client, service) };
    let request = arriving(first);
    match class {
        Class::UdpRequest => {
            establish(pins, &request, false)?;
            Ok(request)
        }
        Class::TcpRequest | Class::NodePortRequest => {
            establish(pins, &request, true)?;
            Ok(arriving(frame::tcp(MACS, client, service, ACK, 2, 2)))
        }
        Class::UdpReply => establish(pins, &request, false),
        Class::TcpReply => establish(pins, &request, true),
        Class::UdpRequestLeaves => {
            let reply = establish(pins, &request, false)?;
            let (endpoint, client) = sockets(&reply.frame)?;
            Ok(Shot { tc_index: tc_index::REQUEST, ..leaving(data(client, endpoint)) })
        }
        Class::UdpReplyArrives => Ok(arriving(establish(pins, &request, false)?.frame)),
        Class::OtherLeaves => Ok(leaving(request.frame)),
        _ if class.is_new() => {
            let vary = if at.v6 { Vary { address: 14 + 22, port: 54 } } else { Vary { address: 14 + 14, port: 34 } };
            Ok(Shot { vary: Some(vary), ..request })
        }
        _ => Ok(request),
    }
}

const fn arriving(frame: Vec<u8>) -> Shot {
    Shot { frame, hook: Hook::Ingress, tc_index: 0, came_in_by: SOME_DEVICE, vary: None }
}

const fn leaving(frame: Vec<u8>) -> Shot {
    Shot { frame, hook: Hook::Egress, tc_index: 0, came_in_by: SOME_DEVICE, vary: None }
}

fn sockets(frame: &[u8]) -> Result<(SocketAddr, SocketAddr)> {
    Packet::parse(frame, false).and_then(|packet| packet.sockets()).context("a frame without ports")
}

/// A UDP flow is confirmed by an answer after this time.
pub const LASTING: Duration = Duration::from_millis(3_100);

/// Lets the request through and answers it until the flow is confirmed. Returns the reply.
fn establish(pins: &PinRoot, request: &Shot, tcp: bool) -> Result<Shot> {
    let translated = Harness::new(pins, request.clone())?.once()?.frame;
    let (client, endpoint) = sockets(&translated)?;
    ensure!(endpoint != sockets(&request.frame)?.1, "the request to {endpoint} was not translated");
    let answer = if tcp {
        frame::tcp(MACS, endpoint, client, SYN | ACK, 1, 2)
    } else {
        frame::udp(MACS, endpoint, client, b"answer")
    };
    let answers = Harness::new(pins, leaving(answer.clone()))?;
    let answered = answers.once()?.frame;
    ensure!(sockets(&answered)? != sockets(&answer)?, "the answer of {endpoint} was not translated");
    if tcp {
        // The handshake's third segment.
        let (client, service) = sockets(&request.frame)?;
        Harness::new(pins, arriving(frame::tcp(MACS, client, service, ACK, 2, 2)))?.once()?;
    } else {
        std::thread::sleep(LASTING);
        answers.once()?;
    }
    Ok(leaving(if tcp { frame::tcp(MACS, endpoint, client, ACK, 2, 2) } else { answer }))
}
