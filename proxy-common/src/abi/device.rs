//! `DEVICES`: what the agent knows of each device that carries a program.

use crate::{Addr4, Addr6, abi_struct};

/// How a device is wired; decides which programs it gets.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Carries an address of the node and routes beyond it.
    Uplink = 1,
    /// The host's end of a pod's veth, routed.
    Pod = 2,
    /// The host's end of a pod's veth, a port of a bridge.
    BridgePort = 3,
    /// A bridge that is the CNI's: its ports carry the programs, it does not.
    Bridge = 4,
    /// The inner device of an overlay.
    Tunnel = 5,
    /// `lo`: processes of the node meet the node's own addresses there.
    Loopback = 6,
}

abi_struct! {
    /// Value of `DEVICES`, by ifindex. Read when a flow begins; of established ones for those of a pod with itself, and for
    /// replies with `--reply-mark`.
    pub struct Device: 48 {
        /// A [`Role`].
        role: u8,
        /// Bits of this type.
        flags: u8,
        /// The device's own MAC; zero without Ethernet.
        mac: [u8; 6],
        /// The master's ifindex, 0 without one.
        master: u32,
        /// The master's MAC.
        master_mac: [u8; 6],
        /// Zero.
        _pad: u16,
        /// Preferred source address on this device: of masquerade, and of requests of the node's own.
        source_v4: Addr4,
        /// The same for IPv6.
        source_v6: Addr6,
        /// Bits of `skb->mark` that lead replies out by here, if requests came in here; 0: none (`--reply-mark`).
        reply_mark: u32,
        /// The device's own ifindex, so that a value says whose it is.
        ifindex: u32,
    }
}

impl Device {
    /// What arrives here comes from pods of this node, as `--detect-local-mode` says (rule 71).
    pub const PODS: u8 = 1;
    /// Other programs stand at its hooks: they are to see both directions of what a pod sends to itself.
    pub const FOREIGN: u8 = 2;
}
