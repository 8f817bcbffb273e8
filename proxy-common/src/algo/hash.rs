//! The seeded hash that chooses an endpoint while a flow is half open.

use crate::{Address, Family, abi::FlowKey};

/// Hash of a request's tuple. Direction is left out: a tuple keeps its endpoint wherever it meets us.
#[inline(always)]
pub fn tuple<F: Family>(key: &FlowKey<F>, seed: u64) -> u32 {
    let (s, d) = (key.src.words(), key.dst.words());
    let mut h = seed;
    h = mix(h, u64::from(s[0]) | u64::from(d[0]) << 32);
    if F::IS_V6 {
        h = mix(h, u64::from(s[1]) | u64::from(d[1]) << 32);
        h = mix(h, u64::from(s[2]) | u64::from(d[2]) << 32);
        h = mix(h, u64::from(s[3]) | u64::from(d[3]) << 32);
    }
    h = mix(h, u64::from(key.sport) | u64::from(key.dport) << 16 | u64::from(key.proto) << 32);
    (h >> 32) as u32
}

/// Hash of an endpoint.
#[inline(always)]
pub fn endpoint<A: Address>(addr: &A, port: u16, proto: u8) -> u32 {
    let w = addr.words();
    let h = mix(0, u64::from(w[0]) | u64::from(w[1]) << 32);
    let h = mix(h, u64::from(w[2]) | u64::from(w[3]) << 32);
    (mix(h, u64::from(port) | u64::from(proto) << 16) >> 32) as u32
}

/// One round of the splitmix64 finaliser (Steele, Lea, Flood 2014).
#[inline(always)]
const fn mix(state: u64, word: u64) -> u64 {
    let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Maps a hash onto `0..len` without division; `len` of 0 gives 0.
#[inline(always)]
pub const fn index(hash: u32, len: u32) -> u32 {
    ((hash as u64 * len as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Addr4, V4, abi::Direction};

    fn key(sport: u16) -> FlowKey<V4> {
        let (src, dst) = (Addr4 { octets: [10, 0, 0, 1] }, Addr4 { octets: [10, 96, 0, 1] });
        FlowKey::new(src, sport, dst, 80, 6, Direction::In)
    }

    #[test]
    fn ports_spread_evenly_over_endpoints() {
        for len in [2u32, 3, 7, 100] {
            let mut hits = vec![0u32; len as usize];
            for sport in 1..=u16::MAX {
                hits[index(tuple(&key(sport), 42), len) as usize] += 1;
            }
            let expected = 65_535 / len;
            let slack = 6 * (f64::from(expected)).sqrt() as u32; // six standard deviations
            for (i, n) in hits.iter().enumerate() {
                assert!(n.abs_diff(expected) < slack, "endpoint {i} of {len} got {n}, expected {expected}±{slack}");
            }
        }
    }

    #[test]
    fn the_seed_changes_the_choice() {
        let moved = (1..=1000).filter(|p| index(tuple(&key(*p), 1), 16) != index(tuple(&key(*p), 2), 16)).count();
        assert!(moved > 850, "only {moved} of 1000 tuples moved");
    }

    proptest::proptest! {
        #[test]
        fn an_index_is_below_its_length(hash: u32, len in 1u32..=crate::abi::Run::MAX_LEN) {
            assert!(index(hash, len) < len);
        }
    }
}
