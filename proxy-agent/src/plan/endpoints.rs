//! Which endpoints a Service port may use: kube-proxy's rules 40, 42, 45 and 51–59.

use std::net::IpAddr;

use crate::model::{EndpointSlice, Hint, Protocol, SlicePort};

/// An endpoint of one Service port, from whatever slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its address.
    pub addr: IpAddr,
    /// Its port, as its slice has it.
    pub port: u16,
    /// Ready; a terminating one can be, too (rule 53).
    pub ready: bool,
    /// Serving.
    pub serving: bool,
    /// Terminating.
    pub terminating: bool,
    /// On this node.
    pub local: bool,
    /// Whether its hints name this node.
    pub for_node: Hint,
    /// Whether its hints name this node's zone.
    pub for_zone: Hint,
}

impl Candidate {
    /// Used when no endpoint is ready: still serving while it terminates.
    fn is_fallback(&self) -> bool {
        self.serving && (self.terminating || mutant!("rule-53")) && !mutant!("rule-51-none")
    }

    /// Which of two mentions of one endpoint counts: one that does not terminate beats one that does (rule 45). The
    /// rest only makes the choice the same for every order of arrival.
    fn rank(&self) -> (bool, bool, bool, bool, Hint, Hint) {
        (self.terminating == mutant!("rule-45"), self.ready, self.serving, self.local, self.for_node, self.for_zone)
    }
}

/// The endpoints of one Service port: the union of its slices by port name and protocol (rule 40), each address and
/// port once (rule 45), in order of address and port. `zone` is this node's.
pub fn gather(slices: &[&EndpointSlice], name: &str, protocol: Protocol, zone: Option<&str>) -> Vec<Candidate> {
    let mut found = Vec::new();
    for slice in slices {
        let named = |port: &SlicePort| &*port.name == name || mutant!("rule-34");
        let same = |port: &SlicePort| port.protocol == protocol || mutant!("rule-40");
        for port in slice.ports.iter().filter(|port| named(port) && same(port)) {
            found.extend(slice.endpoints.iter().map(|endpoint| Candidate {
                addr: endpoint.addr,
                port: if mutant!("rule-15") { port.port + 1 } else { port.port },
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                local: endpoint.local,
                for_node: endpoint.for_node,
                for_zone: slice.zone_hint(endpoint, zone),
            }));
        }
    }
    found.sort_unstable_by_key(|c| (c.addr, c.port, std::cmp::Reverse(c.rank())));
    match () {
        () if mutant!("rule-45-twice") => {}
        () if mutant!("rule-45-ports") => found.dedup_by_key(|c| c.addr),
        () => found.dedup_by_key(|c| (c.addr, c.port)),
    }
    if mutant!("rule-46") {
        found.reverse();
    }
    found
}

/// What may be chosen for each policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Categories {
    /// For a Cluster policy.
    pub cluster: Vec<Candidate>,
    /// For a Local policy.
    pub local: Vec<Candidate>,
    /// Some endpoint is usable, here or elsewhere: an empty local list then means drop, not reject (rule 54).
    pub any: bool,
}

/// Sorts endpoints by policy. Both lists are always made: one Service port serves both policies at one moment, by the
/// class of the address that a packet asks for.
///
/// * Each list holds the ready endpoints; only if it has none, those that still serve while terminating.
/// * The two fall back independently (rule 51), and one ready endpoint bars every terminating one from its list
///   (rule 52). Not ready, serving and not terminating is never used (rule 53).
/// * Topology hints narrow the ready endpoints of the cluster list, never its fallback and never the local list (rule
///   55).
pub fn categorize(candidates: &[Candidate]) -> Categories {
    let topology = Topology::of(candidates);
    let cluster = ready_or_fallback(candidates.iter().filter(|c| !c.ready || topology.allows(c)));
    let mut local = ready_or_fallback(
        candidates.iter().filter(|c| c.local && (!mutant!("rule-55") || !c.ready || topology.allows(c))),
    );
    if mutant!("rule-51") && cluster.iter().any(|c| c.ready) {
        local.retain(|c| c.ready);
    }
    let any = !cluster.is_empty();
    Categories { cluster, local, any }
}

/// Which of the ready endpoints topology hints leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Any,
    SameZone,
    SameNode,
}

impl Topology {
    /// Hints count only if every ready endpoint has them and one of them is for here; those for nodes count before those
    /// for zones (rule 56). So at least one ready endpoint is left.
    fn of(candidates: &[Candidate]) -> Self {
        let ready = || candidates.iter().filter(|c| c.ready);
        let counts = |hint: fn(&Candidate) -> Hint| {
            (ready().all(|c| hint(c) != Hint::None) || mutant!("rule-56"))
                && (ready().any(|c| hint(c) == Hint::Here) || mutant!("rule-56-somewhere"))
        };
        if counts(|c| c.for_node) {
            Self::SameNode
        } else if counts(|c| c.for_zone) {
            Self::SameZone
        } else {
            Self::Any
        }
    }

    fn allows(self, candidate: &Candidate) -> bool {
        match self {
            Self::Any => true,
            Self::SameZone => candidate.for_zone == Hint::Here,
            Self::SameNode => candidate.for_node == Hint::Here,
        }
    }
}

fn ready_or_fallback<'a>(candidates: impl Iterator<Item = &'a Candidate> + Clone) -> Vec<Candidate> {
    let is_ready =
        |c: &&Candidate| c.ready && !(mutant!("rule-27") && c.terminating) || mutant!("rule-52") && c.is_fallback();
    let ready: Vec<_> = candidates.clone().filter(is_ready).copied().collect();
    if ready.is_empty() { candidates.filter(|c| c.is_fallback()).copied().collect() } else { ready }
}

#[cfg(test)]
mod tests;
