//! A ledger from what the kernel holds, so that a restarted agent carries on with the same ids and changes only what
//! differs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use proxy_common::abi::{Policy, Port, Run};

use super::port::{Contents, Held, HeldEndpoint, Side, SlotRef};
use super::{FilterBits, Ledger};
use crate::dataplane::{Slot, Snapshot};
use crate::model::{IpFamily, PortKey};
use crate::plan::ids::Ids;

impl Ledger {
    /// Takes over what the maps hold.
    pub fn restore(maps: &Snapshot, now: Duration) -> Self {
        let mut ledger = Self {
            capacities: maps.capacities,
            ids: Ids::new(&maps.capacities),
            generations: Vec::new(),
            ports: HashMap::new(),
            keys: HashMap::new(),
            services: HashMap::new(),
            tuples: maps.services.iter().map(|(tuple, service)| (*tuple, *service)).collect(),
            cluster_ips: maps.cluster_ips.iter().copied().collect(),
            cluster_ip_uses: HashMap::new(),
            node_ports: maps.node_ports.clone(),
            node_port_uses: HashMap::new(),
            node_port_lags: BTreeSet::new(),
            filter: FilterBits::new(&maps.filter),
            node_addrs: maps.node_addrs.clone(),
            deadlines: BTreeSet::new(),
            service_cidrs: maps.service_cidrs.clone(),
            stale_ports: Vec::new(),
            stale_ranges: BTreeSet::new(),
        };
        if let Some(last) = maps.live.last_key_value().map(|(id, _)| *id as usize) {
            ledger.generations.resize(last + 1, 0);
            maps.live.iter().for_each(|(id, generation)| ledger.generations[*id as usize] = *generation);
        }
        for tuple in maps.services.keys().filter(|tuple| tuple.addr.is_unspecified()) {
            *ledger.node_port_uses.entry(tuple.port).or_default() += 1;
            let word = maps.node_ports.get(&(u32::from(tuple.port) / 64)).copied().unwrap_or(0);
            if word >> (tuple.port % 64) & 1 == 0 {
                ledger.node_port_lags.insert(tuple.port);
            }
        }
        for (id, key) in in_use_first(maps) {
            ledger.restore_port(maps, id, key, now);
        }
        for family in IpFamily::ALL {
            ledger.restore_other_slots(maps, family);
        }
        for (tuple, service) in &maps.services {
            let Some(key) = ledger.keys.get(&service.port_id) else { continue };
            if let Some(held) = ledger.ports.get_mut(key) {
                held.addresses.push(*tuple);
            }
            // One that nobody reaches may never have been complete, and nobody misses it.
            if let Some(held) = ledger.services.get_mut(&key.service) {
                held.installed = true;
            }
        }
        for (id, net) in &maps.source_ranges {
            match ledger.keys.get(id).and_then(|key| ledger.ports.get_mut(key)) {
                Some(held) => held.source_ranges.insert(*net),
                None => ledger.stale_ranges.insert((*id, *net)),
            };
        }
        if let Some(last) = maps.names.keys().next_back() {
            ledger.ids.ports.resume_after(*last);
        }
        if let Some(last) = maps.live.keys().next_back() {
            ledger.ids.endpoints.resume_after(*last);
        }
        ledger
    }

    fn restore_port(&mut self, maps: &Snapshot, id: u32, key: &PortKey, now: Duration) {
        let fresh = self.ids.ports.reserve(id);
        if !fresh || self.ports.contains_key(key) {
            // Two ids of one port: an agent ended between giving it a new one and forgetting the old.
            let words = maps.ports.get(&id).copied().unwrap_or(Port::UNUSED);
            self.stale_ports.extend(fresh.then_some((id, words)));
            return;
        }
        let mut held = Held::new(id, key.family);
        held.named = true;
        held.words = maps.ports.get(&id).copied().unwrap_or(Port::UNUSED);
        let flags = held.words.policy.flags();
        held.affinity_secs = held.words.policy.affinity_secs();
        held.policy = flags & !(Policy::CLUSTER_MOVED | Policy::LOCAL_MOVED);
        let words = held.words;
        let mut restored = Restored { ledger: self, maps, held: &mut held, taken: Vec::new() };
        let cluster = restored.contents(words.cluster);
        let local = restored.contents(words.local);
        let cluster_settled = restored.settled(words.cluster_settled);
        let local_settled = restored.settled(words.local_settled);
        (held.cluster.current, held.local.current) = (cluster, local);
        take_up(&mut held.cluster, cluster_settled, words.cluster_settled, flags & Policy::CLUSTER_MOVED != 0, now);
        take_up(&mut held.local, local_settled, words.local_settled, flags & Policy::LOCAL_MOVED != 0, now);
        held.deadline = held.next_rest();
        self.deadlines.extend(held.deadline.map(|at| (at, key.clone())));
        self.services.entry(key.service.clone()).or_default().ports.insert(key.clone());
        self.keys.insert(id, key.clone());
        self.ports.insert(key.clone(), held);
    }

    /// Slots in no run: those of parked endpoints, and those that an agent did not come to clear. The next change of
    /// their port clears them and parks anew.
    fn restore_other_slots(&mut self, maps: &Snapshot, family: IpFamily) {
        for (index, slot) in maps.slots(family) {
            let Some(key) = self.keys.get(&slot.owner).filter(|key| key.family == family) else { continue };
            if !self.ids.slots(family).reserve(*index, 1) {
                continue;
            }
            if let Some((key, mut held)) = self.ports.remove_entry(key) {
                held.cluster.garbage.push(Run::new(*index, 1, 0));
                Restored { ledger: self, maps, held: &mut held, taken: Vec::new() }.endpoint(slot);
                self.ports.insert(key, held);
            }
        }
    }
}

/// Port ids by name; of two with the same name the one that a key of `SERVICES` leads to comes first.
fn in_use_first(maps: &Snapshot) -> Vec<(u32, &PortKey)> {
    let used: BTreeSet<u32> = maps.services.values().map(|service| service.port_id).collect();
    let mut ports: Vec<_> = maps.names.iter().map(|(id, key)| (*id, key)).collect();
    ports.sort_by_key(|(id, _)| (!used.contains(id), *id));
    ports
}

fn take_up(side: &mut Side, settled: Option<Run>, word: Run, moved: bool, now: Duration) {
    side.settled = settled;
    if moved || word.word != 0 {
        side.resume_burst(now);
    }
}

/// One port while it is read back.
struct Restored<'a> {
    ledger: &'a mut Ledger,
    maps: &'a Snapshot,
    held: &'a mut Held,
    /// Runs of this port that are taken already: a settled word may name the current run.
    taken: Vec<Run>,
}

impl Restored<'_> {
    /// The slots of a run. Where they are not what their port wrote, the run is kept as one that says nothing, so that
    /// the first change replaces it.
    fn contents(&mut self, run: Run) -> Contents {
        let nothing = Contents { run, slots: Vec::new() };
        if run.is_empty() || !self.take(run) {
            return Contents { run: if run.is_empty() { run } else { Run::default() }, ..nothing };
        }
        let slots: BTreeMap<u32, Slot> = self
            .maps
            .slots(self.held.family)
            .range(run.base()..run.base() + run.len())
            .map(|(i, s)| (*i, *s))
            .collect();
        let refs: Vec<_> = slots.values().filter_map(|slot| self.endpoint(slot)).collect();
        if refs.len() == run.len() as usize { Contents { run, slots: refs } } else { nothing }
    }

    fn settled(&mut self, run: Run) -> Option<Run> {
        if run.is_empty() || self.taken.contains(&run) || !self.take(run) {
            return None;
        }
        let slots: Vec<_> = self.maps.slots(self.held.family).range(run.base()..run.base() + run.len()).collect();
        for (_, slot) in slots {
            self.endpoint(slot);
        }
        Some(run)
    }

    fn take(&mut self, run: Run) -> bool {
        self.taken.push(run);
        self.ledger.ids.slots(self.held.family).reserve(run.base(), run.len())
    }

    /// The endpoint of a slot; `None` if it is not this port's, or its id is another's.
    fn endpoint(&mut self, slot: &Slot) -> Option<SlotRef> {
        if slot.owner != self.held.id {
            return None;
        }
        let found = SlotRef { id: slot.endpoint_id, generation: slot.endpoint_gen, flags: slot.flags };
        let at = (slot.addr, slot.port);
        match self.held.endpoints.binary_search_by_key(&at, |held| (held.addr, held.port)) {
            Ok(place) => (self.held.endpoints[place].id == slot.endpoint_id).then_some(found),
            Err(place) => {
                let live = self.ledger.generations.get(slot.endpoint_id as usize).copied().unwrap_or(0);
                if live != slot.endpoint_gen || !self.ledger.ids.endpoints.reserve(slot.endpoint_id) {
                    return None;
                }
                let (id, generation) = (slot.endpoint_id, slot.endpoint_gen);
                let endpoint = HeldEndpoint { addr: slot.addr, port: slot.port, id, generation, fresh: false };
                self.held.endpoints.insert(place, endpoint);
                Some(found)
            }
        }
    }
}
