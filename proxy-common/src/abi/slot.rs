//! `SLOTS_V4/6` and `LIVE`: the endpoints.

use crate::{Family, abi_struct};

abi_struct! {
    /// Value of `SLOTS_V4/6`: one endpoint of one run. Written before the run that names it, reused only after every
    /// reader of that run has finished.
    pub struct Slot<F>: V4 = 24, V6 = 32 {
        /// Endpoint address.
        addr: F::Addr,
        /// Endpoint port, host order.
        port: u16,
        /// Bits of this type.
        flags: u16,
        /// Index into `LIVE`.
        endpoint_id: u32,
        /// `LIVE`'s generation when the slot was written; a flow remembers it.
        endpoint_gen: u32,
        /// The port id this slot belongs to: a late reader that finds another one reloads the run.
        owner: u32,
        /// Zero on IPv4, absent on IPv6: arrays are mmap-ed with a stride of 8.
        _pad: F::SlotPad,
    }
}

impl<F: Family> Slot<F> {
    /// The endpoint is on this node.
    pub const LOCAL: u16 = 1;
    /// The endpoint is serving but terminating (rule 52).
    pub const TERMINATING: u16 = 2;
    /// Owner of a slot that no port uses.
    pub const NO_OWNER: u32 = u32::MAX;
}

abi_struct! {
    /// Value of `LIVE`, by endpoint id. A UDP flow whose remembered generation differs has lost its endpoint.
    pub struct Live: 8 {
        /// Moves when the endpoint is removed or stops serving (rule 105); never when it merely leaves a run.
        generation: u32,
        /// Zero.
        _pad: u32,
    }
}
