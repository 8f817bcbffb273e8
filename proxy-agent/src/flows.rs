//! The flow tables `FLOWS_V4/6` and `NEW_V4/6`, as user space reads and prunes them.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::{HashMap, IterableMap, Map, MapData, MapError};
use proxy_common::abi::{Direction, Flow, FlowKey};
use proxy_common::{Family, V4, V6};

use crate::dataplane::pin::PinRoot;
use crate::dataplane::{MapUse, sys};

/// A table that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {map}: {source}")]
pub struct FlowsError {
    /// What was tried.
    pub op: &'static str,
    /// On which map.
    pub map: &'static str,
    /// Why not.
    pub source: MapError,
}

/// The two tables of a family.
#[derive(Debug)]
pub struct FamilyFlows<F: Family> {
    flows: HashMap<MapData, FlowKey<F>, Flow<F>>,
    new: HashMap<MapData, FlowKey<F>, Flow<F>>,
    names: [&'static str; 2],
}

/// Which table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Confirmed flows.
    Flows,
    /// Half-open flows.
    New,
}

impl<F: Family> FamilyFlows<F>
where
    F::Addr: Pod,
{
    fn open(pins: &PinRoot, names: [&'static str; 2]) -> Result<Self, FlowsError> {
        let data = |map| MapData::from_pin(pins.map(map)).map_err(|source| FlowsError { op: "open", map, source });
        let typed = |map, result: Result<_, MapError>| result.map_err(|source| FlowsError { op: "open", map, source });
        Ok(Self {
            flows: typed(names[0], HashMap::try_from(Map::HashMap(data(names[0])?)))?,
            new: typed(names[1], HashMap::try_from(Map::LruHashMap(data(names[1])?)))?,
            names,
        })
    }

    /// Calls `each` with every entry of a table.
    pub fn for_each(&self, table: Table, each: impl FnMut(&FlowKey<F>, &Flow<F>)) -> Result<(), FlowsError> {
        let (map, name) = match table {
            Table::Flows => (&self.flows, self.names[0]),
            Table::New => (&self.new, self.names[1]),
        };
        let key = FlowKey::new(F::UNSPECIFIED, 0, F::UNSPECIFIED, 0, 0, Direction::In);
        sys::for_each_in_hash(map.map().fd().as_fd(), (key, Flow::EMPTY), each).map_err(|e| FlowsError {
            op: "read",
            map: name,
            source: MapError::IoError(e),
        })
    }

    /// A confirmed entry.
    pub fn get(&self, key: &FlowKey<F>) -> Result<Option<Flow<F>>, FlowsError> {
        match self.flows.get(key, 0) {
            Ok(flow) => Ok(Some(flow)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(FlowsError { op: "look into", map: self.names[0], source }),
        }
    }

    /// Removes a confirmed entry; false if there was none.
    pub fn remove(&mut self, key: &FlowKey<F>) -> Result<bool, FlowsError> {
        match self.flows.remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(FlowsError { op: "remove from", map: self.names[0], source }),
        }
    }

    /// Both tables as full as they were counted.
    pub fn uses(&self, flows: u64, half_open: u64) -> [MapUse; 2] {
        let capacity = |map: &MapData| map.info().map_or(0, |info| info.max_entries().into());
        let of = |map, entries, data| MapUse { map, entries, capacity: capacity(data) };
        [of(self.names[0], flows, self.flows.map()), of(self.names[1], half_open, self.new.map())]
    }

    /// Entries that the table of confirmed flows has room for.
    pub fn capacity(&self) -> u32 {
        self.flows.map().info().map_or(0, |info| info.max_entries())
    }
}

/// The tables of both families.
#[derive(Debug)]
pub struct FlowMaps {
    /// IPv4.
    pub v4: FamilyFlows<V4>,
    /// IPv6.
    pub v6: FamilyFlows<V6>,
}

impl FlowMaps {
    /// Opens the pinned tables.
    pub fn open(pins: &PinRoot) -> Result<Self, FlowsError> {
        Ok(Self {
            v4: FamilyFlows::open(pins, ["FLOWS_V4", "NEW_V4"])?,
            v6: FamilyFlows::open(pins, ["FLOWS_V6", "NEW_V6"])?,
        })
    }
}

/// The Service's (or, of a direct flow, the endpoint's) address and the endpoint's that an entry of either half names.
pub fn addresses<F: Family>(key: &FlowKey<F>, flow: &Flow<F>) -> [IpAddr; 2] {
    if flow.flags & Flow::<F>::REPLY != 0 {
        [flow.src.into(), key.src.into()]
    } else {
        [key.dst.into(), flow.dst.into()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy_common::Addr4;

    fn addr(last: u8) -> Addr4 {
        Addr4 { octets: [10, 0, 0, last] }
    }

    #[test]
    fn both_halves_name_the_same_addresses() {
        let (client, service, endpoint) = (addr(1), addr(9), addr(2));
        let owner_key = FlowKey::<V4>::new(client, 40_000, service, 80, 6, Direction::In);
        let owner = Flow { src: client, dst: endpoint, sport: 40_000, dport: 8080, ..Flow::EMPTY };
        let reply_key = owner.partner_key(&owner_key);
        let reply =
            Flow { src: service, dst: client, sport: 80, dport: 40_000, flags: Flow::<V4>::REPLY, ..Flow::EMPTY };
        let expected = [IpAddr::from([10, 0, 0, 9]), IpAddr::from([10, 0, 0, 2])];
        assert_eq!(addresses(&owner_key, &owner), expected);
        assert_eq!(addresses(&reply_key, &reply), expected);
    }
}
