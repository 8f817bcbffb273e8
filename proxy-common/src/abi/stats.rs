//! `STATS` (by outcome code, u64 per CPU) and `PORT_STATS` (by port id, per CPU).

use crate::abi_struct;

abi_struct! {
    /// Value of `PORT_STATS`, per CPU.
    pub struct PortStats: 16 {
        /// Flows begun.
        new_flows: u64,
        /// Packets rejected or dropped.
        refused: u64,
    }
}
