//! The two address families, as types: a step is written once and compiled for both.

use core::fmt::Debug;
use core::hash::Hash;

/// An IPv4 address, octets in network order.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr4 {
    /// The four octets as they stand in the header.
    pub octets: [u8; 4],
}

/// An IPv6 address, octets in network order.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialOrd, Ord)]
#[expect(clippy::derived_hash_with_manual_eq, reason = "both compare all octets; only the instructions differ")]
pub struct Addr6 {
    /// The sixteen octets as they stand in the header.
    pub octets: [u8; 16],
}

impl PartialEq for Addr6 {
    // Word by word: an array comparison becomes a memcmp call, which eBPF does not have.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == 0
    }
}

/// What the shared arithmetic needs of an address.
pub trait Address: Copy + Debug + Default + Eq + Hash + Ord + 'static {
    /// The address as 32-bit words in memory order; an IPv4 address fills the first.
    fn words(&self) -> [u32; 4];

    /// The address with these words.
    fn of_words(words: [u32; 4]) -> Self;

    /// A copy made word by word: octets that are moved as an array are moved one by one in eBPF.
    #[inline(always)]
    #[must_use]
    fn copied(&self) -> Self {
        Self::of_words(self.words())
    }
}

impl Address for Addr4 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        [u32::from_ne_bytes(self.octets), 0, 0, 0]
    }

    #[inline(always)]
    fn of_words(words: [u32; 4]) -> Self {
        Self { octets: words[0].to_ne_bytes() }
    }
}

impl Address for Addr6 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        // Four loads; sixteen byte loads and shifts if the octets were named one by one.
        let (words, _) = self.octets.as_chunks::<4>();
        [
            u32::from_ne_bytes(words[0]),
            u32::from_ne_bytes(words[1]),
            u32::from_ne_bytes(words[2]),
            u32::from_ne_bytes(words[3]),
        ]
    }

    #[inline(always)]
    fn of_words(words: [u32; 4]) -> Self {
        let mut addr = Self { octets: [0; 16] };
        let (chunks, _) = addr.octets.as_chunks_mut::<4>();
        chunks[0] = words[0].to_ne_bytes();
        chunks[1] = words[1].to_ne_bytes();
        chunks[2] = words[2].to_ne_bytes();
        chunks[3] = words[3].to_ne_bytes();
        addr
    }
}

impl From<core::net::Ipv4Addr> for Addr4 {
    fn from(addr: core::net::Ipv4Addr) -> Self {
        Self { octets: addr.octets() }
    }
}

impl From<core::net::Ipv6Addr> for Addr6 {
    fn from(addr: core::net::Ipv6Addr) -> Self {
        Self { octets: addr.octets() }
    }
}

impl From<Addr4> for core::net::IpAddr {
    fn from(addr: Addr4) -> Self {
        Self::from(addr.octets)
    }
}

impl From<Addr6> for core::net::IpAddr {
    fn from(addr: Addr6) -> Self {
        Self::from(addr.octets)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::V4 {}
    impl Sealed for super::V6 {}
}

/// An address family. Sealed: there are [`V4`] and [`V6`].
pub trait Family: sealed::Sealed + Copy + Debug + Eq + 'static {
    /// The family's address.
    type Addr: Address + Into<core::net::IpAddr>;
    /// Pad that brings a slot to a multiple of 8 bytes.
    type SlotPad: Copy + Debug + Default + Eq + 'static;
    /// The unspecified address, `0.0.0.0` or `::`.
    const UNSPECIFIED: Self::Addr;
    /// EtherType, host order.
    const ETHERTYPE: u16;
    /// `AF_INET` or `AF_INET6`, as `bpf_fib_lookup` wants it.
    const AF: u8;
    /// Length of the fixed IP header, bytes.
    const HEADER_LEN: u32;
    /// True for IPv6.
    const IS_V6: bool;
}

/// IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

impl Family for V4 {
    type Addr = Addr4;
    type SlotPad = u32;
    const UNSPECIFIED: Addr4 = Addr4 { octets: [0; 4] };
    const ETHERTYPE: u16 = 0x0800;
    const AF: u8 = 2;
    const HEADER_LEN: u32 = 20;
    const IS_V6: bool = false;
}

impl Family for V6 {
    type Addr = Addr6;
    type SlotPad = [u32; 0];
    const UNSPECIFIED: Addr6 = Addr6 { octets: [0; 16] };
    const ETHERTYPE: u16 = 0x86dd;
    const AF: u8 = 10;
    const HEADER_LEN: u32 = 40;
    const IS_V6: bool = true;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_network_order() {
        let v4 = Addr4::from(core::net::Ipv4Addr::new(10, 96, 0, 1));
        assert_eq!(v4.octets, [10, 96, 0, 1]);
        let v6: core::net::IpAddr = Addr6::from(core::net::Ipv6Addr::LOCALHOST).into();
        assert_eq!(v6.to_string(), "::1");
    }

    #[test]
    fn v6_equality_looks_at_every_word() {
        let base = Addr6 { octets: [7; 16] };
        for i in 0..16 {
            let mut other = base;
            other.octets[i] = 8;
            assert_ne!(base, other, "octet {i} was not compared");
        }
        assert_eq!(base, base);
    }
}
