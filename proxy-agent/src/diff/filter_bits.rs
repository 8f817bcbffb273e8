//! What `FILTER` holds, and which of its bits may go.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proxy_common::abi::filter;

use crate::dataplane::MapOp;
use crate::dataplane::render::filter_bucket;

/// The contents of `FILTER`.
#[derive(Debug)]
pub(super) struct FilterBits {
    words: Vec<u64>,
    /// Bits that the last sweep found unneeded and nobody has asked for since.
    unneeded: Vec<u64>,
}

/// Bits that are needed, while they are collected.
#[derive(Debug)]
pub(super) struct Needed {
    words: Vec<u64>,
}

impl Needed {
    /// This bit of the address is needed.
    pub(super) fn set(&mut self, addr: &IpAddr, bit: u8) {
        let (word, shift) = filter_bucket(addr);
        self.words[word as usize] |= u64::from(bit) << shift;
    }

    /// Whatever bits the address has are needed.
    pub(super) fn keep(&mut self, addr: &IpAddr) {
        self.set(addr, filter::ALL);
    }
}

impl FilterBits {
    /// As the kernel holds it.
    pub(super) fn new(held: &BTreeMap<u32, u64>) -> Self {
        let mut words = vec![0; filter::WORDS as usize];
        for (index, buckets) in held {
            if let Some(word) = words.get_mut(*index as usize) {
                *word = *buckets;
            }
        }
        Self { words, unneeded: vec![0; filter::WORDS as usize] }
    }

    /// The stores that set these bits where they are not set.
    pub(super) fn stores_for(&self, wanted: &[(IpAddr, u8)]) -> Vec<MapOp> {
        let mut changed: BTreeMap<u32, u64> = BTreeMap::new();
        for (addr, bit) in wanted {
            let (index, shift) = filter_bucket(addr);
            let mask = u64::from(*bit) << shift;
            let held = self.words[index as usize];
            // A bit that a sweep is about to clear is stored again, which takes it off the sweep's list.
            if held & mask != mask || self.unneeded[index as usize] & mask != 0 {
                *changed.entry(index).or_insert(held) |= mask;
            }
        }
        changed.into_iter().map(|(index, buckets)| MapOp::StoreFilter { index, buckets }).collect()
    }

    /// A word was stored.
    pub(super) fn record(&mut self, index: u32, buckets: u64) {
        self.words[index as usize] = buckets;
        self.unneeded[index as usize] = 0;
    }

    /// An empty collection of needed bits.
    pub(super) fn scratch(&self) -> Needed {
        Needed { words: vec![0; self.words.len()] }
    }

    /// The stores that clear every bit which neither this sweep nor the last one needed.
    pub(super) fn sweep(&mut self, needed: &Needed) -> Vec<MapOp> {
        let mut ops = Vec::new();
        for (index, needed) in needed.words.iter().enumerate() {
            let idle = self.words[index] & !needed;
            let clear = idle & self.unneeded[index];
            self.unneeded[index] = idle & !clear;
            if clear != 0 {
                ops.push(MapOp::StoreFilter { index: index as u32, buckets: self.words[index] & !clear });
            }
        }
        ops
    }
}
