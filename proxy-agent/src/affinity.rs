//! `AFFINITY_V4/6`: the clients that keep an endpoint. Programs write the entries, this reads them and removes those that
//! no program would follow any more.

use std::io;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::{HashMap, IterableMap, Map, MapData, MapError};
use proxy_common::abi::{Affinity, AffinityKey, Port};
use proxy_common::{Family, V4, V6};

use crate::dataplane::bpf::live_generation;
use crate::dataplane::bpf::mmap::MappedArray;
use crate::dataplane::pin::PinRoot;
use crate::dataplane::{MapUse, PortWord, sys};
use crate::flows::FlowsError;

/// What an entry is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The port's timeout; 0 if it has no affinity, or is no port any more.
    pub timeout_secs: u32,
    /// `LIVE`'s generation of the endpoint.
    pub generation: u32,
}

/// True if the client's next connection is balanced anew: its time is over (rule 79), the endpoint has gone in between
/// (rule 81), or nobody asks for affinity any more (rule 84). So whoever has the port id next inherits no client.
pub fn is_over(entry: &Affinity, facts: Facts, now_secs: u32) -> bool {
    (facts.timeout_secs == 0 && !mutant!("rule-84-sweep"))
        || now_secs.saturating_sub(entry.last_new_secs) >= facts.timeout_secs
            && facts.timeout_secs != 0
            && !mutant!("rule-79-sweep")
        || (entry.endpoint_gen != facts.generation && !mutant!("rule-81-sweep"))
}

/// The table of a family.
#[derive(Debug)]
pub struct Clients<F: Family> {
    map: HashMap<MapData, AffinityKey<F>, Affinity>,
    name: &'static str,
}

impl<F: Family> Clients<F>
where
    F::Addr: Pod,
{
    fn open(pins: &PinRoot, name: &'static str) -> Result<Self, FlowsError> {
        let open = || HashMap::try_from(Map::LruHashMap(MapData::from_pin(pins.map(name))?));
        Ok(Self { map: open().map_err(|source| FlowsError { op: "open", map: name, source })?, name })
    }

    /// Calls `each` with every entry.
    pub fn for_each(&self, each: impl FnMut(&AffinityKey<F>, &Affinity)) -> Result<(), FlowsError> {
        let zero = (
            AffinityKey { client: F::UNSPECIFIED, port_id: 0 },
            Affinity { endpoint_id: 0, endpoint_gen: 0, index: 0, last_new_secs: 0 },
        );
        sys::for_each_in_hash(self.map.map().fd().as_fd(), zero, each).map_err(|e| FlowsError {
            op: "read",
            map: self.name,
            source: MapError::IoError(e),
        })
    }

    fn get(&self, key: &AffinityKey<F>) -> Result<Option<Affinity>, FlowsError> {
        match self.map.get(key, 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(FlowsError { op: "look into", map: self.name, source }),
        }
    }

    fn remove(&mut self, key: &AffinityKey<F>) -> Result<(), FlowsError> {
        match self.map.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(FlowsError { op: "remove from", map: self.name, source }),
        }
    }

    fn sweep(&mut self, world: &mut World, now_secs: u32) -> Result<Swept, FlowsError> {
        let (mut over, mut failed, mut entries) = (Vec::new(), None, 0);
        self.for_each(|key, entry| {
            entries += 1;
            match world.facts(key.port_id, entry.endpoint_id) {
                Ok(facts) if is_over(entry, facts, now_secs) => over.push(*key),
                Ok(_) => {}
                Err(error) => failed = Some(error),
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let mut removed = 0;
        for key in &over {
            // A new connection may have begun since.
            let Some(entry) = self.get(key)? else { continue };
            if is_over(&entry, world.facts(key.port_id, entry.endpoint_id)?, now_secs) {
                self.remove(key)?;
                removed += 1;
            }
        }
        let capacity = self.map.map().info().map_or(0, |info| info.max_entries().into());
        Ok(Swept { used: MapUse { map: self.name, entries: entries - removed, capacity }, removed })
    }
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swept {
    /// How full the table is.
    pub used: MapUse,
    /// Entries removed.
    pub removed: u64,
}

/// The arrays in which the facts stand.
#[derive(Debug)]
struct World {
    ports: MappedArray,
    live: MappedArray,
}

impl World {
    fn open(pins: &PinRoot) -> Result<Self, FlowsError> {
        let array = |map| {
            let data = MapData::from_pin(pins.map(map)).map_err(|source| FlowsError { op: "open", map, source })?;
            let failed = |e| FlowsError { op: "open", map, source: MapError::IoError(e) };
            MappedArray::new(&data, false).map_err(failed)
        };
        Ok(Self { ports: array("PORTS")?, live: array("LIVE")? })
    }

    fn facts(&mut self, port_id: u32, endpoint_id: u32) -> Result<Facts, FlowsError> {
        let reading = |map| move |e| FlowsError { op: "read", map, source: MapError::IoError(e) };
        let mut port = Port::UNUSED;
        if port_id < self.ports.entries() {
            let word = self.ports.load(port_id, PortWord::Policy.index()).map_err(reading("PORTS"))?;
            PortWord::Policy.set(&mut port, word);
        }
        let timeout_secs = port.policy.affinity_secs();
        let known = endpoint_id < self.live.entries();
        let word = if known { self.live.load(endpoint_id, 0).map_err(reading("LIVE"))? } else { 0 };
        Ok(Facts { timeout_secs, generation: live_generation(word) })
    }
}

/// The tables of both families.
#[derive(Debug)]
pub struct AffinityMaps {
    /// IPv4.
    pub v4: Clients<V4>,
    /// IPv6.
    pub v6: Clients<V6>,
    world: World,
}

impl AffinityMaps {
    /// Opens the pinned tables.
    pub fn open(pins: &PinRoot) -> Result<Self, FlowsError> {
        let (v4, v6) = (Clients::open(pins, "AFFINITY_V4")?, Clients::open(pins, "AFFINITY_V6")?);
        Ok(Self { v4, v6, world: World::open(pins)? })
    }

    /// Removes what nobody would follow.
    pub fn sweep(&mut self, now_secs: u32) -> Result<[Swept; 2], FlowsError> {
        Ok([self.v4.sweep(&mut self.world, now_secs)?, self.v6.sweep(&mut self.world, now_secs)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: Affinity = Affinity { endpoint_id: 1, endpoint_gen: 7, index: 0, last_new_secs: 100 };
    const FACTS: Facts = Facts { timeout_secs: 60, generation: 7 };

    #[test]
    fn rule_79_the_time_begins_with_the_last_new_connection() {
        assert!(!is_over(&ENTRY, FACTS, 159));
        assert!(is_over(&ENTRY, FACTS, 160), "as the programs count");
        assert!(!is_over(&ENTRY, FACTS, 99), "a clock that is behind a packet");
    }

    #[test]
    fn rule_81_an_endpoint_that_comes_back_has_lost_its_clients() {
        assert!(is_over(&ENTRY, Facts { generation: 8, ..FACTS }, 100));
    }

    #[test]
    fn rule_84_without_affinity_nobody_keeps_anything() {
        assert!(is_over(&ENTRY, Facts { timeout_secs: 0, ..FACTS }, 100));
    }
}
