//! From what is wanted and what the kernel holds to writes: [`Ledger::change`].
//!
//! The ledger is what the kernel holds, as far as it matters for the next change. It follows the writes one by one
//! ([`Ledger::record`]), so after a failure in the middle it is still true, and the next change carries on from there.
//!
//! A change has three fates: [`Ledger::finish`] when prepare and commit are done, [`Ledger::abort`] when one of them
//! failed, and [`Ledger::release`] when the grace period and its retires are over.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use proxy_common::abi::{self, Class, filter};

use crate::dataplane::{Capacities, Change, DataplaneError, Free, MapName, MapOp, PortWord, Subject, Tuple};
use crate::model::{IpFamily, ObjectName, PortKey};
use crate::plan::ids::{Ids, Room};
use crate::plan::{Desired, PortPlan};

mod batch;
mod filter_bits;
mod parked;
mod port;
mod record;
mod restore;

use batch::Batch;
use filter_bits::FilterBits;
use port::{Held, Means};

/// While this long has not passed since a run changed, flows may still be half open under the run before: as long as a
/// half-open entry lives (`abi::Config::NEW_TIMEOUT_SECS`).
pub const QUIET: Duration = Duration::from_secs(abi::Config::NEW_TIMEOUT_SECS as u64);

/// How long a port whose words could not be stored waits for the next attempt.
const RETRY: Duration = Duration::from_secs(1);

/// What the kernel holds of one Service.
#[derive(Debug, Default)]
struct HeldService {
    ports: BTreeSet<PortKey>,
    /// ClusterIPs that it keeps in `CLUSTER_IPS`.
    cluster_ips: Vec<IpAddr>,
    /// It was complete once. One that never was is withdrawn when a write fails.
    installed: bool,
}

/// What the kernel holds.
#[derive(Debug)]
pub struct Ledger {
    capacities: Capacities,
    ids: Ids,
    /// `LIVE`, by endpoint id, as far as it was ever written.
    generations: Vec<u32>,
    ports: HashMap<PortKey, Held>,
    keys: HashMap<u32, PortKey>,
    services: HashMap<ObjectName, HeldService>,
    tuples: HashMap<Tuple, abi::Service>,
    cluster_ips: HashSet<IpAddr>,
    /// How many Services keep a ClusterIP.
    cluster_ip_uses: HashMap<IpAddr, u32>,
    node_ports: BTreeMap<u32, u64>,
    /// How many keys of `SERVICES` stand under a NodePort.
    node_port_uses: HashMap<u16, u32>,
    /// NodePorts whose keys changed and whose bit has not followed yet.
    node_port_lags: BTreeSet<u16>,
    filter: FilterBits,
    node_addrs: BTreeMap<IpAddr, u32>,
    /// When ports come to rest after a change of their runs. A port may stand here too early, never too late.
    deadlines: BTreeSet<(Duration, PortKey)>,
    service_cidrs: BTreeSet<IpNet>,
    /// Ports that an earlier agent left beside another id for the same port.
    stale_ports: Vec<(u32, abi::Port)>,
    /// Source ranges that it left for no port.
    stale_ranges: BTreeSet<(u32, IpNet)>,
}

impl Ledger {
    /// The writes that bring one Service to what is wanted. Fails, with nothing taken, if ids or slots run out.
    ///
    /// Its result must be passed to [`Self::finish`] or [`Self::abort`] before the next change is made.
    pub fn change(&mut self, desired: &Desired, now: Duration) -> Result<Change, DataplaneError> {
        let mut batch = Batch::default();
        let wanted: BTreeSet<_> = desired.ports.iter().map(|port| port.key.clone()).collect();
        for plan in &desired.ports {
            if let Err(error) = self.change_port(plan, now, &mut batch) {
                self.abort(&desired.service, now);
                return Err(error);
            }
        }
        let held = self.services.get(&desired.service);
        let held = held.filter(|_| !mutant!("rule-36") || desired.ports.is_empty());
        let gone: Vec<_> = held.map(|held| held.ports.difference(&wanted).cloned().collect()).unwrap_or_default();
        for key in gone {
            self.remove_port(&key, &mut batch);
        }
        self.change_cluster_ips(desired, &mut batch);
        self.change_node_ports(&mut batch);
        Ok(batch.into_change(Subject::Service(desired.service.clone()), &self.filter))
    }

    /// The words of ports that came to rest: see [`QUIET`].
    pub fn settle(&mut self, now: Duration) -> Vec<Change> {
        let mut changes = Vec::new();
        while let Some((at, key)) = self.deadlines.first().filter(|(at, _)| *at <= now).cloned() {
            self.deadlines.pop_first();
            let Some(held) = self.ports.get_mut(&key).filter(|held| held.deadline == Some(at)) else { continue };
            let mut batch = Batch::default();
            held.settle(now, &mut batch);
            held.deadline = None;
            let change = batch.into_change(Subject::Service(key.service.clone()), &self.filter);
            if change.is_empty() {
                schedule(&mut self.deadlines, &key, held, Duration::ZERO);
            } else {
                changes.push(change);
            }
        }
        changes
    }

    /// When [`Self::settle`] has something to do next.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// The writes that bring the node's addresses to what is wanted.
    pub fn change_node(&mut self, addrs: &BTreeMap<IpAddr, u32>) -> Change {
        let mut batch = Batch::default();
        let known = |addr: &IpAddr| self.capacities.ipv6 || IpFamily::of(addr) == IpFamily::V4;
        for (addr, flags) in addrs.iter().filter(|(addr, _)| known(addr)) {
            batch.filter(*addr, filter::NODE);
            if self.node_addrs.get(addr) != Some(flags) {
                batch.visible.push(MapOp::PutNodeAddr { addr: *addr, flags: *flags });
            }
        }
        let gone = self.node_addrs.keys().filter(|addr| !addrs.contains_key(addr));
        batch.removals.extend(gone.map(|addr| MapOp::DeleteNodeAddr { addr: *addr }));
        batch.into_change(Subject::Node, &self.filter)
    }

    /// The writes that bring the networks of ClusterIPs to what is wanted.
    pub fn change_service_cidrs(&self, wanted: &BTreeSet<IpNet>) -> Change {
        let mut batch = Batch::default();
        let known = |net: &&IpNet| self.capacities.ipv6 || matches!(net, IpNet::V4(_));
        let added = wanted.iter().filter(known).filter(|net| !self.service_cidrs.contains(net));
        batch.visible.extend(added.map(|net| MapOp::PutServiceCidr { net: *net }));
        let gone = self.service_cidrs.difference(wanted);
        batch.removals.extend(gone.map(|net| MapOp::DeleteServiceCidr { net: *net }));
        batch.into_change(Subject::ServiceCidrs, &self.filter)
    }

    /// What an earlier agent left behind and no Service claimed by the time every Service was planned.
    pub fn leftovers(&mut self) -> Change {
        let mut change = Change::new(Subject::Leftovers);
        let orphans = self.tuples.iter().filter(|(_, service)| !self.keys.contains_key(&service.port_id));
        change.commit.extend(orphans.map(|(tuple, _)| MapOp::DeleteService { tuple: *tuple }));
        let unclaimed = self.cluster_ips.iter().filter(|addr| !self.cluster_ip_uses.contains_key(addr));
        change.commit.extend(unclaimed.map(|addr| MapOp::DeleteClusterIp { addr: *addr }));
        for (index, bits) in &self.node_ports {
            let used = |bit: &u32| self.node_port_uses.contains_key(&((index * 64 + bit) as u16));
            let kept = (0..64).filter(used).fold(0, |word, bit| word | 1 << bit);
            if *bits & !kept != 0 {
                change.commit.push(MapOp::StoreNodePorts { index: *index, bits: bits & kept });
            }
        }
        // Whoever is in no slot is not known to serve, and a UDP flow must not wait for an endpoint that is gone.
        for (id, generation) in self.generations.iter().enumerate().filter(|(_, generation)| **generation != 0) {
            if !self.ids.endpoints.contains(id as u32) {
                let generation = generation.wrapping_add(1);
                change.commit.push(MapOp::StoreLive { endpoint_id: id as u32, generation });
            }
        }
        let ranges = self.stale_ranges.iter();
        change.commit.extend(ranges.map(|(port_id, net)| MapOp::DeleteSourceRange { port_id: *port_id, net: *net }));
        for (id, words) in &self.stale_ports {
            for word in PortWord::ALL.into_iter().filter(|word| word.get(words) != 0) {
                change.commit.push(MapOp::StorePort { port_id: *id, word, value: 0 });
            }
            change.retire.push(MapOp::DeleteName { port_id: *id });
            change.frees.push(Free::Port { id: *id });
        }
        change
    }

    /// Clears `FILTER` bits that nothing needs: neither the plan, nor one of the addresses that live flows use.
    ///
    /// A bit goes only when two sweeps in a row found it unneeded, because a flow may begin while the flows are read.
    pub fn rebuild(&mut self, live: impl Iterator<Item = IpAddr>) -> Vec<MapOp> {
        let mut needed = self.filter.scratch();
        for tuple in self.tuples.keys().filter(|tuple| !tuple.addr.is_unspecified()) {
            needed.set(&tuple.addr, filter::SERVICE);
        }
        self.cluster_ips.iter().for_each(|addr| needed.set(addr, filter::SERVICE));
        self.node_addrs.keys().for_each(|addr| needed.set(addr, filter::NODE));
        for held in self.ports.values() {
            held.endpoints.iter().for_each(|endpoint| needed.set(&endpoint.addr, filter::ENDPOINT));
        }
        live.for_each(|addr| needed.keep(&addr));
        self.filter.sweep(&needed)
    }

    /// Every Service of which the kernel holds something.
    pub fn services(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys()
    }

    /// How much room is left for ids and slots.
    pub fn room(&self) -> Room {
        self.ids.room()
    }

    /// Sizes of the maps.
    pub const fn capacities(&self) -> &Capacities {
        &self.capacities
    }

    /// Entries in use of every map that can be full. Walks through all addresses.
    pub fn uses(&self) -> Vec<(MapName, u64)> {
        let (room, sizes) = (self.ids.room(), &self.capacities);
        let taken = |map: MapName, room: u32| (map, u64::from(sizes.of(map).saturating_sub(room)));
        let mut uses = vec![
            taken(MapName::Ports, room.ports),
            taken(MapName::Live, room.endpoints),
            taken(MapName::SlotsV4, room.slots_v4),
            taken(MapName::SlotsV6, room.slots_v6),
        ];
        for family in IpFamily::ALL {
            let count =
                |addrs: &mut dyn Iterator<Item = IpAddr>| addrs.filter(|a| IpFamily::of(a) == family).count() as u64;
            uses.push((MapName::services(family), count(&mut self.tuples.keys().map(|tuple| tuple.addr))));
            uses.push((MapName::cluster_ips(family), count(&mut self.cluster_ips.iter().copied())));
            uses.push((MapName::node_addrs(family), count(&mut self.node_addrs.keys().copied())));
            let ranges = self.ports.values().filter(|held| held.family == family);
            uses.push((MapName::source_ranges(family), ranges.map(|held| held.source_ranges.len() as u64).sum()));
            uses.push((MapName::service_cidrs(family), count(&mut self.service_cidrs.iter().map(IpNet::addr))));
        }
        uses
    }

    /// True if the Service was brought to what was wanted at least once.
    pub fn is_installed(&self, service: &ObjectName) -> bool {
        self.services.get(service).is_some_and(|held| held.installed)
    }

    /// Prepare and commit of the change are done; what it frees waits for the grace period.
    pub fn finish(&mut self, change: &Change, desired: Option<&Desired>) {
        let name = match &change.subject {
            Subject::Service(name) => name,
            Subject::Leftovers => return self.stale_ports.clear(),
            Subject::Node | Subject::ServiceCidrs | Subject::SourcePorts => return,
        };
        let Some(held) = self.services.get_mut(name) else { return };
        for key in &held.ports {
            if let Some(port) = self.ports.get_mut(key) {
                port.finish(&change.frees);
                let id = port.id;
                port.addresses.retain(|tuple| self.tuples.get(tuple).is_some_and(|service| service.port_id == id));
                schedule(&mut self.deadlines, key, port, Duration::ZERO);
            }
        }
        for free in &change.frees {
            if let Free::Port { id } = free
                && let Some(key) = self.keys.remove(id)
            {
                self.ports.remove(&key);
                held.ports.remove(&key);
            }
        }
        if let Some(desired) = desired {
            held.installed = true;
            let unused: Vec<_> = held.cluster_ips.extract_if(.., |addr| !desired.cluster_ips.contains(addr)).collect();
            for addr in unused {
                self.release_cluster_ip(addr);
            }
        }
        if self.services.get(name).is_some_and(|held| held.ports.is_empty() && held.cluster_ips.is_empty()) {
            self.services.remove(name);
        }
    }

    /// A write of the Service's change failed: what it took and nobody can see is given back.
    pub fn abort(&mut self, service: &ObjectName, now: Duration) {
        let Some(held) = self.services.get_mut(service) else { return };
        let keys: Vec<_> = held.ports.iter().cloned().collect();
        for key in keys {
            let Some(port) = self.ports.get_mut(&key) else { continue };
            for free in port.abort() {
                free_now(&mut self.ids, free);
            }
            schedule(&mut self.deadlines, &key, port, now + RETRY);
            if port.is_unknown_to_the_kernel() {
                let id = port.id;
                self.ids.ports.release(id);
                self.keys.remove(&id);
                self.ports.remove(&key);
                if let Some(held) = self.services.get_mut(service) {
                    held.ports.remove(&key);
                }
            }
        }
    }

    /// The grace period is over and the retires are done: what they freed may be used again.
    pub fn release(&mut self, frees: &[Free]) {
        for free in frees {
            free_now(&mut self.ids, *free);
        }
    }

    fn change_port(&mut self, plan: &PortPlan, now: Duration, batch: &mut Batch) -> Result<(), DataplaneError> {
        let key = &plan.key;
        if !self.ports.contains_key(key) {
            let what = || format!("add {key} to");
            let id = self.ids.ports.allocate();
            let id = id.ok_or_else(|| DataplaneError::full(what(), MapName::Ports, &self.capacities))?;
            self.ports.insert(key.clone(), Held::new(id, key.family));
            self.keys.insert(id, key.clone());
            self.services.entry(key.service.clone()).or_default().ports.insert(key.clone());
        }
        let Some(held) = self.ports.get_mut(key) else { return Ok(()) };
        let id = held.id;
        let mine = |tuple: &Tuple| self.tuples.get(tuple).is_some_and(|service| service.port_id == id);
        let reachable = held.addresses.iter().any(mine);
        let (ids, generations, capacities) = (&mut self.ids, &self.generations[..], &self.capacities);
        held.change(plan, &mut Means { ids, generations, capacities, reachable, now }, batch)?;
        for tuple in held.addresses.iter().filter(|tuple| mine(tuple)) {
            if !plan.addresses.iter().any(|(wanted, _)| wanted == tuple) {
                batch.delete_service(*tuple);
            }
        }
        for (tuple, class) in &plan.addresses {
            let guarded = *class == Class::LoadBalancer && !plan.source_ranges.is_empty();
            let flags = if guarded { abi::Service::SOURCE_RANGES } else { 0 };
            let service = abi::Service { flags, ..abi::Service::new(id, *class) };
            if !tuple.addr.is_unspecified() {
                batch.filter(tuple.addr, filter::SERVICE);
            }
            if self.tuples.get(tuple) != Some(&service) {
                batch.puts.insert(*tuple, service);
            }
            if !held.addresses.contains(tuple) {
                held.addresses.push(*tuple);
            }
        }
        Ok(())
    }

    fn remove_port(&mut self, key: &PortKey, batch: &mut Batch) {
        let Some(held) = self.ports.get_mut(key) else { return };
        let mine = |tuple: &&Tuple| self.tuples.get(tuple).is_some_and(|service| service.port_id == held.id);
        held.addresses.iter().filter(mine).for_each(|tuple| batch.delete_service(*tuple));
        held.remove(&self.generations, batch);
    }

    fn change_cluster_ips(&mut self, desired: &Desired, batch: &mut Batch) {
        if desired.cluster_ips.is_empty() && !self.services.contains_key(&desired.service) {
            return;
        }
        let held = self.services.entry(desired.service.clone()).or_default();
        for addr in &desired.cluster_ips {
            batch.filter(*addr, filter::SERVICE);
            if !held.cluster_ips.contains(addr) {
                held.cluster_ips.push(*addr);
                *self.cluster_ip_uses.entry(*addr).or_default() += 1;
            }
            if !self.cluster_ips.contains(addr) {
                batch.visible.push(MapOp::PutClusterIp { addr: *addr });
            }
        }
        for addr in held.cluster_ips.iter().filter(|addr| !desired.cluster_ips.contains(addr)) {
            let last = self.cluster_ip_uses.get(addr) == Some(&1);
            if last && self.cluster_ips.contains(addr) {
                batch.removals.push(MapOp::DeleteClusterIp { addr: *addr });
            }
        }
    }

    fn release_cluster_ip(&mut self, addr: IpAddr) {
        if let Some(uses) = self.cluster_ip_uses.get_mut(&addr) {
            *uses -= 1;
            if *uses == 0 {
                self.cluster_ip_uses.remove(&addr);
            }
        }
    }

    /// Bits for the NodePorts that this change adds or takes away.
    fn change_node_ports(&self, batch: &mut Batch) {
        let mut uses: BTreeMap<u16, i64> = BTreeMap::new();
        for tuple in batch.puts.keys().filter(|tuple| tuple.addr.is_unspecified()) {
            *uses.entry(tuple.port).or_default() += i64::from(!self.tuples.contains_key(tuple));
        }
        for tuple in batch.deletes().filter(|tuple| tuple.addr.is_unspecified()) {
            *uses.entry(tuple.port).or_default() -= 1;
        }
        // Of an earlier change that went halfway.
        for port in &self.node_port_lags {
            uses.entry(*port).or_default();
        }
        let mut words: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for (port, change) in uses {
            let held = i64::from(self.node_port_uses.get(&port).copied().unwrap_or(0));
            let (index, bit) = (u32::from(port) / 64, 1 << (port % 64));
            let word = words.entry(index).or_default();
            if held + change > 0 { word.0 |= bit } else { word.1 |= bit }
        }
        for (index, (set, clear)) in words {
            let word = self.node_ports.get(&index).copied().unwrap_or(0);
            if word | set != word {
                batch.visible.push(MapOp::StoreNodePorts { index, bits: word | set });
            }
            if (word | set) & clear != 0 {
                batch.removals.push(MapOp::StoreNodePorts { index, bits: (word | set) & !clear });
            }
        }
    }
}

/// Notes when a port comes to rest, unless the ledger looks at it before that anyway.
fn schedule(deadlines: &mut BTreeSet<(Duration, PortKey)>, key: &PortKey, port: &mut Held, not_before: Duration) {
    let Some(at) = port.next_rest().map(|at| at.max(not_before)) else { return };
    if port.deadline.is_none_or(|deadline| at < deadline) {
        port.deadline = Some(at);
        deadlines.insert((at, key.clone()));
    }
}

fn free_now(ids: &mut Ids, free: Free) {
    match free {
        Free::Slots { family, base, len } => ids.slots(family).release(base, len),
        Free::Port { id } => ids.ports.release(id),
        Free::Endpoint { id } => ids.endpoints.release(id),
    }
}
