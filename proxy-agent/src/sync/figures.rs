//! What the control plane counts, gathered when somebody asks: it may walk through everything that the kernel holds.

use super::{Dataplane, Sync};
use crate::dataplane::{MapName, MapUse};
use crate::index::ObjectCount;
use crate::model::{Families, IpFamily};

/// The control plane in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Changes that wrote something and succeeded.
    pub changes_done: u64,
    /// Changes that failed, each attempt of them.
    pub changes_failed: u64,
    /// Services and EndpointSlices that came, changed or went.
    pub seen: ObjectCount,
    /// Those of them that the kernel has not been told of yet.
    pub pending: ObjectCount,
    /// Writes to maps.
    pub writes: u64,
    /// Services and EndpointSlices that the sources have told of.
    pub objects: [usize; 2],
    /// Services that are wholly served.
    pub served: usize,
    /// Services of which something is not served, by name in the log.
    pub partly_served: usize,
    /// Services (and node addresses) whose last change failed.
    pub failed: usize,
    /// Maps that can be full.
    pub maps: Vec<MapUse>,
}

impl<D: Dataplane> Sync<D> {
    /// How things stand.
    pub fn figures(&self) -> Figures {
        let (services, slices) = self.index.counts();
        let (_, failed) = self.board.counts();
        let partly_served = self.board.partly_unserved();
        let served = self.index.service_names().filter(|name| self.board.is_done(name)).count();
        let uses = self.ledger.uses();
        let capacity = |map: MapName| u64::from(self.ledger.capacities().of(map));
        let maps = uses.into_iter().filter(|(map, _)| self.ipv6 || map.families() != Families::one(IpFamily::V6));
        Figures {
            changes_done: self.tally.done,
            changes_failed: self.tally.failed,
            seen: self.tally.seen,
            pending: self.changed.objects,
            writes: self.tally.writes,
            objects: [services, slices],
            served: served.saturating_sub(partly_served),
            partly_served,
            failed,
            maps: maps.map(|(map, entries)| MapUse { map: map.as_str(), entries, capacity: capacity(map) }).collect(),
        }
    }
}
