//! The maps in memory: same semantics as the kernel's, plus injected faults and a watch over what readers may see.
//!
//! Serves tests, and dry runs that need no privilege.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proxy_common::abi::{self, Run};

use super::{Capacities, Dataplane, DataplaneError, Grace, MapOp, PortWord, Slot, Snapshot};
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
                if !self.maps.ports.contains_key(&service.port_id) {
                    self.violation(format!("{tuple} names port id {}, which was never written", service.port_id));
                }
                self.maps.services.insert(*tuple, *service);
            }
            MapOp::DeleteService { tuple } => {
                self.maps.services.remove(tuple);
            }
            MapOp::PutClusterIp { addr } => {
                self.maps.cluster_ips.insert(*addr);
            }
            MapOp::DeleteClusterIp { addr } => {
                self.maps.cluster_ips.remove(addr);
            }
            MapOp::StorePort { port_id, word, value } => self.store_port(*port_id, *word, *value),
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

    fn store_port(&mut self, port_id: u32, word: PortWord, value: u64) {
        let before = self.runs_of(port_id);
        let port = self.maps.ports.entry(port_id).or_insert(abi::Port::UNUSED);
        word.set(port, value);
        if *port == abi::Port::UNUSED && !self.maps.names.contains_key(&port_id) {
            self.maps.ports.remove(&port_id);
        }
        let Some(family) = self.maps.names.get(&port_id).map(|key| key.family) else {
            if value != 0 {
                self.violation(format!("port id {port_id} was written before its name"));
            }
            return;
        };
        // A slot that leaves the port's last run may still be read until the next grace period ends.
        let after = self.runs_of(port_id);
        let until = self.graces + 1;
        for run in before.iter().filter(|run| !after.contains(run)) {
            self.draining.extend((run.base()..run.base() + run.len()).map(|index| ((family, index), until)));
        }
        if word != PortWord::Policy {
            self.check_run(port_id, family, Run { word: value });
        }
    }

    fn runs_of(&self, port_id: u32) -> Vec<Run> {
        let port = self.maps.ports.get(&port_id).copied().unwrap_or(abi::Port::UNUSED);
        let runs = [port.cluster, port.local, port.cluster_settled, port.local_settled];
        runs.into_iter().filter(|run| !run.is_empty()).collect()
    }

    fn check_run(&mut self, port_id: u32, family: IpFamily, run: Run) {
        for index in run.base()..run.base() + run.len() {
            let owner = self.maps.slots(family).get(&index).map(|slot| slot.owner);
            if owner != Some(port_id) {
                self.violation(format!("port id {port_id} names slot {index} of {family}, whose owner is {owner:?}"));
            }
        }
    }

    fn put_slot(&mut self, index: u32, slot: &Slot) {
        let family = slot.family();
        let reached = self.maps.ports.iter().any(|(id, _)| {
            self.maps.names.get(id).is_some_and(|key| key.family == family)
                && self.runs_of(*id).iter().any(|run| (run.base()..run.base() + run.len()).contains(&index))
        });
        if reached {
            self.violation(format!("slot {index} of {family} was written while a run names it"));
        }
        if self.draining.contains_key(&(family, index)) {
            self.violation(format!("slot {index} of {family} was written before its grace period ended"));
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

    fn violation(&mut self, text: String) {
        self.violations.push(text);
    }
}
