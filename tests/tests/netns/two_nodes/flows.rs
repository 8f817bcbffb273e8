//! Every client, address, policy and endpoint between two nodes, both families, both transports: answered, refused or
//! silent, by whom, and which source the endpoint sees, as [`rules`](super::rules) say. That the reply comes from the
//! Service's address is the sockets' own judgement: they are connected to it and hear nobody else.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use anyhow::{Result, ensure};
use fairlead_lab::{Ask, Capture, Outcome, ServiceSpec, Shape, capture, client::SILENCE, topology::UPLINK};

use fairlead_tests::nodes::is_service_address;

use super::{
    pair::{Pair, Shared, spec},
    rules::{Address, Client, Detect, Endpoint, Mode, Node, Policy, Source, Verdict, verdict},
};
use crate::cell::{Cell, Combo};

/// Questions side by side. Most of their time they wait for a silence to be one.
const WORKERS: usize = 24;
/// Questions until each of four endpoints has answered; that one is passed over so often has a chance of 10^-24.
const PATIENT: usize = 200;
/// Questions where the answers of some endpoints are lost.
const SAMPLE: usize = 4;
/// The first port of clients that keep theirs: below the ephemeral ones.
const FIRST_PORT: u16 = 10_000;
/// Lines of a failure.
const SHOWN: usize = 60;

/// Endpoints of a Service: nobody, each by itself, and all.
const SETS: [&[Endpoint]; 6] = [
    &[],
    &[Endpoint::Pod(Node::A)],
    &[Endpoint::Process(Node::A)],
    &[Endpoint::Pod(Node::B)],
    &[Endpoint::Process(Node::B)],
    &Endpoint::ALL,
];

/// One connection's circumstances.
#[derive(Clone, Copy)]
struct Flow {
    index: usize,
    policy: Policy,
    set: usize,
    client: Client,
    address: Address,
    combo: Combo,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.combo.v6 { "IPv6" } else { "IPv4" };
        let endpoints: Vec<_> = SETS[self.set].iter().map(|endpoint| endpoint.name()).collect();
        write!(f, "{:?} → {:?}, policy {:?}, ", self.client, self.address, self.policy)?;
        write!(f, "endpoints [{}], {family} {}", endpoints.join(", "), self.combo.proto)
    }
}

/// All of them.
fn flows() -> Vec<Flow> {
    let mut flows = Vec::new();
    for policy in Policy::ALL {
        for set in 0..SETS.len() {
            for client in Client::ALL {
                for address in Address::ALL {
                    for combo in Combo::ALL {
                        flows.push(Flow { index: flows.len(), policy, set, client, address, combo });
                    }
                }
            }
        }
    }
    flows
}

/// The Service of a policy and a set of endpoints.
fn service(policy: Policy, set: usize) -> ServiceSpec {
    let mut spec = spec("flows", 1 + policy as u8 * 10 + set as u8);
    spec.external_local = policy == Policy::ExternalLocal;
    spec.internal_local = policy == Policy::InternalLocal;
    spec
}

fn services() -> Vec<(ServiceSpec, &'static [Endpoint])> {
    let of = |policy| (0..SETS.len()).map(move |set| (service(policy, set), SETS[set]));
    Policy::ALL.into_iter().flat_map(of).collect()
}

/// What is not as the rules say.
type Judgement = Result<(), String>;

struct Run<'a> {
    pair: &'a Pair,
    mode: Mode,
}

impl Run<'_> {
    fn verdict(&self, flow: &Flow) -> Verdict {
        verdict(self.mode, flow.policy, SETS[flow.set], flow.client, flow.address)
    }

    /// The address that an endpoint sees.
    fn source(&self, flow: &Flow, endpoint: Endpoint, source: Source, asked: SocketAddr) -> IpAddr {
        let v6 = flow.combo.v6;
        match source {
            Source::Client => self.pair.client(flow.client, v6),
            Source::Service => asked.ip(),
            // Routed veths have no address of their own: there it is the node's first one.
            Source::Egress(at) => match (self.pair.cell.shape, endpoint) {
                (Shape::Bridge { .. }, Endpoint::Pod(node)) if node == at => self.pair.lab(at).gateway(v6),
                _ => self.pair.lab(at).node.ip(v6),
            },
        }
    }

    /// Asks, and says what is not as the rules say.
    fn judge(&self, flow: &Flow) -> Judgement {
        let to = self.pair.address(&service(flow.policy, flow.set), flow.address, flow.combo.v6);
        let verdict = self.verdict(flow);
        // Who asks once keeps a port that nobody else has (rule 75). A node's own process does not: its masqueraded
        // port is another one.
        let alone = SETS[flow.set].len() < 2 && !matches!(flow.client, Client::Process(_));
        let port = if alone { FIRST_PORT + flow.index as u16 } else { 0 };
        let ask = self.pair.ask(flow.client, flow.combo.proto, to, port);
        let asked = self.pair.namespace(flow.client).run(|| match &verdict {
            Verdict::Refused => expect(&ask, "a refusal", |outcome| *outcome == Outcome::Refused),
            Verdict::Silent => expect(&ask.timeout(SILENCE), "silence", |outcome| *outcome == Outcome::Timeout),
            Verdict::Served { by, lost } => self.served(flow, &ask, by, lost),
        });
        asked.unwrap_or_else(|error| Err(format!("{error:#}")))
    }

    fn served(&self, flow: &Flow, ask: &Ask, by: &[(Endpoint, Source)], lost: &[Endpoint]) -> Judgement {
        if by.is_empty() {
            return expect(&ask.timeout(SILENCE), "no answer past the node", |outcome| *outcome == Outcome::Timeout);
        }
        let ask = if lost.is_empty() { *ask } else { ask.timeout(SILENCE) };
        let mut missing: Vec<_> = by.iter().map(|(endpoint, _)| endpoint.name()).collect();
        for n in 0..if lost.is_empty() { PATIENT } else { SAMPLE } {
            let attempt = ask.here();
            let answer = match attempt.outcome.answer() {
                Some(answer) => answer,
                None if !lost.is_empty() && attempt.outcome == Outcome::Timeout => continue,
                None => return Err(format!("question {n}: {attempt}, not answered by {missing:?}")),
            };
            let Some((endpoint, source)) = by.iter().find(|(endpoint, _)| endpoint.name() == answer.server) else {
                return Err(format!("{attempt}, which is none of {by:?}"));
            };
            let seen = self.source(flow, *endpoint, *source, ask.to);
            if answer.peer.ip() != seen {
                return Err(format!("{attempt}, not {seen} ({source:?})"));
            }
            let kept = ask.from.map_or(0, |from| from.port());
            if *source == Source::Client && kept != 0 && answer.peer.port() != kept {
                return Err(format!("{attempt}, not its port {kept}"));
            }
            missing.retain(|name| *name != answer.server);
            if missing.is_empty() && lost.is_empty() {
                return Ok(());
            }
        }
        if lost.is_empty() { Err(format!("{missing:?} never answered of {PATIENT} questions")) } else { Ok(()) }
    }

    /// Every one of these flows, some side by side; what failed.
    fn all(&self, flows: &[Flow]) -> Vec<(Flow, String)> {
        let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    while let Some(flow) = flows.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(why) = self.judge(flow) {
                            failures.lock().unwrap_or_else(PoisonError::into_inner).push((*flow, why));
                        }
                    }
                });
            }
        });
        failures.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

fn expect(ask: &Ask, what: &str, wanted: impl Fn(&Outcome) -> bool) -> Judgement {
    let attempt = ask.here();
    if wanted(&attempt.outcome) { Ok(()) } else { Err(format!("{attempt}, not {what}")) }
}

/// Of a reply that does not come back by the node that translated, netfilter there sees one half.
fn is_half_seen(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Served { lost, .. } if !lost.is_empty())
}

/// Every flow, with one setting of the agents.
fn every_flow_is_as_the_rules_say(pair: &Pair, mode: Mode) -> Result<()> {
    let (begun, run) = (Instant::now(), Run { pair, mode });
    pair.serve(&services())?;
    let (half_seen, whole): (Vec<_>, Vec<_>) = flows().into_iter().partition(|flow| is_half_seen(&run.verdict(flow)));
    let (wire, before) = (Capture::start(&pair.lab(Node::A).ext.ns, UPLINK)?, pair.invalid_packets()?);
    let mut failures = run.all(&whole);
    let leaked: Vec<_> = wire.stop().into_iter().filter(|p| !p.outgoing && is_service_address(p.dst)).collect();
    let invalid = pair.invalid_packets()? - before;
    failures.extend(run.all(&half_seen));

    let mut counts = BTreeMap::<_, usize>::new();
    for flow in whole.iter().chain(&half_seen) {
        let name = match run.verdict(flow) {
            Verdict::Refused => "refused",
            Verdict::Silent => "silent",
            Verdict::Served { lost, .. } if lost.is_empty() => "answered",
            Verdict::Served { .. } => "answered past the node",
        };
        *counts.entry(name).or_default() += 1;
    }
    println!("[{}] {mode:?}: {counts:?} after {:?}", pair.cell.name, begun.elapsed());
    // What is answered past the node depends on the setting.
    let told = ["answered", "refused", "silent"].iter().all(|name| counts.contains_key(name));
    ensure!(told, "the flows show {counts:?} alone");
    let shown = capture::show(leaked.iter().take(SHOWN));
    ensure!(leaked.is_empty(), "Service addresses left a node:\n{shown}");
    failures.sort_by_key(|(flow, _)| flow.index);
    let text: Vec<_> = failures.iter().take(SHOWN).map(|(flow, why)| format!("{flow}: {why}")).collect();
    ensure!(failures.is_empty(), "{mode:?}: {} flows are not as the rules say:\n{}", failures.len(), text.join("\n"),);
    ensure!(invalid == 0, "netfilter could not place {invalid} packets");
    Ok(())
}

/// The same on two nodes of its own, whose agents have further arguments.
fn with(cell: &str, args: &[&str], mode: Mode) {
    let pair = Pair::new(Cell::named(cell), args).unwrap_or_else(|error| panic!("[{cell}] {error:#}"));
    every_flow_is_as_the_rules_say(&pair, mode)
        .unwrap_or_else(|error| panic!("[{cell}] {error:#}\n{}", pair.last_words()));
}

const BASE: Mode = Mode { detect: Detect::PodDevice, masquerade_all: false };

#[test]
fn rules_42_to_95_over_routed_veths() {
    Pair::shared(Shared::Routed, |pair| every_flow_is_as_the_rules_say(pair, BASE));
}

#[test]
fn rules_42_to_95_over_bridges() {
    Pair::shared(Shared::Bridged, |pair| every_flow_is_as_the_rules_say(pair, BASE));
}

#[test]
fn rules_68_to_93_with_the_network_of_all_pods() {
    let args = ["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"];
    with("bridge_conntrack", &args, Mode { detect: Detect::ClusterCidr, ..BASE });
}

#[test]
fn rules_68_to_93_without_a_detector() {
    with("routed_conntrack", &["--detect-local-mode=none"], Mode { detect: Detect::Nobody, ..BASE });
}

#[test]
fn rules_68_to_93_with_everything_masqueraded() {
    with("bridge_invalid_drop", &["--masquerade-all"], Mode { masquerade_all: true, ..BASE });
}

#[test]
fn rules_68_to_93_with_everything_masqueraded_and_no_detector() {
    let mode = Mode { detect: Detect::Nobody, masquerade_all: true };
    with("routed_plain", &["--masquerade-all", "--detect-local-mode=none"], mode);
}
