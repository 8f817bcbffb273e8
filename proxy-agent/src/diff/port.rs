//! What the kernel holds of one port: its words, its runs, its endpoints; and how a run moves.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use proxy_common::abi::{Policy, Port, Run, RunVerdict, filter};

use super::QUIET;
use super::batch::Batch;
use super::parked::Parked;
use crate::dataplane::{Capacities, DataplaneError, Free, MapName, MapOp, PortWord, Slot, Tuple};
use crate::model::IpFamily;
use crate::plan::ids::Ids;
use crate::plan::{Chosen, PortPlan, RunPlan};

/// An endpoint with an id of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeldEndpoint {
    pub(super) addr: IpAddr,
    pub(super) port: u16,
    pub(super) id: u32,
    /// `LIVE`'s generation that its slots carry.
    pub(super) generation: u32,
    /// Only the change under way knows it.
    pub(super) fresh: bool,
}

/// A slot of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotRef {
    pub(super) id: u32,
    pub(super) generation: u32,
    pub(super) flags: u16,
}

/// A run with what stands in its slots.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) run: Run,
    pub(super) slots: Vec<SlotRef>,
}

impl Contents {
    fn says(&self, slots: &[SlotRef], verdict: RunVerdict) -> bool {
        if slots.is_empty() { self.run.is_empty() && self.run.verdict() == verdict } else { self.slots == slots }
    }
}

/// A run changed, perhaps several times, and has not been quiet for long enough since.
#[derive(Clone, Copy, Debug)]
struct Burst {
    first: Duration,
    last: Duration,
}

/// One of a port's two runs.
#[derive(Debug)]
pub(super) struct Side {
    run_word: PortWord,
    settled_word: PortWord,
    moved_flag: u32,
    pub(super) current: Contents,
    next: Option<Contents>,
    /// Slots that the settled word keeps.
    pub(super) settled: Option<Run>,
    /// Slots that no word names, and that are not retired yet.
    pub(super) garbage: Vec<Run>,
    burst: Option<Burst>,
    /// What to go back to if the change under way fails.
    burst_before: Option<Burst>,
}

/// What a change may use and must know.
pub(super) struct Means<'a> {
    pub(super) ids: &'a mut Ids,
    pub(super) generations: &'a [u32],
    pub(super) capacities: &'a Capacities,
    /// A key of `SERVICES` leads to the port: packets read its words.
    pub(super) reachable: bool,
    pub(super) now: Duration,
}

impl Means<'_> {
    fn generation(&self, id: u32) -> u32 {
        self.generations.get(id as usize).copied().unwrap_or(0)
    }
}

impl Side {
    const fn new(run_word: PortWord, settled_word: PortWord, moved_flag: u32) -> Self {
        Self {
            run_word,
            settled_word,
            moved_flag,
            current: Contents { run: Run { word: 0 }, slots: Vec::new() },
            next: None,
            settled: None,
            garbage: Vec::new(),
            burst: None,
            burst_before: None,
        }
    }

    /// A restarted agent does not know when the burst began.
    pub(super) const fn resume_burst(&mut self, now: Duration) {
        self.burst = Some(Burst { first: now, last: now });
    }

    /// Turns `want` to a run of these slots, if the present one says anything else.
    fn turn(
        &mut self,
        want: &mut Port,
        slots: Vec<SlotRef>,
        verdict: RunVerdict,
        family: IpFamily,
        means: &mut Means<'_>,
        batch: &mut Batch,
    ) -> Result<Option<Run>, DataplaneError> {
        self.garbage.iter().for_each(|run| batch.retire_slots(family, run.base(), run.len()));
        if self.current.says(&slots, verdict) {
            return Ok(None);
        }
        let (old, len) = (self.current.run, slots.len() as u32);
        let generation = old.generation().wrapping_add(1);
        let run = if slots.is_empty() {
            Run::empty(verdict, generation)
        } else {
            Run::new(allocate_slots(len, family, means)?, len, generation)
        };
        self.burst_before = self.burst;
        // An earlier change may have got as far as the settled word.
        let settled = self.settled_word.get(want) == old.word;
        let settles = match &mut self.burst {
            Some(burst) => {
                burst.last = means.now;
                settled
            }
            // A port that nobody reaches and a run without endpoints have no half-open flow to care for.
            None if !means.reachable || old.is_empty() => settled,
            None => {
                self.resume_burst(means.now);
                self.settled.into_iter().for_each(|run| batch.retire_slots(family, run.base(), run.len()));
                self.settled_word.set(want, old.word);
                true
            }
        };
        if !old.is_empty() && !settles {
            batch.retire_slots(family, old.base(), old.len());
        }
        self.run_word.set(want, run.word);
        self.next = Some(Contents { run, slots });
        Ok(Some(run))
    }

    /// Lets go of what was kept for half-open flows, where its time has come.
    fn settle(&mut self, want: &mut Port, family: IpFamily, now: Duration, batch: &mut Batch) {
        if self.settled_word.get(want) != 0 && self.burst.is_none_or(|burst| burst.first + QUIET <= now) {
            self.settled.into_iter().for_each(|run| batch.retire_slots(family, run.base(), run.len()));
            self.settled_word.set(want, 0);
        }
        self.burst = self.burst.filter(|burst| burst.last + QUIET > now);
    }

    fn next_rest(&self, words: &Port) -> Option<Duration> {
        let keeps = self.settled_word.get(words) != 0;
        match self.burst {
            Some(burst) if keeps => Some(burst.first + QUIET),
            Some(burst) => Some(burst.last + QUIET),
            None => (keeps || words.policy.flags() & self.moved_flag != 0).then_some(Duration::ZERO),
        }
    }

    /// One of its words was stored; `words` are the port's words before that.
    fn record(&mut self, words: &Port, word: PortWord, value: u64) {
        if word == self.run_word {
            let next = self.next.take_if(|next| next.run.word == value);
            let next = next.unwrap_or(Contents { run: Run { word: value }, slots: Vec::new() });
            let old = std::mem::replace(&mut self.current, next).run;
            match old.is_empty() {
                true => {}
                false if self.settled_word.get(words) == old.word => self.settled = Some(old),
                false => self.garbage.push(old),
            }
        } else if word == self.settled_word {
            self.garbage.extend(self.settled.take());
        }
    }

    fn runs(&self) -> impl Iterator<Item = Run> {
        let current = Some(self.current.run).filter(|run| !run.is_empty());
        current.into_iter().chain(self.settled).chain(self.garbage.iter().copied())
    }
}

fn allocate_slots(len: u32, family: IpFamily, means: &mut Means<'_>) -> Result<u32, DataplaneError> {
    let base = if len > Run::MAX_LEN { None } else { means.ids.slots(family).allocate(len) };
    let what = || format!("find {len} slots in a row in");
    base.ok_or_else(|| DataplaneError::full(what(), MapName::slots(family), means.capacities))
}

/// What the kernel holds of one port.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) id: u32,
    pub(super) family: IpFamily,
    /// `NAMES` knows it.
    pub(super) named: bool,
    /// Its value in `PORTS`.
    pub(super) words: Port,
    /// The Service's policy, without the flags that come and go with its runs.
    pub(super) policy: u32,
    /// The timeout beside it.
    pub(super) affinity_secs: u32,
    /// Its keys in `SRC_RANGES`.
    pub(super) source_ranges: BTreeSet<IpNet>,
    /// Keys of `SERVICES` that may lead to it.
    pub(super) addresses: Vec<Tuple>,
    /// In order of address and port.
    pub(super) endpoints: Vec<HeldEndpoint>,
    pub(super) cluster: Side,
    pub(super) local: Side,
    parked: Parked,
    /// When the ledger looks at it again.
    pub(super) deadline: Option<Duration>,
}

impl Held {
    /// A port of which the kernel knows nothing.
    pub(super) fn new(id: u32, family: IpFamily) -> Self {
        Self {
            id,
            family,
            named: false,
            words: Port::UNUSED,
            policy: 0,
            affinity_secs: 0,
            source_ranges: BTreeSet::new(),
            addresses: Vec::new(),
            endpoints: Vec::new(),
            cluster: Side::new(PortWord::Cluster, PortWord::ClusterSettled, Policy::CLUSTER_MOVED),
            local: Side::new(PortWord::Local, PortWord::LocalSettled, Policy::LOCAL_MOVED),
            parked: Parked::default(),
            deadline: None,
        }
    }

    /// The writes that bring words, slots and endpoints to the plan.
    pub(super) fn change(
        &mut self,
        plan: &PortPlan,
        means: &mut Means<'_>,
        batch: &mut Batch,
    ) -> Result<(), DataplaneError> {
        if !self.named {
            batch.hidden.push(MapOp::PutName { port_id: self.id, key: plan.key.clone() });
        }
        for chosen in plan.cluster.endpoints.iter().chain(&plan.local.endpoints) {
            batch.filter(chosen.addr, filter::ENDPOINT);
        }
        let mut want = self.words;
        let cluster = self.slots_for(&plan.cluster, means, batch)?;
        let run = self.cluster.turn(&mut want, cluster, plan.cluster.verdict, self.family, means, batch)?;
        self.put_slots(run, true, &plan.cluster.endpoints, batch);
        let local = self.slots_for(&plan.local, means, batch)?;
        let run = self.local.turn(&mut want, local, plan.local.verdict, self.family, means, batch)?;
        self.put_slots(run, false, &plan.local.endpoints, batch);
        (self.policy, self.affinity_secs) = (plan.policy, plan.affinity_secs);
        want.policy = self.policy_word();
        self.emit(&want, means.reachable, batch);
        self.part_with_endpoints(plan, means, batch);
        self.change_source_ranges(&plan.source_ranges, batch);
        Ok(())
    }

    /// New ranges stand before an address asks for them, old ones go when none does any more.
    fn change_source_ranges(&self, wanted: &[IpNet], batch: &mut Batch) {
        let (port_id, held) = (self.id, &self.source_ranges);
        let added = wanted.iter().filter(|net| !held.contains(net));
        batch.hidden.extend(added.map(|net| MapOp::PutSourceRange { port_id, net: *net }));
        let gone = held.iter().filter(|net| !wanted.contains(net));
        batch.removals.extend(gone.map(|net| MapOp::DeleteSourceRange { port_id, net: *net }));
    }

    /// The writes that take it away. A flow that remembers the port finds its runs empty.
    pub(super) fn remove(&mut self, generations: &[u32], batch: &mut Batch) {
        for word in PortWord::ALL.into_iter().filter(|word| word.get(&self.words) != 0) {
            batch.zeroes.push(MapOp::StorePort { port_id: self.id, word, value: 0 });
        }
        for endpoint in &self.endpoints {
            bump(endpoint, generations, batch);
        }
        let runs = self.cluster.runs().chain(self.local.runs());
        runs.for_each(|run| batch.retire_slots(self.family, run.base(), run.len()));
        self.parked.retire(self.family, batch);
        self.change_source_ranges(&[], batch);
        batch.retire_port(self.id);
    }

    /// The words that may come to rest now.
    pub(super) fn settle(&mut self, now: Duration, batch: &mut Batch) {
        let mut want = self.words;
        self.cluster.settle(&mut want, self.family, now, batch);
        self.local.settle(&mut want, self.family, now, batch);
        want.policy = self.policy_word();
        self.emit(&want, true, batch);
    }

    /// When [`Self::settle`] has something to do.
    pub(super) fn next_rest(&self) -> Option<Duration> {
        let rests = [self.cluster.next_rest(&self.words), self.local.next_rest(&self.words)];
        rests.into_iter().flatten().min()
    }

    /// One of its words was stored.
    pub(super) fn record(&mut self, word: PortWord, value: u64) {
        self.cluster.record(&self.words, word, value);
        self.local.record(&self.words, word, value);
        word.set(&mut self.words, value);
        if matches!(word, PortWord::Cluster | PortWord::Local) && self.endpoints.iter().any(|endpoint| endpoint.fresh) {
            // A packet can meet them from now on.
            let side = if word == PortWord::Cluster { &self.cluster } else { &self.local };
            let met: HashSet<_> = side.current.slots.iter().map(|slot| slot.id).collect();
            self.endpoints.iter_mut().for_each(|endpoint| endpoint.fresh &= !met.contains(&endpoint.id));
        }
    }

    /// Its change is done, and these will be free.
    pub(super) fn finish(&mut self, frees: &[Free]) {
        let freed = |run: &Run| frees.contains(&Free::Slots { family: self.family, base: run.base(), len: run.len() });
        self.cluster.garbage.retain(|run| !freed(run));
        self.local.garbage.retain(|run| !freed(run));
        let gone = frees.iter().filter_map(|free| match free {
            Free::Endpoint { id } => Some(*id),
            Free::Slots { .. } | Free::Port { .. } => None,
        });
        let gone: HashSet<_> = gone.collect();
        self.endpoints.retain(|endpoint| !gone.contains(&endpoint.id));
        self.endpoints.iter_mut().for_each(|endpoint| endpoint.fresh = false);
        self.parked.finish();
    }

    /// Its change failed: what only that change knew of is free at once.
    pub(super) fn abort(&mut self) -> Vec<Free> {
        let mut frees = Vec::new();
        for side in [&mut self.cluster, &mut self.local] {
            if let Some(next) = side.next.take() {
                frees.push(Free::Slots { family: self.family, base: next.run.base(), len: next.run.len() });
                side.burst = side.burst_before;
            }
        }
        frees.extend(self.parked.abort(self.family));
        let lost = self.endpoints.extract_if(.., |endpoint| endpoint.fresh);
        frees.extend(lost.map(|endpoint| Free::Endpoint { id: endpoint.id }));
        frees
    }

    /// True if nothing of it was ever written.
    pub(super) fn is_unknown_to_the_kernel(&self) -> bool {
        !self.named && self.words == Port::UNUSED
    }

    fn policy_word(&self) -> Policy {
        let sides = [&self.cluster, &self.local].into_iter().filter(|side| side.burst.is_some());
        Policy::new(sides.fold(self.policy, |flags, side| flags | side.moved_flag), self.affinity_secs)
    }

    /// Ids for the endpoints of a run, new ones where needed.
    fn slots_for(
        &mut self,
        plan: &RunPlan,
        means: &mut Means<'_>,
        batch: &mut Batch,
    ) -> Result<Vec<SlotRef>, DataplaneError> {
        let mut slots = Vec::with_capacity(plan.endpoints.len());
        for chosen in &plan.endpoints {
            let place = self.endpoints.binary_search_by_key(&(chosen.addr, chosen.port), |held| (held.addr, held.port));
            let place = match place {
                Ok(place) => place,
                Err(place) => {
                    self.endpoints.insert(place, new_endpoint(chosen, means, batch)?);
                    place
                }
            };
            let endpoint = &mut self.endpoints[place];
            // The generation moved without the endpoint's leaving: an earlier change went halfway.
            if !endpoint.fresh {
                endpoint.generation = means.generation(endpoint.id);
            }
            slots.push(SlotRef { id: endpoint.id, generation: endpoint.generation, flags: chosen.flags });
        }
        Ok(slots)
    }

    fn put_slots(&self, run: Option<Run>, cluster: bool, endpoints: &[Chosen], batch: &mut Batch) {
        let side = if cluster { &self.cluster } else { &self.local };
        let (Some(run), Some(next)) = (run, &side.next) else { return };
        for ((index, chosen), slot) in (run.base()..).zip(endpoints).zip(&next.slots) {
            let (endpoint_id, endpoint_gen, owner) = (slot.id, slot.generation, self.id);
            let slot =
                Slot { addr: chosen.addr, port: chosen.port, flags: slot.flags, endpoint_id, endpoint_gen, owner };
            batch.hidden.push(MapOp::PutSlot { index, slot });
        }
    }

    /// Words that differ: first what half-open flows look at, then the runs.
    fn emit(&self, want: &Port, reachable: bool, batch: &mut Batch) {
        use PortWord::{Cluster, ClusterSettled, Local, LocalSettled, Policy};
        let to = if reachable { &mut batch.stores } else { &mut batch.hidden };
        for word in [ClusterSettled, LocalSettled, Policy, Cluster, Local] {
            let value = word.get(want);
            if value != word.get(&self.words) {
                to.push(MapOp::StorePort { port_id: self.id, word, value });
            }
        }
    }

    /// Endpoints that are in no run: the flows of those that do not serve must look for another (rule 105).
    fn part_with_endpoints(&mut self, plan: &PortPlan, means: &mut Means<'_>, batch: &mut Batch) {
        let in_run =
            |run: &RunPlan, at: (IpAddr, u16)| run.endpoints.binary_search_by_key(&at, |c| (c.addr, c.port)).is_ok();
        let left = self.endpoints.iter().filter(|endpoint| {
            let at = (endpoint.addr, endpoint.port);
            !in_run(&plan.cluster, at) && !in_run(&plan.local, at)
        });
        let serves = |held: &HeldEndpoint| plan.serving.binary_search(&(held.addr, held.port)).is_ok();
        left.clone()
            .filter(|held| !serves(held) && !mutant!("rule-105-kept"))
            .for_each(|held| bump(held, means.generations, batch));
        self.parked.change(left.filter(|held| serves(held)), self.id, self.family, means, batch);
    }
}

fn new_endpoint(chosen: &Chosen, means: &mut Means<'_>, batch: &mut Batch) -> Result<HeldEndpoint, DataplaneError> {
    let what = || format!("add endpoint {} to", std::net::SocketAddr::new(chosen.addr, chosen.port));
    let id = means.ids.endpoints.allocate();
    let id = id.ok_or_else(|| DataplaneError::full(what(), MapName::Live, means.capacities))?;
    // Whoever had the id before: its flows must not take this endpoint for theirs.
    let generation = means.generation(id).wrapping_add(1);
    batch.hidden.push(MapOp::StoreLive { endpoint_id: id, generation });
    Ok(HeldEndpoint { addr: chosen.addr, port: chosen.port, id, generation, fresh: true })
}

fn bump(endpoint: &HeldEndpoint, generations: &[u32], batch: &mut Batch) {
    if generations.get(endpoint.id as usize) == Some(&endpoint.generation) {
        let generation = endpoint.generation.wrapping_add(1);
        batch.bumps.push(MapOp::StoreLive { endpoint_id: endpoint.id, generation });
    }
    batch.retire_endpoint(endpoint.id);
}
