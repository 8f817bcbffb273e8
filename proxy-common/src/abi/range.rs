//! `SRC_RANGES_V4/6` and `SVC_CIDRS_V4/6`: longest-prefix maps. A key is a `u32` prefix length in bits, then this data.

use crate::abi_struct;

abi_struct! {
    /// Data of a key of `SRC_RANGES_V4/6`: the prefix covers the port id whole, then the network.
    pub struct SourceRange<F>: V4 = 8, V6 = 20 {
        /// The Service port.
        port_id: u32,
        /// `spec.loadBalancerSourceRanges`.
        addr: F::Addr,
    }
}

/// Bits of the port id, which every prefix of `SRC_RANGES_V4/6` begins with.
pub const PORT_ID_BITS: u32 = 32;
