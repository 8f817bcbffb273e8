//! Ids that stay: of ports, of endpoints, and runs of contiguous slots.
//!
//! What is given back is used again as late as possible: a flow or a slow reader may still hold the number.

use std::collections::BTreeMap;

use crate::dataplane::Capacities;
use crate::model::IpFamily;

/// Every number that the planner gives out.
#[derive(Clone, Debug)]
pub struct Ids {
    /// Indices into `PORTS`.
    pub ports: IdPool,
    /// Indices into `LIVE`.
    pub endpoints: IdPool,
    slots_v4: SlotPool,
    slots_v6: SlotPool,
}

impl Ids {
    /// Nothing given out yet.
    pub fn new(capacities: &Capacities) -> Self {
        Self {
            ports: IdPool::new(capacities.ports),
            endpoints: IdPool::new(capacities.live),
            slots_v4: SlotPool::new(capacities.slots),
            slots_v6: SlotPool::new(if capacities.ipv6 { capacities.slots } else { 0 }),
        }
    }

    /// How much is left.
    pub fn room(&self) -> Room {
        Room {
            ports: self.ports.room(),
            endpoints: self.endpoints.room(),
            slots_v4: self.slots_v4.room(),
            slots_v6: self.slots_v6.room(),
        }
    }

    /// Slots of a family.
    pub const fn slots(&mut self, family: IpFamily) -> &mut SlotPool {
        match family {
            IpFamily::V4 => &mut self.slots_v4,
            IpFamily::V6 => &mut self.slots_v6,
        }
    }
}

/// How much is left of everything that the planner gives out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Port ids.
    pub ports: u32,
    /// Endpoint ids.
    pub endpoints: u32,
    /// Slots of IPv4, in one piece or many.
    pub slots_v4: u32,
    /// Slots of IPv6.
    pub slots_v6: u32,
}

/// Numbers from 1 to a limit. 0 is never given out: a flow that belongs to no endpoint or port carries it.
#[derive(Clone, Debug)]
pub struct IdPool {
    /// One bit per id that is in use.
    used: Vec<u64>,
    limit: u32,
    /// Where the search goes on, so that an id rests for a whole round after its release.
    cursor: u32,
}

impl IdPool {
    /// Ids below `limit`.
    pub fn new(limit: u32) -> Self {
        let mut pool = Self { used: vec![0; limit.div_ceil(64) as usize], limit, cursor: 1 };
        pool.reserve(0);
        pool
    }

    /// An id that nobody uses; `None` if there is none left.
    pub fn allocate(&mut self) -> Option<u32> {
        let id = self.free_in(self.cursor, self.limit).or_else(|| self.free_in(0, self.cursor))?;
        self.reserve(id);
        self.cursor = id + 1;
        Some(id)
    }

    fn free_in(&self, from: u32, to: u32) -> Option<u32> {
        let mut id = from;
        while id < to {
            let word = self.used[(id / 64) as usize] >> (id % 64);
            let skip = word.trailing_ones();
            if skip < 64 - id % 64 {
                return Some(id + skip).filter(|id| *id < to);
            }
            id += 64 - id % 64;
        }
        None
    }

    /// Takes an id that the kernel already uses. False if it is beyond the limit or taken.
    pub fn reserve(&mut self, id: u32) -> bool {
        let free = id < self.limit && !self.contains(id);
        if free {
            self.used[(id / 64) as usize] |= 1 << (id % 64);
        }
        free
    }

    /// Gives an id back.
    pub fn release(&mut self, id: u32) {
        debug_assert!(self.contains(id), "id {id} was released twice");
        self.used[(id / 64) as usize] &= !(1 << (id % 64));
    }

    /// True if the id is in use.
    pub fn contains(&self, id: u32) -> bool {
        self.used.get((id / 64) as usize).is_some_and(|word| word >> (id % 64) & 1 != 0)
    }

    /// Number of ids that nobody uses.
    pub fn room(&self) -> u32 {
        self.limit - self.used.iter().map(|word| word.count_ones()).sum::<u32>()
    }

    /// The next allocation looks behind this id first.
    pub fn resume_after(&mut self, id: u32) {
        self.cursor = id.saturating_add(1).min(self.limit);
    }
}

/// Contiguous runs of slots: first fit, neighbours grow together again.
#[derive(Clone, Debug)]
pub struct SlotPool {
    /// Free extents: first slot → length. No two touch.
    free: BTreeMap<u32, u32>,
}

impl SlotPool {
    /// Slots `0..limit`, all free.
    pub fn new(limit: u32) -> Self {
        Self { free: [(0, limit)].into_iter().filter(|(_, len)| *len > 0).collect() }
    }

    /// The first `len` slots in a row that nobody uses. `len` of 0 needs none.
    pub fn allocate(&mut self, len: u32) -> Option<u32> {
        if len == 0 {
            return Some(0);
        }
        let (base, room) = self.free.iter().find(|(_, room)| **room >= len).map(|(base, room)| (*base, *room))?;
        self.free.remove(&base);
        if room > len {
            self.free.insert(base + len, room - len);
        }
        Some(base)
    }

    /// Takes slots that the kernel already uses. False, and nothing taken, if any of them is beyond the limit or taken.
    pub fn reserve(&mut self, base: u32, len: u32) -> bool {
        if len == 0 {
            return true;
        }
        let Some((start, room)) = self.free.range(..=base).next_back().map(|(start, room)| (*start, *room)) else {
            return false;
        };
        let (end, wanted) = (u64::from(start) + u64::from(room), u64::from(base) + u64::from(len));
        if wanted > end {
            return false;
        }
        self.free.remove(&start);
        if base > start {
            self.free.insert(start, base - start);
        }
        if end > wanted {
            self.free.insert(base + len, (end - wanted) as u32);
        }
        true
    }

    /// Gives slots back.
    pub fn release(&mut self, base: u32, len: u32) {
        if len == 0 {
            return;
        }
        let (mut base, mut len) = (base, len);
        let before = self.free.range(..base + len).next_back().map(|(start, room)| (*start, *room));
        if let Some((start, room)) = before {
            debug_assert!(start + room <= base, "slots {base}+{len} were released twice");
            if start + room == base {
                self.free.remove(&start);
                (base, len) = (start, room + len);
            }
        }
        if let Some(room) = self.free.remove(&(base + len)) {
            len += room;
        }
        self.free.insert(base, len);
    }

    /// Number of free slots, in one piece or many.
    pub fn room(&self) -> u32 {
        self.free.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_rests_for_a_round_before_it_is_used_again() {
        let mut pool = IdPool::new(5);
        assert_eq!([pool.allocate(), pool.allocate()], [Some(1), Some(2)]);
        pool.release(1);
        assert_eq!([pool.allocate(), pool.allocate(), pool.allocate()], [Some(3), Some(4), Some(1)]);
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn zero_and_reserved_ids_are_never_given_out() {
        let mut pool = IdPool::new(200);
        assert!(pool.reserve(70) && !pool.reserve(70) && !pool.reserve(200));
        let ids: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(ids.len(), 198);
        assert!(!ids.contains(&0) && !ids.contains(&70));
    }

    #[test]
    fn free_neighbours_grow_together() {
        let mut pool = SlotPool::new(30);
        assert_eq!([pool.allocate(10), pool.allocate(10), pool.allocate(10)], [Some(0), Some(10), Some(20)]);
        assert_eq!(pool.allocate(1), None);
        for base in [0, 20, 10] {
            pool.release(base, 10);
        }
        assert_eq!(pool.allocate(30), Some(0));
    }

    proptest! {
        /// Against a plain list of taken slots.
        #[test]
        fn runs_never_overlap_and_nothing_is_lost(steps in proptest::collection::vec((0u8..4, 0u32..40, 1u32..12), 1..80)) {
            let mut pool = SlotPool::new(64);
            let mut taken = [false; 64];
            let mut runs = Vec::new();
            for (what, base, len) in steps {
                match what {
                    0 if !runs.is_empty() => {
                        let (base, len) = runs.swap_remove(base as usize % runs.len());
                        pool.release(base, len);
                        taken[base as usize..(base + len) as usize].fill(false);
                    }
                    1 => {
                        let free = taken.get(base as usize..(base + len) as usize).is_some_and(|s| s.iter().all(|t| !t));
                        prop_assert_eq!(pool.reserve(base, len), free);
                        if free {
                            taken[base as usize..(base + len) as usize].fill(true);
                            runs.push((base, len));
                        }
                    }
                    _ => {
                        let fits = taken.windows(len as usize).any(|w| w.iter().all(|t| !t));
                        let got = pool.allocate(len);
                        prop_assert_eq!(got.is_some(), fits);
                        if let Some(base) = got {
                            let slots = &mut taken[base as usize..(base + len) as usize];
                            prop_assert!(slots.iter().all(|t| !t));
                            slots.fill(true);
                            runs.push((base, len));
                        }
                    }
                }
                prop_assert_eq!(pool.room() as usize, taken.iter().filter(|t| !**t).count());
            }
        }
    }
}
