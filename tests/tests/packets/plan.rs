//! The plan's answer to a first packet is that of the loaded programs, for Services that chance wrote: addresses of every
//! class, both policies, endpoints in every condition, Services that want the same address, and edits of all of these.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use fairlead_tests::packet::world::{self, Device, POD1, PORT1, UPLINK};
use fairlead_tests::packet::{Node, Packet, Service, Settings, Wire};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use proxy_agent::dataplane::Tuple;
use proxy_agent::model::{IpFamily, Protocol};
use proxy_agent::plan::{Desired, PortPlan, RunPlan};
use proxy_common::Outcome;
use proxy_common::abi::{Class, Policy, RunVerdict, tc_index};

use crate::cases::{PORT, TARGET, at};

/// Names the seed.
const SEED: &str = "FAIRLEAD_PLAN_SEED";
/// Services of one world.
const NAMES: [&str; 3] = ["first", "second", "third"];
/// Each of them as it was written first, and its edits.
const VERSIONS: usize = 3;
const PORTS: [(Protocol, u16); 3] = [(Protocol::Tcp, PORT), (Protocol::Udp, PORT), (Protocol::Tcp, 443)];
const NODE_PORTS: [u16; 2] = [30_080, 30_081];
/// A port that no Service has.
const UNKNOWN: u16 = 81;
const CONDITIONS: [&str; 5] = [
    "ready: true",
    "",
    "ready: false, serving: true, terminating: true",
    "ready: false, serving: false, terminating: true",
    "ready: false",
];
/// The second one holds the client outside, the first and the last nobody.
const RANGES: [&[&str]; 4] =
    [&["192.0.2.0/25"], &["198.51.100.0/24", "2001:db8:51::/64"], &["10.244.0.0/16", "fd00:10:244::/48"], &["::1/128"]];

/// An endpoint: address, on this node.
type Place = (fn(IpFamily) -> IpAddr, bool);

const ENDPOINTS: [Place; 7] = [
    (world::remote, false),
    (world::remote2, false),
    (world::pod1, true),
    (world::pod2, true),
    (world::port1, true),
    (world::port2, true),
    (world::node, true),
];

/// Addresses that Services may share, by family.
fn external(number: usize, family: IpFamily) -> IpAddr {
    let texts = match family {
        IpFamily::V4 => ["203.0.113.5", "203.0.113.6", "192.0.2.1"],
        IpFamily::V6 => ["2001:db8:5::5", "2001:db8:5::6", "2001:db8::1"],
    };
    texts[number].parse().expect("an address")
}

/// A Service as chance wrote it.
#[derive(Clone, Debug)]
struct Draw {
    families: Vec<IpFamily>,
    ports: Vec<(Protocol, u16)>,
    node_port: Option<u16>,
    external: Vec<usize>,
    balancer: Vec<usize>,
    ranges: Option<usize>,
    internal_local: bool,
    external_local: bool,
    affine: bool,
    endpoints: Vec<(usize, usize)>,
}

impl Draw {
    fn service(&self, number: usize) -> Service {
        let vip = |family: &IpFamily| -> IpAddr {
            let network = if *family == IpFamily::V4 { "10.96.0.1" } else { "fd00:10:96::1" };
            format!("{network}{number}").parse().expect("an address")
        };
        let vips: Vec<_> = self.families.iter().map(vip).collect();
        let mut service = Service::new(NAMES[number], &vips);
        for (protocol, port) in &self.ports {
            service = service.port(*protocol, *port, if *port == PORT { TARGET } else { TARGET + 1 });
            // One of each protocol can have the number.
            if let Some(number) = self.node_port.filter(|_| *port == PORT) {
                service = service.node_port(number);
            }
        }
        for family in &self.families {
            for number in &self.external {
                service = service.external_ip(external(*number, *family));
            }
            for number in &self.balancer {
                service = service.balancer_ip(external(*number, *family));
            }
            for (endpoint, condition) in &self.endpoints {
                let (addr, here) = ENDPOINTS[*endpoint];
                service = service.endpoint_that_is(addr(*family), here, CONDITIONS[*condition]);
            }
        }
        for range in self.ranges.iter().flat_map(|number| RANGES[*number]) {
            service = service.source_range(range);
        }
        if self.internal_local {
            service = service.internal_local();
        }
        if self.external_local {
            service = service.external_local();
        }
        if self.affine { service.affine(60) } else { service }
    }
}

fn draw() -> impl Strategy<Value = Draw> {
    let some = |most: usize, of: usize| prop::collection::btree_set(0..of, 0..=most);
    let names = (
        prop::sample::select(vec![vec![IpFamily::V4], vec![IpFamily::V6], IpFamily::ALL.to_vec()]),
        prop::collection::btree_set(0..PORTS.len(), 1..=PORTS.len()),
        prop::option::of(prop::sample::select(NODE_PORTS.to_vec())),
        some(2, 3),
        some(2, 3),
        prop::option::of(0..RANGES.len()),
    );
    let endpoints = prop::collection::btree_map(0..ENDPOINTS.len(), 0..CONDITIONS.len(), 0..5);
    (names, any::<(bool, bool, bool)>(), endpoints).prop_map(|(names, policies, endpoints)| {
        let (families, ports, node_port, external, balancer, ranges) = names;
        let (internal_local, external_local, affine) = policies;
        Draw {
            families,
            ports: ports.into_iter().map(|number| PORTS[number]).collect(),
            node_port,
            external: external.into_iter().collect(),
            balancer: balancer.into_iter().collect(),
            ranges,
            internal_local,
            external_local,
            affine,
            endpoints: endpoints.into_iter().collect(),
        }
    })
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Outside,
    Pod,
    BridgedPod,
    Node,
}

impl Client {
    const ALL: [Self; 4] = [Self::Outside, Self::Pod, Self::BridgedPod, Self::Node];

    const fn place(self) -> (Device, fn(IpFamily) -> IpAddr) {
        match self {
            Self::Outside => (UPLINK, world::client),
            Self::Pod => (POD1, world::pod1),
            Self::BridgedPod => (PORT1, world::port1),
            Self::Node => (UPLINK, world::node),
        }
    }

    /// The node's own, or a pod's: an external policy binds neither (rules 69 and 70).
    const fn is_inside(self) -> bool {
        !matches!(self, Self::Outside)
    }
}

/// How many first packets became of each kind.
#[derive(Debug, Default)]
struct Tally(Cell<[u32; 7]>);

impl Tally {
    const KINDS: [&str; 7] = [
        "forwarded",
        "forwarded, to be masqueraded",
        "of no source range",
        "of no endpoint",
        "of no local endpoint",
        "of a port that nobody has",
        "left alone",
    ];

    fn count(&self, answer: &Answer) {
        let kind = match answer {
            Answer::To(_, false) => 0,
            Answer::To(_, true) => 1,
            Answer::Refused(Outcome::DropSourceRange) => 2,
            Answer::Refused(Outcome::RejectNoEndpoint) => 3,
            Answer::Refused(Outcome::DropNoLocalEndpoint) => 4,
            Answer::Refused(_) => 5,
            Answer::Alone => 6,
        };
        let mut counts = self.0.get();
        counts[kind] += 1;
        self.0.set(counts);
    }

    /// What chance has not written has not been looked at.
    fn assert_telling(&self) {
        for (kind, count) in Self::KINDS.iter().zip(self.0.get()) {
            assert!(count >= 50, "only {count} first packets are {kind}: {:?} of {:?}", self.0.get(), Self::KINDS);
        }
    }
}

/// What becomes of a first packet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    /// It goes to one of these, and its source is due to be exchanged or not.
    To(BTreeSet<SocketAddr>, bool),
    Refused(Outcome),
    /// It is nobody's.
    Alone,
}

/// The plans of all Services, by address.
struct Plans(Vec<Desired>);

impl Plans {
    fn answer(&self, client: Client, from: IpAddr, tuple: Tuple) -> Answer {
        let ports = || self.0.iter().flat_map(|plan| &plan.ports);
        let owner = |wanted: Tuple| {
            ports().find_map(|port| {
                let (_, class) = port.addresses.iter().find(|(tuple, _)| *tuple == wanted)?;
                Some((port, *class))
            })
        };
        let family = tuple.family();
        let on_node = tuple.addr == world::node(family);
        let node_port = || owner(Tuple::node_port(family, tuple.port, tuple.protocol)).filter(|_| on_node);
        if let Some((port, class)) = owner(tuple).or_else(node_port) {
            return of_port(port, class, client, from);
        }
        let cluster_ip = self.0.iter().any(|plan| plan.cluster_ips.contains(&tuple.addr));
        if cluster_ip { Answer::Refused(Outcome::RejectUnknownPort) } else { Answer::Alone }
    }
}

fn of_port(port: &PortPlan, class: Class, client: Client, from: IpAddr) -> Answer {
    let guarded = class == Class::LoadBalancer && !port.source_ranges.is_empty();
    if guarded && !port.source_ranges.iter().any(|range| range.contains(&from)) {
        return Answer::Refused(Outcome::DropSourceRange);
    }
    let node = client == Client::Node;
    let (run, due): (&RunPlan, bool) = match class {
        Class::ClusterIp if port.policy & Policy::INTERNAL_LOCAL != 0 => (&port.local, client == Client::Outside),
        Class::ClusterIp => (&port.cluster, client == Client::Outside),
        _ if port.policy & Policy::EXTERNAL_LOCAL == 0 => (&port.cluster, !node),
        _ if client.is_inside() => (&port.cluster, false),
        _ => (&port.local, false),
    };
    match (run.endpoints.is_empty(), run.verdict) {
        (false, _) => Answer::To(run.endpoints.iter().map(|e| SocketAddr::new(e.addr, e.port)).collect(), due),
        (true, RunVerdict::Reject) => Answer::Refused(Outcome::RejectNoEndpoint),
        (true, RunVerdict::Drop) => Answer::Refused(Outcome::DropNoLocalEndpoint),
    }
}

/// What is asked, for the message of a difference.
struct Question {
    client: Client,
    wire: Wire,
    to: SocketAddr,
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} > {}/{}", self.client, self.to, self.wire.protocol)
    }
}

fn ask(node: &Node, plans: &Plans, question: &Question, client_port: u16, tally: &Tally) -> Result<(), TestCaseError> {
    let Question { client, wire, to } = *question;
    let (device, addr) = client.place();
    let from = SocketAddr::new(addr(wire.family), client_port);
    let packet: Packet = wire.opening(from, to);
    let ran = match client {
        Client::Node => node.sends(device, &packet.on_wire(device.mac, device.peer)),
        _ => node.arrives(device, &at(device, packet)),
    };
    let tuple = Tuple { addr: to.ip(), port: to.port(), protocol: wire.protocol };
    let answer = plans.answer(client, from.ip(), tuple);
    let counted = ran.counted();
    tally.count(&answer);
    match &answer {
        Answer::Alone => prop_assert!(counted.is_empty() && ran.goes_on(), "{question}: {counted:?} for {answer:?}"),
        Answer::Refused(outcome) => {
            prop_assert!(counted == [*outcome], "{question}: {counted:?} for {answer:?}");
        }
        Answer::To(endpoints, due) => {
            prop_assert!(counted == [Outcome::RequestNew], "{question}: {counted:?} for {answer:?}");
            let endpoint = ran.destination();
            prop_assert!(endpoints.contains(&endpoint), "{question}: to {endpoint} for {answer:?}");
            // A pod that is its own endpoint would drop what comes from its own address (rule 74).
            let itself = endpoint.ip() == from.ip();
            let told = ran.tc_index();
            let due = if itself { !matches!(client, Client::Node) } else { *due };
            let expected = if due { tc_index::REQUEST_SNAT } else { tc_index::REQUEST };
            prop_assert!(told == expected, "{question}: told {told} for {answer:?} to {endpoint}");
            let source = match client {
                // It seems to come from the Service's port, so that its answer meets us.
                Client::Node if itself => SocketAddr::new(to.ip(), client_port),
                // Its address on the way to the endpoint.
                Client::Node if [world::port1, world::port2].map(|port| port(wire.family)).contains(&endpoint.ip()) => {
                    SocketAddr::new(world::bridge(wire.family), client_port)
                }
                _ => from,
            };
            prop_assert!(ran.source() == source, "{question}: from {} to {endpoint}", ran.source());
        }
    }
    Ok(())
}

/// Every address that some Service has or shares, with the ports that may lead somewhere.
fn questions(plans: &Plans) -> Vec<Question> {
    let mut targets: BTreeMap<IpAddr, BTreeSet<u16>> = BTreeMap::new();
    for plan in &plans.0 {
        for addr in &plan.cluster_ips {
            targets.entry(*addr).or_default().extend([PORT, 443, UNKNOWN]);
        }
    }
    for family in IpFamily::ALL {
        for number in 0..2 {
            targets.entry(external(number, family)).or_default().extend([PORT, UNKNOWN]);
        }
        targets.entry(world::node(family)).or_default().extend(NODE_PORTS.into_iter().chain([PORT]));
        // An address of the node without NodePorts.
        targets.entry(world::bridge(family)).or_default().insert(NODE_PORTS[0]);
    }
    let mut questions = Vec::new();
    for (addr, ports) in targets {
        for port in ports {
            let wires = if addr.is_ipv4() { [Wire::TCP_V4, Wire::UDP_V4] } else { [Wire::TCP_V6, Wire::UDP_V6] };
            for (wire, client) in wires.into_iter().flat_map(|wire| Client::ALL.map(|client| (wire, client))) {
                // What the node says to its own addresses goes by lo, which other cases show.
                let own = [world::node(wire.family), world::bridge(wire.family)].contains(&addr);
                if client != Client::Node || !own {
                    questions.push(Question { client, wire, to: SocketAddr::new(addr, port) });
                }
            }
        }
    }
    questions
}

#[test]
fn the_programs_answer_a_first_packet_as_the_plan_does() {
    // Answers of the node's own are not what is asked about here: as many as it takes.
    let settings = Settings { rejects_per_sec: 1_000_000, ..Settings::default() };
    // The same worlds in every run; another seed looks at others, and a failure names its own.
    let seed = std::env::var(SEED).map_or(1, |seed| seed.parse().expect("a number"));
    let mut source = [0; 32];
    source[..8].copy_from_slice(&u64::to_le_bytes(seed));
    let config = Config { cases: 32, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &source));
    let tally = Tally::default();
    let worlds =
        prop::collection::vec(prop::collection::vec(prop::option::weighted(0.8, draw()), NAMES.len()), VERSIONS);
    runner
        .run(&worlds, |versions| {
            let mut node = Node::start_with(settings);
            let mut client_port = 10_000;
            let mut standing: [Option<Service>; NAMES.len()] = [const { None }; NAMES.len()];
            for version in versions {
                for (number, draw) in version.into_iter().enumerate() {
                    match (&draw, &standing[number]) {
                        (Some(draw), _) => node.apply(&draw.service(number)),
                        (None, Some(before)) => node.delete(before),
                        (None, None) => {}
                    }
                    standing[number] = draw.map(|draw| draw.service(number));
                }
                let plans = Plans(NAMES.map(|name| node.plan(name)).into());
                for question in questions(&plans) {
                    client_port += 1;
                    ask(&node, &plans, &question, client_port, &tally)?;
                }
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{SEED}={seed}: {error}"));
    tally.assert_telling();
}
