//! The cells of a topology: who asks, who serves, by which address, family and transport; what the rules say of each, and
//! whether it came so.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fairlead_lab::{Ask, Attempt, Conversation, Outcome, Proto, ServiceSpec, client::SILENCE};
use fairlead_tests::{
    nodes::{Nodes, spec},
    rules::{
        Address, Client, Detect, Endpoint, Mode, Node, Policy, Source, Verdict, kube_proxys_verdict, translated_at,
        verdict,
    },
};

use crate::{direct::Direct, proxy::Kind};

/// Cells side by side.
const WORKERS: usize = 48;
/// The first port of clients that keep theirs: below the ephemeral ones.
const FIRST_PORT: u16 = 10_000;

/// Who asks whom. The nodes are alike, so all clients are of the first one.
const PAIRS: [(Client, Endpoint); 13] = {
    use Endpoint::{Pod, Process};
    const A: Node = Node::A;
    const B: Node = Node::B;
    [
        (Client::Server(A), Pod(A)),
        (Client::Pod(A), Pod(A)),
        (Client::Pod(A), Pod(B)),
        (Client::Pod(A), Process(A)),
        (Client::Pod(A), Process(B)),
        (Client::Process(A), Pod(A)),
        (Client::Process(A), Pod(B)),
        (Client::Process(A), Process(A)),
        (Client::Process(A), Process(B)),
        (Client::Outside(A), Pod(A)),
        (Client::Outside(A), Pod(B)),
        (Client::Outside(A), Process(A)),
        (Client::Outside(A), Process(B)),
    ]
};

/// By which address, under which policy.
const WAYS: [(Address, Policy); 6] = [
    (Address::ClusterIp, Policy::Cluster),
    (Address::NodePort(Node::A), Policy::Cluster),
    (Address::NodePort(Node::A), Policy::ExternalLocal),
    (Address::NodePort(Node::B), Policy::Cluster),
    (Address::Balancer, Policy::Cluster),
    (Address::Balancer, Policy::ExternalLocal),
];

/// Client, endpoint, address and policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) client: Client,
    pub(crate) endpoint: Endpoint,
    pub(crate) address: Address,
    pub(crate) policy: Policy,
}

/// One connection's circumstances.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) index: u16,
    pub(crate) route: Route,
    pub(crate) v6: bool,
    pub(crate) proto: Proto,
}

/// What the rules say of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Answered; the endpoint sees this source.
    Answered(Source),
    /// Refused at once.
    Refused,
    /// No answer, and why.
    Silent(&'static str),
}

/// A cell that did not come as the rules say: what came, in a word, and in full.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) cell: Cell,
    pub(crate) what: &'static str,
    pub(crate) why: String,
}

/// Nothing, or what came instead, in a word and in full.
pub(crate) type Judgement = Result<(), (&'static str, String)>;

pub(crate) fn routes() -> impl Iterator<Item = Route> {
    PAIRS.into_iter().flat_map(|(client, endpoint)| {
        WAYS.into_iter().map(move |(address, policy)| Route { client, endpoint, address, policy })
    })
}

pub(crate) fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for route in routes() {
        for v6 in [false, true] {
            for proto in Proto::ALL {
                cells.push(Cell { index: cells.len() as u16, route, v6, proto });
            }
        }
    }
    cells
}

/// The names of the page.
pub(crate) const fn client_name(client: Client) -> &'static str {
    match client {
        Client::Pod(_) | Client::Server(_) => "pod",
        Client::Process(_) => "process of the node",
        Client::Outside(_) => "external host",
    }
}

pub(crate) const fn endpoint_name(client: Client, endpoint: Endpoint) -> &'static str {
    match (client, endpoint) {
        (Client::Server(_), _) => "itself",
        (_, Endpoint::Pod(Node::A)) => "pod here",
        (_, Endpoint::Pod(Node::B)) => "pod of the other node",
        (_, Endpoint::Process(Node::A)) => "process here",
        (_, Endpoint::Process(Node::B)) => "process of the other node",
    }
}

pub(crate) const fn way_name(address: Address, policy: Policy) -> &'static str {
    match (address, policy) {
        (Address::ClusterIp, _) => "ClusterIP",
        (Address::NodePort(Node::A), Policy::ExternalLocal) => "NodePort, Local",
        (Address::NodePort(Node::A), _) => "NodePort",
        (Address::NodePort(Node::B), _) => "NodePort of the other node",
        (Address::Balancer, Policy::ExternalLocal) => "balancer's IP, Local",
        (Address::Balancer, _) => "balancer's IP",
        (Address::ExternalIp, _) => "external IP",
    }
}

pub(crate) const fn ways() -> [(Address, Policy); WAYS.len()] {
    WAYS
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { client, endpoint, address, policy } = self.route;
        let (from, to) = (client_name(client), endpoint_name(client, endpoint));
        let family = if self.v6 { "IPv6" } else { "IPv4" };
        write!(f, "{from} → {to} by {}, {family} {}", way_name(address, policy), self.proto)
    }
}

impl Route {
    /// What the rules say.
    pub(crate) fn fate(&self, kind: Kind) -> Fate {
        // Both tell pods of the node alike, by device or by the node's network.
        let mode = Mode { detect: Detect::PodDevice, masquerade_all: false };
        let judge = match kind {
            Kind::Fairlead => verdict,
            Kind::KubeProxy => kube_proxys_verdict,
        };
        match judge(mode, self.policy, &[self.endpoint], self.client, self.address) {
            Verdict::Refused => Fate::Refused,
            Verdict::Silent => Fate::Silent("Local policy, no endpoint here"),
            Verdict::Served { by, .. } => match by.first() {
                Some((_, source)) => Fate::Answered(*source),
                None => Fate::Silent("answered past the node that translates"),
            },
        }
    }

    /// The Service that is asked.
    pub(crate) fn service(&self) -> ServiceSpec {
        service(self.endpoint, self.policy)
    }

    /// Is there direct traffic that this one must not be told from by the nodes' netfilter? A process of the node has its
    /// entry before its packet is translated.
    pub(crate) fn has_a_direct_twin(&self) -> bool {
        let at = translated_at(self.client, self.address);
        matches!(self.client, Client::Pod(_) | Client::Outside(_))
            && at == self.client.node()
            && self.fate(Kind::Fairlead) == Fate::Answered(Source::Client)
    }
}

fn service(endpoint: Endpoint, policy: Policy) -> ServiceSpec {
    let n = Endpoint::ALL.iter().position(|one| *one == endpoint).expect("one of all");
    let mut spec = spec("cells", 1 + n as u8 + if policy == Policy::ExternalLocal { 10 } else { 0 });
    spec.external_local = policy == Policy::ExternalLocal;
    spec
}

/// Every Service, with its endpoint.
pub(crate) fn services() -> Vec<(ServiceSpec, Endpoint)> {
    let of = |endpoint| [Policy::Cluster, Policy::ExternalLocal].map(|policy| (service(endpoint, policy), endpoint));
    Endpoint::ALL.into_iter().flat_map(of).collect()
}

impl Cell {
    /// The client's port; 0 for one of its own. A node's own process may be seen with another port than it has.
    pub(crate) fn port(&self) -> u16 {
        if matches!(self.route.client, Client::Process(_)) { 0 } else { FIRST_PORT + self.index }
    }

    /// The address that the endpoint sees.
    fn source(&self, direct: &Direct, source: Source, asked: SocketAddr) -> IpAddr {
        let Route { client, endpoint, address, .. } = self.route;
        let at = translated_at(client, address);
        match source {
            Source::Service => asked.ip(),
            Source::Egress(node) => direct.masquerade(node, client, endpoint, self.v6),
            Source::Client if at == client.node() => direct.source(client, endpoint, self.v6),
            // Whom the node that translates sees.
            Source::Client => direct.source(client, Endpoint::Process(at), self.v6),
        }
    }

    /// Asks, and says what is not as the rules say.
    pub(crate) fn judge(&self, nodes: &Nodes, direct: &Direct, kind: Kind, patience: Duration) -> Judgement {
        let Route { client, endpoint, address, .. } = self.route;
        let to = nodes.address(&self.route.service(), address, self.v6);
        let ask = nodes.ask(client, self.proto, to, self.port());
        let fate = self.route.fate(kind);
        let ask = ask.timeout(if matches!(fate, Fate::Silent(_)) { SILENCE } else { patience });
        let attempt = exchange(&ask);
        let other = |wanted: &dyn fmt::Display| Err((word(&attempt.outcome), format!("{attempt}, not {wanted}")));
        match (fate, &attempt.outcome) {
            (Fate::Refused, Outcome::Refused) | (Fate::Silent(_), Outcome::Timeout) => Ok(()),
            (Fate::Answered(source), Outcome::Answered(answer)) => {
                let seen = self.source(direct, source, to);
                if answer.server != endpoint.name() {
                    return other(&endpoint.name());
                }
                let moved = source == Source::Client && ask.from.is_some_and(|from| from.ip() == seen);
                let kept = !moved || self.port() == 0 || answer.peer.port() == self.port();
                if answer.peer.ip() == seen && kept { Ok(()) } else { other(&format_args!("{seen} ({source:?})")) }
            }
            (Fate::Answered(_), _) => other(&"answered"),
            (Fate::Refused, _) => other(&"refused"),
            (Fate::Silent(why), _) => other(&format_args!("silence ({why})")),
        }
    }
}

/// Two questions on one connection: the first packet's way, and an established one's.
fn exchange(ask: &Ask) -> Attempt {
    let begun = std::time::Instant::now();
    match Conversation::open_here(ask) {
        Err(outcome) => Attempt { outcome, elapsed: begun.elapsed() },
        Ok(mut conversation) => match conversation.ask() {
            first @ Attempt { outcome: Outcome::Answered(_), .. } => {
                let second = conversation.ask();
                if second.outcome == first.outcome { first } else { second }
            }
            first => first,
        },
    }
}

/// What came, for the page.
const fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Answered(_) => "another source",
        Outcome::Refused => "refused",
        Outcome::Timeout => "no answer",
        Outcome::Reset => "reset",
        Outcome::Unreachable => "unreachable",
        Outcome::Resent(_) => "a packet lost",
        Outcome::Broken(_) => "broken",
    }
}

/// Runs them, some side by side; what is not as the rules say.
pub(crate) fn failures(cells: &[Cell], judge: impl Fn(&Cell) -> Judgement + Sync, nodes: &Nodes) -> Vec<Failure> {
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let judged = nodes.namespace(cell.route.client).run(|| judge(cell));
                    let judged = judged.unwrap_or_else(|error| Err(("broken", format!("{error:#}"))));
                    if let Err((what, why)) = judged {
                        let failure = Failure { cell: *cell, what, why };
                        failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
                    }
                }
            });
        }
    });
    let mut failures: Vec<Failure> = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.sort_by_key(|failure| failure.cell.index);
    failures
}
