//! What `FILTER` holds, and which of its bits may go.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use proxy_common::abi::filter;

use crate::dataplane::MapOp;
use crate::dataplane::render::filter_bucket;

/// The contents of `FILTER`: words that are not zero. As arrays they would be resident in whole, whatever is served,
/// since every page of them has some address' bits.
#[derive(Debug)]
pub(super) struct FilterBits {
    words: HashMap<u32, u64>,
    /// Bits that the last sweep found unneeded and nobody has asked for since.
    unneeded: HashMap<u32, u64>,
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
        let words = held.iter().filter(|(index, word)| **index < filter::WORDS && **word != 0);
        Self { words: words.map(|(index, word)| (*index, *word)).collect(), unneeded: HashMap::new() }
    }

    /// The stores that set these bits where they are not set.
    pub(super) fn stores_for(&self, wanted: &[(IpAddr, u8)]) -> Vec<MapOp> {
        let mut changed: BTreeMap<u32, u64> = BTreeMap::new();
        for (addr, bit) in wanted {
            let (index, shift) = filter_bucket(addr);
            let mask = u64::from(*bit) << shift;
            let held = word(&self.words, index);
            // A bit that a sweep is about to clear is stored again, which takes it off the sweep's list.
            if held & mask != mask || word(&self.unneeded, index) & mask != 0 {
                *changed.entry(index).or_insert(held) |= mask;
            }
        }
        changed.into_iter().map(|(index, buckets)| MapOp::StoreFilter { index, buckets }).collect()
    }

    /// A word was stored.
    pub(super) fn record(&mut self, index: u32, buckets: u64) {
        put(&mut self.words, index, buckets);
        self.unneeded.remove(&index);
    }

    /// An empty collection of needed bits.
    pub(super) fn scratch(&self) -> Needed {
        Needed { words: vec![0; filter::WORDS as usize] }
    }

    /// The stores that clear every bit which neither this sweep nor the last one needed.
    pub(super) fn sweep(&mut self, needed: &Needed) -> Vec<MapOp> {
        let mut cleared = BTreeMap::new();
        for (&index, &held) in &self.words {
            let idle = held & !needed.words[index as usize];
            let clear = idle & word(&self.unneeded, index);
            put(&mut self.unneeded, index, idle & !clear);
            if clear != 0 {
                cleared.insert(index, held & !clear);
            }
        }
        cleared.into_iter().map(|(index, buckets)| MapOp::StoreFilter { index, buckets }).collect()
    }
}

fn word(words: &HashMap<u32, u64>, index: u32) -> u64 {
    words.get(&index).copied().unwrap_or(0)
}

fn put(words: &mut HashMap<u32, u64>, index: u32, value: u64) {
    if value == 0 {
        words.remove(&index);
    } else {
        words.insert(index, value);
    }
}
