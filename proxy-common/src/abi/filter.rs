//! `FILTER`: 2^23 buckets of four bits by hash of an address, which say "certainly nothing of ours" in one array read.
//!
//! Traffic that is no Service's leaves after this look. A bucket may say yes for an address that only hashes alike;
//! it never says no for one of ours: the agent sets bits before it commits what needs them, and clears them only when
//! neither the plan nor a live flow holds the address.

use crate::Address;

/// Some address of this bucket is a Service address.
pub const SERVICE: u8 = 1;
/// Some address of this bucket is an endpoint's.
pub const ENDPOINT: u8 = 2;
/// Some address of this bucket is the node's own.
pub const NODE: u8 = 4;

/// No bucket holds it: the programs say by it that a process of the node sends to an endpoint's own address.
pub const DIRECT: u8 = 8;
/// No bucket holds it: the packet leaves. What is jumped to for either direction is told by it.
pub const OUT: u8 = 16;

/// No bucket holds it: a packet that leaves may go to an address of a ServiceCIDR that no Service has.
pub const UNALLOCATED: u8 = 32;

/// Every bit of a bucket.
pub const ALL: u8 = 15;

/// Words of 16 buckets in the array: 4 MB. With 10,000 Services of 20 endpoints each, one address in forty that is not
/// ours shares a bucket with one that is.
pub const WORDS: u32 = 524_288;

/// What a word says of the bucket at this shift.
#[inline(always)]
pub const fn bits(word: u64, shift: u32) -> u8 {
    (word >> shift) as u8 & ALL
}

/// An address' bucket: word index and shift within the word.
#[inline(always)]
pub fn bucket<A: Address>(addr: &A) -> (u32, u32) {
    let words = addr.words();
    // Odd 64-bit constants of the splitmix64 finaliser (Steele, Lea, Flood 2014): one multiply per half is enough to
    // spread addresses that differ in their last octets.
    let low = u64::from(words[0]) | u64::from(words[1]) << 32;
    let high = u64::from(words[2]) | u64::from(words[3]) << 32;
    let mixed = (low ^ high.wrapping_mul(0x94d0_49bb_1331_11eb)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (mixed >> 41) as u32;
    (hash >> 4, (hash & 15) * 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Addr4;

    #[test]
    fn a_hundred_thousand_neighbouring_addresses_spread_over_the_buckets() {
        let mut used = std::collections::HashSet::new();
        for i in 0..100_000u32 {
            let addr = Addr4 { octets: (0x0a60_0000 + i).to_be_bytes() };
            let (word, shift) = bucket(&addr);
            assert!(word < WORDS && shift < 64 && shift % 4 == 0);
            used.insert((word, shift));
        }
        // 2^23 buckets × (1 − e^(−100,000/2^23)) ≈ 99,406 distinct ones for a perfect hash.
        assert!(used.len() > 98_000, "only {} buckets used", used.len());
    }
}
