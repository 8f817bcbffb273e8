//! The maps in memory: same semantics as the kernel's, plus injected faults and a watch over what readers may see.
//!
//! Serves tests, and dry runs that need no privilege.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use proxy_common::abi;

use super::{Capacities, Dataplane, DataplaneError, Grace, MapOp, Slot, Snapshot};
use crate::model::IpFamily;

/// Decides for each write whether it fails.
type Faults = Box<dyn FnMut(&MapOp) -> bool + Send>;

/// The maps in memory. Clones share their contents.
#[derive(Clone, Default)]
pub struct MemoryDataplane {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    maps: Snapshot,
    faults: Option<Faults>,
    /// Grace periods asked for so far.
    graces: u64,
    /// Slots that left a run, with the grace period that must end before anybody writes them.
    draining: HashMap<(IpFamily, u32), u64>,
    /// Grace periods that have ended: all up to and including this one.
    ended: u64,
    writes: u64,
    violations: Vec<String>,
}

impl MemoryDataplane {
    /// Empty maps of these sizes.
    pub fn new(capacities: Capacities) -> Self {
        let memory = Self::default();
        memory.lock().maps.capacities = capacities;
        memory
    }

    /// Lets `faults` decide which writes fail from now on.
    pub fn inject(&self, faults: impl FnMut(&MapOp) -> bool + Send + 'static) {
        self.lock().faults = Some(Box::new(faults));
    }

    /// Ends all injected faults.
    pub fn heal(&self) {
        self.lock().faults = None;
    }

    /// The contents now.
    pub fn snapshot(&self) -> Snapshot {
        self.lock().maps.clone()
    }

    /// Number of writes so far, failed ones included.
    pub fn writes(&self) -> u64 {
        self.lock().writes
    }

    /// What a packet could have tripped over so far: each is a bug of the planner.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for MemoryDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDataplane").field("maps", &self.lock().maps).finish_non_exhaustive()
    }
}

impl Dataplane for MemoryDataplane {
    fn dump(&mut self) -> Result<Snapshot, DataplaneError> {
        Ok(self.snapshot())
    }

    fn write(&mut self, op: &MapOp) -> Result<(), DataplaneError> {
        let mut shared = self.lock();
        shared.writes += 1;
        if shared.faults.as_mut().is_some_and(|faults| faults(op)) {
            return Err(DataplaneError::failed("write to", op.map(), "injected fault"));
        }
        shared.write(op)
    }

    fn grace(&mut self) -> Grace {
        let mut shared = self.lock();
        shared.graces += 1;
        let (number, shared) = (shared.graces, Arc::clone(&self.shared));
        Box::new(move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.ended = shared.ended.max(number);
            let ended = shared.ended;
            shared.draining.retain(|_, until| *until > ended);
            Ok(())
        })
    }
}

impl Shared {
    fn write(&mut self, op: &MapOp) -> Result<(), DataplaneError> {
        self.check_room(op)?;
        match op {
            MapOp::PutService { tuple, service } => {
                if !self.maps.names.contains_key(&service.port_id) {
                    self.violations.push(format!("{tuple} leads to port id {}, which has no name", service.port_id));
                }
                let before = self.maps.services.get(tuple).map(|service| service.port_id);
                self.watching(before.into_iter().chain([service.port_id]), |maps| {
                    maps.services.insert(*tuple, *service);
                });
                self.check_guards(service.port_id);
            }
            MapOp::DeleteService { tuple } => {
                let before = self.maps.services.get(tuple).map(|service| service.port_id);
                self.watching(before, |maps| {
                    maps.services.remove(tuple);
                });
            }
            MapOp::PutClusterIp { addr } => {
                self.maps.cluster_ips.insert(*addr);
            }
            MapOp::DeleteClusterIp { addr } => {
                self.maps.cluster_ips.remove(addr);
            }
            MapOp::StorePort { port_id, word, value } => self.watching([*port_id], |maps| {
                let port = maps.ports.entry(*port_id).or_insert(abi::Port::UNUSED);
                word.set(port, *value);
                if *port == abi::Port::UNUSED {
                    maps.ports.remove(port_id);
                }
            }),
            MapOp::PutSlot { index, slot } => self.put_slot(*index, slot),
            MapOp::StoreLive { endpoint_id, generation } => {
                self.maps.live.insert(*endpoint_id, *generation);
            }
            MapOp::PutName { port_id, key } => {
                self.maps.names.insert(*port_id, key.clone());
            }
            MapOp::DeleteName { port_id } => {
                self.maps.names.remove(port_id);
            }
            MapOp::StoreNodePorts { index, bits: 0 } => {
                self.maps.node_ports.remove(index);
            }
            MapOp::StoreNodePorts { index, bits } => {
                self.maps.node_ports.insert(*index, *bits);
            }
            MapOp::StoreFilter { index, buckets: 0 } => {
                self.maps.filter.remove(index);
            }
            MapOp::StoreFilter { index, buckets } => {
                self.maps.filter.insert(*index, *buckets);
            }
            MapOp::PutNodeAddr { addr, flags } => {
                self.maps.node_addrs.insert(*addr, *flags);
            }
            MapOp::DeleteNodeAddr { addr } => {
                self.maps.node_addrs.remove(addr);
            }
            MapOp::PutSourceRange { port_id, net } => {
                self.maps.source_ranges.insert((*port_id, *net));
            }
            MapOp::DeleteSourceRange { port_id, net } => {
                self.maps.source_ranges.remove(&(*port_id, *net));
                self.check_guards(*port_id);
            }
            MapOp::PutServiceCidr { net } => {
                self.maps.service_cidrs.insert(*net);
            }
            MapOp::DeleteServiceCidr { net } => {
                self.maps.service_cidrs.remove(net);
            }
        }
        Ok(())
    }

    fn check_room(&self, op: &MapOp) -> Result<(), DataplaneError> {
        let maps = &self.maps;
        let (used, key) = match op {
            MapOp::PutService { tuple, .. } if !maps.services.contains_key(tuple) => {
                let used = maps.services.keys().filter(|held| held.family() == tuple.family()).count();
                (used, tuple.to_string())
            }
            MapOp::PutClusterIp { addr } if !maps.cluster_ips.contains(addr) => {
                let used = maps.cluster_ips.iter().filter(|held| IpFamily::of(held) == IpFamily::of(addr)).count();
                (used, addr.to_string())
            }
            MapOp::PutNodeAddr { addr, .. } if !maps.node_addrs.contains_key(addr) => {
                let used = maps.node_addrs.keys().filter(|held| IpFamily::of(held) == IpFamily::of(addr)).count();
                (used, addr.to_string())
            }
            MapOp::PutSourceRange { port_id, net } if !maps.source_ranges.contains(&(*port_id, *net)) => {
                let of_family = |held: &&(u32, IpNet)| held.1.addr().is_ipv4() == net.addr().is_ipv4();
                (maps.source_ranges.iter().filter(of_family).count(), net.to_string())
            }
            MapOp::PutServiceCidr { net } if !maps.service_cidrs.contains(net) => {
                let of_family = |held: &&IpNet| held.addr().is_ipv4() == net.addr().is_ipv4();
                (maps.service_cidrs.iter().filter(of_family).count(), net.to_string())
            }
            MapOp::StorePort { port_id: index, .. } | MapOp::PutName { port_id: index, .. } => {
                (*index as usize, format!("entry {index}"))
            }
            MapOp::PutSlot { index, .. } => (*index as usize, format!("entry {index}")),
            MapOp::StoreLive { endpoint_id, .. } => (*endpoint_id as usize, format!("entry {endpoint_id}")),
            _ => return Ok(()),
        };
        if used < maps.capacities.of(op.map()) as usize {
            return Ok(());
        }
        Err(DataplaneError::full(format!("add {key} to"), op.map(), &maps.capacities))
    }

    /// An address that asks for source ranges must find some, or it lets nobody in.
    fn check_guards(&mut self, port_id: u32) {
        let asks =
            |service: &abi::Service| service.port_id == port_id && service.flags & abi::Service::SOURCE_RANGES != 0;
        if self.maps.services.values().any(asks) && self.maps.ranges_of(port_id).next().is_none() {
            self.violations.push(format!("port id {port_id} asks for source ranges and has none"));
        }
    }

    /// Makes a change to what leads to these ports, or to their words, and notes which slots it puts out of reach: a
    /// packet may still be reading them until the next grace period ends.
    fn watching(&mut self, ports: impl IntoIterator<Item = u32>, change: impl FnOnce(&mut Snapshot)) {
        let ports: Vec<_> = ports.into_iter().map(|id| (id, self.reachable(id))).collect();
        change(&mut self.maps);
        for (id, before) in ports {
            let Some(family) = self.maps.names.get(&id).map(|key| key.family) else { continue };
            let (after, until) = (self.reachable(id), self.graces + 1);
            self.draining.extend(before.difference(&after).map(|index| ((family, *index), until)));
            for index in after.difference(&before) {
                let owner = self.maps.slots(family).get(index).map(|slot| slot.owner);
                if owner != Some(id) {
                    let text = format!("port id {id} names slot {index} of {family}, whose owner is {owner:?}");
                    self.violations.push(text);
                }
            }
        }
    }

    /// Slots that a packet can reach through a port.
    fn reachable(&self, port_id: u32) -> BTreeSet<u32> {
        if !self.maps.services.values().any(|service| service.port_id == port_id) {
            return BTreeSet::new();
        }
        let port = self.maps.ports.get(&port_id).copied().unwrap_or(abi::Port::UNUSED);
        let runs = [port.cluster, port.local, port.cluster_settled, port.local_settled];
        runs.into_iter().flat_map(|run| run.base()..run.base() + run.len()).collect()
    }

    fn put_slot(&mut self, index: u32, slot: &Slot) {
        let family = slot.family();
        let of_family = self.maps.names.iter().filter(|(_, key)| key.family == family);
        if let Some((id, key)) = of_family.into_iter().find(|(id, _)| self.reachable(**id).contains(&index)) {
            let text = format!("slot {index} of {family} was written while {key} (id {id}) names it");
            self.violations.push(text);
        }
        if self.draining.contains_key(&(family, index)) {
            self.violations.push(format!("slot {index} of {family} was written before its grace period ended"));
        }
        let slots = match family {
            IpFamily::V4 => &mut self.maps.slots_v4,
            IpFamily::V6 => &mut self.maps.slots_v6,
        };
        if slot.owner == Slot::NO_OWNER {
            slots.remove(&index);
        } else {
            slots.insert(index, *slot);
        }
    }
}
