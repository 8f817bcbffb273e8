//! The same packets to both, and what became of them side by side.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::IpAddr,
};

use k8s_openapi::api::core::v1::Service;

use super::{
    differences::{self, DIFFERENCES},
    generate::Generated,
    probe::{Magazine, Probe, Shot},
    sight::{Fate, SeenAs, fates},
    world::Twins,
};

/// Packets that are sent before anybody looks.
const BATCH: usize = 12_000;

/// A probe that both answered, each in its own way.
pub(super) struct Found<'a> {
    pub(super) probe: &'a Probe,
    ours: BTreeSet<Fate>,
    theirs: BTreeSet<Fate>,
    expected: BTreeSet<Fate>,
    fickle: bool,
}

/// Asks both and returns what differs.
pub(super) fn ask<'a>(
    twins: &Twins,
    magazine: &mut Magazine,
    probes: &[&'a Probe],
    attempt: usize,
    tally: &mut Tally,
) -> Vec<Found<'a>> {
    let (mut found, mut rest) = (Vec::new(), probes);
    while !rest.is_empty() {
        let (mut shots, mut ends) = (Vec::new(), Vec::new());
        while shots.len() < BATCH && ends.len() < rest.len() {
            let probe = rest[ends.len()];
            shots.extend(magazine.shots(probe, probe.packets(attempt)));
            ends.push(shots.len());
        }
        let (ours, theirs) = std::thread::scope(|scope| {
            let ours = scope.spawn(|| fates(&twins.ours, &shots));
            let theirs = fates(&twins.theirs, &shots);
            (ours.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), theirs)
        });
        let mut start = 0;
        for (probe, end) in rest.iter().zip(&ends) {
            let own = std::mem::replace(&mut start, *end)..*end;
            found.extend(compare(probe, &shots[own.clone()], &ours[own.clone()], &theirs[own], tally));
        }
        rest = &rest[ends.len()..];
    }
    found
}

fn compare<'a>(
    probe: &'a Probe,
    shots: &[Shot],
    ours: &[Fate],
    theirs: &[Fate],
    tally: &mut Tally,
) -> Option<Found<'a>> {
    let set = |fates: &[Fate]| fates.iter().copied().collect::<BTreeSet<_>>();
    let (fickle, ours, theirs) =
        (probe.sticky && [ours, theirs].iter().any(|fates| is_fickle(shots, fates)), set(ours), set(theirs));
    let mut used = BTreeSet::new();
    let mut translate = |fate: &Fate| {
        let (fate, by) = differences::ours(probe, *fate);
        used.extend(by);
        fate
    };
    let expected: BTreeSet<Fate> = theirs.iter().map(&mut translate).collect();
    let reached = |fates: &BTreeSet<Fate>| fates.iter().all(|fate| matches!(fate, Fate::Reached { .. }));
    // One client, one endpoint, and each node drew its own: what they have in common is that they are served.
    let drawn = probe.sticky && probe.is_from_one() && probe.endpoints > 1 && reached(&ours) && reached(&expected);
    if !fickle && (drawn || ours == expected) {
        tally.count(&theirs, &used);
        return None;
    }
    Some(Found { probe, ours, theirs, expected, fickle })
}

/// True where an address of the client's does not keep its endpoint (rule 78).
fn is_fickle(shots: &[Shot], fates: &[Fate]) -> bool {
    let mut kept: BTreeMap<IpAddr, Fate> = BTreeMap::new();
    shots.iter().zip(fates).any(|(shot, fate)| *kept.entry(shot.src.ip()).or_insert(*fate) != *fate)
}

/// The differences, each Service's objects once.
pub(super) fn describe(found: &[Found<'_>], generated: &[Generated], created: &[Service]) -> String {
    let mut text = String::new();
    let mut by_service: BTreeMap<&str, Vec<&Found<'_>>> = BTreeMap::new();
    for found in found {
        by_service.entry(&found.probe.service).or_default().push(found);
    }
    let list = |fates: &BTreeSet<Fate>| fates.iter().map(|fate| format!("\n        {fate}")).collect::<String>();
    // Writing to a String cannot fail.
    for (service, found) in by_service {
        for Found { probe, ours, theirs, expected, fickle } in found {
            let fickle = if *fickle { " (a client's endpoint changes)" } else { "" };
            writeln!(text, "  {probe}{fickle}\n    kube-proxy:{}\n    fairlead:{}", list(theirs), list(ours)).ok();
            if theirs != expected {
                writeln!(text, "    as listed, fairlead is to do:{}", list(expected)).ok();
            }
        }
        if let Some(at) = generated.iter().position(|made| made.name == service) {
            let spec = serde_json::to_string(&created[at].spec).unwrap_or_default();
            let balancer = generated[at].balancer.as_ref().map(ToString::to_string).unwrap_or_default();
            writeln!(text, "  {service}: {:?} {spec}\n    {balancer}", created[at].metadata.labels).ok();
            for slice in &generated[at].slices {
                writeln!(text, "    {slice}").ok();
            }
        }
    }
    text
}

/// What was seen in a round: kube-proxy's verdicts, and by which differences ours are the same.
#[derive(Debug, Default)]
pub(super) struct Tally {
    fates: BTreeMap<&'static str, usize>,
    used: BTreeMap<usize, usize>,
}

impl Tally {
    fn count(&mut self, theirs: &BTreeSet<Fate>, used: &BTreeSet<usize>) {
        for fate in theirs {
            let name = match fate {
                Fate::Reached { as_from: SeenAs::Client, .. } => "reached",
                Fate::Reached { .. } => "masqueraded",
                Fate::Untouched { .. } => "untouched",
                Fate::Reset => "reset",
                Fate::Unreachable => "unreachable",
                Fate::Error { .. } => "error",
                Fate::Silence => "silence",
            };
            *self.fates.entry(name).or_default() += 1;
        }
        for at in used {
            *self.used.entry(*at).or_default() += 1;
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (name, count) in &other.fates {
            *self.fates.entry(name).or_default() += count;
        }
        for (at, count) in &other.used {
            *self.used.entry(*at).or_default() += count;
        }
    }

    /// A run that shows nothing proves nothing, and a difference that nothing shows is none.
    pub(super) fn assert_telling(&self) {
        for name in ["reached", "masqueraded", "untouched", "unreachable", "silence"] {
            assert!(self.fates.get(name).is_some_and(|count| *count >= 50), "hardly any packet is {name}: {self}");
        }
        for (at, difference) in DIFFERENCES.iter().enumerate() {
            assert!(self.used.contains_key(&at), "nothing shows that {} (rule {})", difference.what, difference.rule);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kube-proxy's verdicts: {:?}", self.fates)?;
        for (at, count) in &self.used {
            let difference = &DIFFERENCES[*at];
            write!(f, "\n{count} probes, rule {}: {} ({})", difference.rule, difference.what, difference.why)?;
        }
        Ok(())
    }
}
