//! The maps: keys, values, names and default sizes. One file per family of maps.

pub mod affinity;
pub mod config;
pub mod device;
pub mod filter;
pub mod flow;
pub mod name;
pub mod range;
pub mod service;
pub mod slot;
pub mod stats;
pub mod tally;

pub use affinity::{Affinity, AffinityKey};
pub use config::Config;
pub use device::{Device, Role};
pub use flow::{Direction, Flow, FlowKey};
pub use name::Name;
pub use range::SourceRange;
pub use service::{Class, NodeAddr, Policy, Port, Run, RunVerdict, Service, ServiceKey};
pub use slot::{Live, Slot};
pub use stats::PortStats;
pub use tally::Tally;

/// Default sizes, for a 250-pod node in a cluster of up to 10,000 Services. Every one is a flag of `fairlead run`.
pub mod sizes {
    /// `SERVICES_V4/6`: one entry per address, port and protocol.
    pub const SERVICES: u32 = 65_536;
    /// `CLUSTER_IPS_V4/6`: one entry per ClusterIP.
    pub const CLUSTER_IPS: u32 = 65_536;
    /// `PORTS`, `PORT_STATS`, `NAMES`: one per Service port, protocol and family.
    pub const PORTS: u32 = 65_536;
    /// `SLOTS_V4/6`: cluster and local runs, the new and the old one while a change is under way.
    pub const SLOTS: u32 = 262_144;
    /// `LIVE`: one per port and endpoint.
    pub const LIVE: u32 = 262_144;
    /// `FLOWS_V4/6`: two entries per connection.
    pub const FLOWS: u32 = 262_144;
    /// `NEW_V4/6`: half-open flows.
    pub const NEW: u32 = 65_536;
    /// `NODE_ADDRS_V4/6`: addresses of this node.
    pub const NODE_ADDRS: u32 = 1_024;
    /// `AFFINITY_V4/6`: one entry per client and port; the oldest give way.
    pub const AFFINITY: u32 = 65_536;
    /// `SRC_RANGES_V4/6`: one entry per range and port.
    pub const SRC_RANGES: u32 = 65_536;
    /// `SVC_CIDRS_V4/6`.
    pub const SVC_CIDRS: u32 = 256;
    /// `FRAGS_V4/6`: datagrams whose later fragments may still come.
    pub const FRAGS: u32 = 4_096;
    /// `NODE_PORTS`: 65,536 bits in words of 64.
    pub const NODE_PORTS: u32 = 1_024;
    /// `DEVICES`: one per device that carries a program.
    pub const DEVICES: u32 = 4_096;
    /// `PROGRAMS`: slots of the tail-call array, see [`super::program`].
    pub const PROGRAMS: u32 = 16;
}

/// Slots of `PROGRAMS` and of `PROGRAMS_FLAT`, the pinned tail-call arrays that the stubs jump through.
pub mod program {
    /// tc ingress, of `PROGRAMS`.
    pub const INGRESS: u32 = 0;
    /// tc egress, of `PROGRAMS`.
    pub const EGRESS: u32 = 1;
    /// tc ingress, of `PROGRAMS_FLAT`.
    pub const INGRESS_FLAT: u32 = 2;
    /// tc egress, of `PROGRAMS_FLAT`.
    pub const EGRESS_FLAT: u32 = 3;
    /// An IPv4 packet on its way in with an address that may be ours.
    pub const INGRESS_V4: u32 = 4;
    /// The same of IPv6.
    pub const INGRESS_V6: u32 = 5;
    /// An IPv4 packet on its way out with an address that may be ours.
    pub const EGRESS_V4: u32 = 6;
    /// The same of IPv6.
    pub const EGRESS_V6: u32 = 7;
    /// An IPv4 request on its way out whose source is to be exchanged.
    pub const MASQUERADE_V4: u32 = 8;
    /// The same of IPv6.
    pub const MASQUERADE_V6: u32 = 9;
    /// ICMP of IPv4 that may be about a translated packet, either way.
    pub const ICMP_V4: u32 = 10;
    /// The same of IPv6.
    pub const ICMP_V6: u32 = 11;
    /// An IPv4 packet on its way in, when its source is what it will be: a reply may be told which way to leave.
    pub const MARK_V4: u32 = 12;
    /// The same of IPv6.
    pub const MARK_V6: u32 = 13;

    /// Names and slots of `PROGRAMS`, in the order in which a new build is switched in: what is jumped to before what
    /// jumps.
    pub const ALL: [(&str, u32); 12] = all(INGRESS, EGRESS);

    /// The same of `PROGRAMS_FLAT`.
    pub const ALL_FLAT: [(&str, u32); 12] = all(INGRESS_FLAT, EGRESS_FLAT);

    const fn all(ingress: u32, egress: u32) -> [(&'static str, u32); 12] {
        [
            ("mark_v4", MARK_V4),
            ("mark_v6", MARK_V6),
            ("icmp_v4", ICMP_V4),
            ("icmp_v6", ICMP_V6),
            ("masquerade_v4", MASQUERADE_V4),
            ("masquerade_v6", MASQUERADE_V6),
            ("ingress_v4", INGRESS_V4),
            ("ingress_v6", INGRESS_V6),
            ("egress_v4", EGRESS_V4),
            ("egress_v6", EGRESS_V6),
            ("ingress", ingress),
            ("egress", egress),
        ]
    }
}

/// What `ingress` tells `egress` in `skb->tc_index`. Ingress always overwrites it; it survives forwarding and
/// encapsulation (`include/linux/skbuff.h`), and takes no bit of `skb->mark` from anybody.
pub mod tc_index {
    /// Ingress left the packet alone.
    pub const NOT_OURS: u16 = 0;
    /// A request, translated: egress has nothing to do.
    pub const REQUEST: u16 = 1;
    /// A request whose source is still to be exchanged on the way out.
    pub const REQUEST_SNAT: u16 = 2;
    /// A reply, translated: egress has nothing to do.
    pub const REPLY: u16 = 3;
}
