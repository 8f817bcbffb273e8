//! What the control plane asks of the kernel: typed map operations as values, and the trait that carries them out.
//!
//! The planner yields [`Change`]s. Each is applied in this order: every `prepare`, then every `commit`; after one grace
//! period (every reader that may have seen the old state has finished) every `retire`. Only then may slots and ids be
//! used again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi;

use crate::model::{Families, IpFamily, ObjectName, PortKey, Protocol};

pub mod attach;
pub(crate) mod attempts;
pub mod bpf;
pub mod load;
pub mod memory;
mod names;
pub mod pin;
pub mod probe;
pub mod render;
pub mod settings;
pub mod sys;

/// A map that the agent writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each variant is the map of that name, described in proxy-common")]
pub enum MapName {
    ServicesV4,
    ServicesV6,
    ClusterIpsV4,
    ClusterIpsV6,
    Ports,
    SlotsV4,
    SlotsV6,
    Live,
    Names,
    Filter,
    NodePorts,
    NodeAddrsV4,
    NodeAddrsV6,
    SrcRangesV4,
    SrcRangesV6,
    SvcCidrsV4,
    SvcCidrsV6,
}

impl MapName {
    /// The name that `bpftool` shows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ServicesV4 => "SERVICES_V4",
            Self::ServicesV6 => "SERVICES_V6",
            Self::ClusterIpsV4 => "CLUSTER_IPS_V4",
            Self::ClusterIpsV6 => "CLUSTER_IPS_V6",
            Self::Ports => "PORTS",
            Self::SlotsV4 => "SLOTS_V4",
            Self::SlotsV6 => "SLOTS_V6",
            Self::Live => "LIVE",
            Self::Names => "NAMES",
            Self::Filter => "FILTER",
            Self::NodePorts => "NODE_PORTS",
            Self::NodeAddrsV4 => "NODE_ADDRS_V4",
            Self::NodeAddrsV6 => "NODE_ADDRS_V6",
            Self::SrcRangesV4 => "SRC_RANGES_V4",
            Self::SrcRangesV6 => "SRC_RANGES_V6",
            Self::SvcCidrsV4 => "SVC_CIDRS_V4",
            Self::SvcCidrsV6 => "SVC_CIDRS_V6",
        }
    }

    /// The flag of `fairlead run` that sizes it; `None` where the size is fixed.
    pub const fn size_flag(self) -> Option<&'static str> {
        match self {
            Self::ServicesV4 | Self::ServicesV6 => Some("--max-services"),
            Self::ClusterIpsV4 | Self::ClusterIpsV6 => Some("--max-cluster-ips"),
            Self::Ports | Self::Names => Some("--max-ports"),
            Self::SlotsV4 | Self::SlotsV6 => Some("--max-slots"),
            Self::Live => Some("--max-endpoints"),
            Self::NodeAddrsV4 | Self::NodeAddrsV6 => Some("--max-node-addrs"),
            Self::SrcRangesV4 | Self::SrcRangesV6 => Some("--max-source-ranges"),
            Self::Filter | Self::NodePorts | Self::SvcCidrsV4 | Self::SvcCidrsV6 => None,
        }
    }

    /// The families whose packets it is read for.
    pub const fn families(self) -> Families {
        match self {
            Self::ServicesV4 | Self::ClusterIpsV4 | Self::SlotsV4 => Families::one(IpFamily::V4),
            Self::NodeAddrsV4 | Self::SrcRangesV4 | Self::SvcCidrsV4 => Families::one(IpFamily::V4),
            Self::ServicesV6 | Self::ClusterIpsV6 | Self::SlotsV6 => Families::one(IpFamily::V6),
            Self::NodeAddrsV6 | Self::SrcRangesV6 | Self::SvcCidrsV6 => Families::one(IpFamily::V6),
            Self::Ports | Self::Live | Self::Names | Self::Filter | Self::NodePorts => Families::BOTH,
        }
    }

    /// `SERVICES_V4` or `SERVICES_V6`.
    pub const fn services(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::ServicesV4,
            IpFamily::V6 => Self::ServicesV6,
        }
    }

    /// `CLUSTER_IPS_V4` or `CLUSTER_IPS_V6`.
    pub const fn cluster_ips(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::ClusterIpsV4,
            IpFamily::V6 => Self::ClusterIpsV6,
        }
    }

    /// `SLOTS_V4` or `SLOTS_V6`.
    pub const fn slots(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::SlotsV4,
            IpFamily::V6 => Self::SlotsV6,
        }
    }

    /// `NODE_ADDRS_V4` or `NODE_ADDRS_V6`.
    pub const fn node_addrs(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::NodeAddrsV4,
            IpFamily::V6 => Self::NodeAddrsV6,
        }
    }

    /// `SRC_RANGES_V4` or `SRC_RANGES_V6`.
    pub const fn source_ranges(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::SrcRangesV4,
            IpFamily::V6 => Self::SrcRangesV6,
        }
    }

    /// `SVC_CIDRS_V4` or `SVC_CIDRS_V6`.
    pub const fn service_cidrs(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::SvcCidrsV4,
            IpFamily::V6 => Self::SvcCidrsV6,
        }
    }
}

impl fmt::Display for MapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Key of `SERVICES_V4/6`: an address, port and protocol. A NodePort stands under the unspecified address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Service address.
    pub addr: IpAddr,
    /// Service port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl Tuple {
    /// The family whose map holds it.
    pub const fn family(&self) -> IpFamily {
        IpFamily::of(&self.addr)
    }

    /// The NodePort of a family.
    pub const fn node_port(family: IpFamily, port: u16, protocol: Protocol) -> Self {
        Self { addr: family.unspecified(), port, protocol }
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.addr.is_unspecified() {
            return write!(f, "{} NodePort {}/{}", self.family(), self.port, self.protocol);
        }
        write!(f, "{}/{}", std::net::SocketAddr::new(self.addr, self.port), self.protocol)
    }
}

/// A value of `SLOTS_V4/6`; the address says which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Endpoint address.
    pub addr: IpAddr,
    /// Endpoint port.
    pub port: u16,
    /// Bits of `abi::Slot`.
    pub flags: u16,
    /// Index into `LIVE`.
    pub endpoint_id: u32,
    /// `LIVE`'s generation when the slot was written.
    pub endpoint_gen: u32,
    /// The port id it belongs to; [`Slot::NO_OWNER`] if it is unused.
    pub owner: u32,
}

impl Slot {
    /// Owner of a slot that no port uses.
    pub const NO_OWNER: u32 = abi::Slot::<proxy_common::V4>::NO_OWNER;
    /// The endpoint is on this node.
    pub const LOCAL: u16 = abi::Slot::<proxy_common::V4>::LOCAL;
    /// The endpoint is serving but terminating.
    pub const TERMINATING: u16 = abi::Slot::<proxy_common::V4>::TERMINATING;

    /// A slot that no port uses.
    pub const fn unused(family: IpFamily) -> Self {
        Self { addr: family.unspecified(), port: 0, flags: 0, endpoint_id: 0, endpoint_gen: 0, owner: Self::NO_OWNER }
    }

    /// The family whose map holds it.
    pub const fn family(&self) -> IpFamily {
        IpFamily::of(&self.addr)
    }
}

/// One word of a `PORTS` value. Each is written by a single aligned 64-bit store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each variant is the field of abi::Port of that name")]
pub enum PortWord {
    Cluster,
    Local,
    ClusterSettled,
    LocalSettled,
    Policy,
}

impl PortWord {
    /// Every word, in the order of `abi::Port`.
    pub const ALL: [Self; 5] = [Self::Cluster, Self::Local, Self::ClusterSettled, Self::LocalSettled, Self::Policy];

    /// Index of the 64-bit word within `abi::Port`.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Reads the word.
    pub const fn get(self, port: &abi::Port) -> u64 {
        match self {
            Self::Cluster => port.cluster.word,
            Self::Local => port.local.word,
            Self::ClusterSettled => port.cluster_settled.word,
            Self::LocalSettled => port.local_settled.word,
            Self::Policy => port.policy.word,
        }
    }

    /// Writes the word.
    pub const fn set(self, port: &mut abi::Port, word: u64) {
        match self {
            Self::Cluster => port.cluster.word = word,
            Self::Local => port.local.word = word,
            Self::ClusterSettled => port.cluster_settled.word = word,
            Self::LocalSettled => port.local_settled.word = word,
            Self::Policy => port.policy.word = word,
        }
    }
}

/// One write to one map. `Put` inserts or replaces a key, `Delete` of a key that is not there succeeds, `Store` is one
/// aligned 64-bit store into an array with release ordering: readers see them in the order in which they were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// `SERVICES_V4/6[tuple] = service`.
    PutService {
        /// Key.
        tuple: Tuple,
        /// Value.
        service: abi::Service,
    },
    /// Removes a key of `SERVICES_V4/6`.
    DeleteService {
        /// Key.
        tuple: Tuple,
    },
    /// Adds a key to `CLUSTER_IPS_V4/6`.
    PutClusterIp {
        /// Key.
        addr: IpAddr,
    },
    /// Removes a key of `CLUSTER_IPS_V4/6`.
    DeleteClusterIp {
        /// Key.
        addr: IpAddr,
    },
    /// Stores one word of `PORTS[port_id]`.
    StorePort {
        /// Index.
        port_id: u32,
        /// Which word.
        word: PortWord,
        /// Its value.
        value: u64,
    },
    /// `SLOTS_V4/6[index] = slot`. Several words: never done to a slot that a reader can reach.
    PutSlot {
        /// Index.
        index: u32,
        /// Value.
        slot: Slot,
    },
    /// Stores `LIVE[endpoint_id].generation`.
    StoreLive {
        /// Index.
        endpoint_id: u32,
        /// Value.
        generation: u32,
    },
    /// `NAMES[port_id] = key`.
    PutName {
        /// Key.
        port_id: u32,
        /// Value.
        key: PortKey,
    },
    /// Removes a key of `NAMES`.
    DeleteName {
        /// Key.
        port_id: u32,
    },
    /// Stores 64 bits of `NODE_PORTS`.
    StoreNodePorts {
        /// Index: port / 64.
        index: u32,
        /// Bit `port % 64` is set if the NodePort exists.
        bits: u64,
    },
    /// Stores sixteen buckets of `FILTER`.
    StoreFilter {
        /// Index.
        index: u32,
        /// Sixteen buckets of four bits.
        buckets: u64,
    },
    /// `NODE_ADDRS_V4/6[addr] = flags`.
    PutNodeAddr {
        /// Key.
        addr: IpAddr,
        /// Bits of `abi::NodeAddr`.
        flags: u32,
    },
    /// Removes a key of `NODE_ADDRS_V4/6`.
    DeleteNodeAddr {
        /// Key.
        addr: IpAddr,
    },
    /// Adds a key to `SRC_RANGES_V4/6`.
    PutSourceRange {
        /// First part of the key.
        port_id: u32,
        /// The rest.
        net: IpNet,
    },
    /// Removes a key of `SRC_RANGES_V4/6`.
    DeleteSourceRange {
        /// First part of the key.
        port_id: u32,
        /// The rest.
        net: IpNet,
    },
    /// Adds a key to `SVC_CIDRS_V4/6`.
    PutServiceCidr {
        /// Key.
        net: IpNet,
    },
    /// Removes a key of `SVC_CIDRS_V4/6`.
    DeleteServiceCidr {
        /// Key.
        net: IpNet,
    },
}

impl MapOp {
    /// The map it writes.
    pub const fn map(&self) -> MapName {
        match self {
            Self::PutService { tuple, .. } | Self::DeleteService { tuple } => MapName::services(tuple.family()),
            Self::PutClusterIp { addr } | Self::DeleteClusterIp { addr } => MapName::cluster_ips(IpFamily::of(addr)),
            Self::StorePort { .. } => MapName::Ports,
            Self::PutSlot { slot, .. } => MapName::slots(slot.family()),
            Self::StoreLive { .. } => MapName::Live,
            Self::PutName { .. } | Self::DeleteName { .. } => MapName::Names,
            Self::StoreNodePorts { .. } => MapName::NodePorts,
            Self::StoreFilter { .. } => MapName::Filter,
            Self::PutNodeAddr { addr, .. } | Self::DeleteNodeAddr { addr } => MapName::node_addrs(IpFamily::of(addr)),
            Self::PutSourceRange { net, .. } | Self::DeleteSourceRange { net, .. } => {
                MapName::source_ranges(family_of(net))
            }
            Self::PutServiceCidr { net } | Self::DeleteServiceCidr { net } => MapName::service_cidrs(family_of(net)),
        }
    }
}

/// The family of a network. `IpNet::addr` is no constant function.
const fn family_of(net: &IpNet) -> IpFamily {
    match net {
        IpNet::V4(_) => IpFamily::V4,
        IpNet::V6(_) => IpFamily::V6,
    }
}

/// Whose change it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// A Service.
    Service(ObjectName),
    /// The node's own addresses.
    Node,
    /// The networks that ClusterIPs come from.
    ServiceCidrs,
    /// The source ports of masquerade.
    SourcePorts,
    /// What an earlier agent left behind and nobody claims.
    Leftovers,
}

impl Subject {
    /// The Service, if it is one.
    pub fn into_service(self) -> Option<ObjectName> {
        match self {
            Self::Service(name) => Some(name),
            Self::Node | Self::ServiceCidrs | Self::SourcePorts | Self::Leftovers => None,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Node => f.write_str("node addresses"),
            Self::ServiceCidrs => f.write_str("ServiceCIDRs"),
            Self::SourcePorts => f.write_str("source ports of masquerade"),
            Self::Leftovers => f.write_str("leftovers"),
        }
    }
}

/// Something that may be used again once a grace period has passed and the change's `retire` is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Free {
    /// Slots `base..base + len`.
    Slots {
        /// Which of the two maps.
        family: IpFamily,
        /// First slot.
        base: u32,
        /// Number of slots.
        len: u32,
    },
    /// A port id.
    Port {
        /// The id.
        id: u32,
    },
    /// An endpoint id.
    Endpoint {
        /// The id.
        id: u32,
    },
}

/// The writes that bring one subject from what the kernel holds to what is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Whose.
    pub subject: Subject,
    /// What no packet can see yet, then what is new: any of these may fail for want of room.
    pub prepare: Vec<MapOp>,
    /// The switch: stores, and removal of keys.
    pub commit: Vec<MapOp>,
    /// After the grace period.
    pub retire: Vec<MapOp>,
    /// What `retire` sets free.
    pub frees: Vec<Free>,
}

impl Change {
    /// A change of nothing.
    pub const fn new(subject: Subject) -> Self {
        Self { subject, prepare: Vec::new(), commit: Vec::new(), retire: Vec::new(), frees: Vec::new() }
    }

    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.prepare.is_empty() && self.commit.is_empty() && self.retire.is_empty() && self.frees.is_empty()
    }
}

/// How many entries each map has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// `SERVICES_V4`, `SERVICES_V6`, each.
    pub services: u32,
    /// `CLUSTER_IPS_V4`, `CLUSTER_IPS_V6`, each.
    pub cluster_ips: u32,
    /// `PORTS` and `NAMES`.
    pub ports: u32,
    /// `SLOTS_V4`, `SLOTS_V6`, each.
    pub slots: u32,
    /// `LIVE`.
    pub live: u32,
    /// `NODE_ADDRS_V4`, `NODE_ADDRS_V6`, each.
    pub node_addrs: u32,
    /// `SRC_RANGES_V4`, `SRC_RANGES_V6`, each.
    pub source_ranges: u32,
    /// False where the kernel has no IPv6, so that there are no maps for it (rule 97).
    pub ipv6: bool,
}

impl Default for Capacities {
    fn default() -> Self {
        use abi::sizes;
        Self {
            services: sizes::SERVICES,
            cluster_ips: sizes::CLUSTER_IPS,
            ports: sizes::PORTS,
            slots: sizes::SLOTS,
            live: sizes::LIVE,
            node_addrs: sizes::NODE_ADDRS,
            source_ranges: sizes::SRC_RANGES,
            ipv6: true,
        }
    }
}

impl Capacities {
    /// Number of entries of one map.
    pub const fn of(&self, map: MapName) -> u32 {
        match map {
            MapName::ServicesV4 | MapName::ServicesV6 => self.services,
            MapName::ClusterIpsV4 | MapName::ClusterIpsV6 => self.cluster_ips,
            MapName::Ports | MapName::Names => self.ports,
            MapName::SlotsV4 | MapName::SlotsV6 => self.slots,
            MapName::Live => self.live,
            MapName::Filter => abi::filter::WORDS,
            MapName::NodePorts => abi::sizes::NODE_PORTS,
            MapName::NodeAddrsV4 | MapName::NodeAddrsV6 => self.node_addrs,
            MapName::SrcRangesV4 | MapName::SrcRangesV6 => self.source_ranges,
            MapName::SvcCidrsV4 | MapName::SvcCidrsV6 => abi::sizes::SVC_CIDRS,
        }
    }
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapUse {
    /// Which.
    pub map: &'static str,
    /// Entries in use.
    pub entries: u64,
    /// Entries that fit.
    pub capacity: u64,
}

/// The maps' contents as plain values: what a restart starts from, and what is rendered for people.
///
/// Array entries that were never written need not be listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Sizes.
    pub capacities: Capacities,
    /// `SERVICES_V4/6`.
    pub services: BTreeMap<Tuple, abi::Service>,
    /// `CLUSTER_IPS_V4/6`.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// `PORTS`; at least every entry that has a name.
    pub ports: BTreeMap<u32, abi::Port>,
    /// `SLOTS_V4`; every slot with an owner.
    pub slots_v4: BTreeMap<u32, Slot>,
    /// `SLOTS_V6`; every slot with an owner.
    pub slots_v6: BTreeMap<u32, Slot>,
    /// `LIVE`: generations that are not zero.
    pub live: BTreeMap<u32, u32>,
    /// `NAMES`, without values that name no port.
    pub names: BTreeMap<u32, PortKey>,
    /// `NODE_PORTS`: words that are not zero.
    pub node_ports: BTreeMap<u32, u64>,
    /// `FILTER`: words that are not zero.
    pub filter: BTreeMap<u32, u64>,
    /// `NODE_ADDRS_V4/6`.
    pub node_addrs: BTreeMap<IpAddr, u32>,
    /// `SRC_RANGES_V4/6`.
    pub source_ranges: BTreeSet<(u32, IpNet)>,
    /// `SVC_CIDRS_V4/6`.
    pub service_cidrs: BTreeSet<IpNet>,
}

impl Snapshot {
    /// The source ranges of a port.
    pub fn ranges_of(&self, port_id: u32) -> impl Iterator<Item = &IpNet> {
        let lowest = |id| (id, IpNet::V4(ipnet::Ipv4Net::default()));
        self.source_ranges.range(lowest(port_id)..lowest(port_id.saturating_add(1))).map(|(_, net)| net)
    }

    /// The slots of a family.
    pub const fn slots(&self, family: IpFamily) -> &BTreeMap<u32, Slot> {
        match family {
            IpFamily::V4 => &self.slots_v4,
            IpFamily::V6 => &self.slots_v6,
        }
    }
}

/// Waits until every reader that may have seen what was there before has finished. May block for tens of milliseconds,
/// so it is handed out to run beside later changes, which do not wait for it.
pub type Grace = Box<dyn FnOnce() -> Result<(), DataplaneError> + Send>;

/// The maps.
pub trait Dataplane {
    /// Reads everything the maps hold.
    fn dump(&mut self) -> Result<Snapshot, DataplaneError>;

    /// Carries out one write. An error means that it had no effect.
    fn write(&mut self, op: &MapOp) -> Result<(), DataplaneError>;

    /// A grace period that begins now.
    fn grace(&mut self) -> Grace;
}

/// A write or read that failed: what was tried, on which map, and why.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {map}: {kind}")]
pub struct DataplaneError {
    /// What was tried, as a verb: "add 10.96.0.1:80/TCP to".
    pub op: String,
    /// On which map.
    pub map: MapName,
    /// Why not.
    #[source]
    pub kind: FailureKind,
}

/// Why a write failed.
#[derive(Debug, thiserror::Error)]
pub enum FailureKind {
    /// No room.
    #[error("it is full ({capacity} entries){}", hint(*flag))]
    Full {
        /// Its size.
        capacity: u32,
        /// The flag that sizes it.
        flag: Option<&'static str>,
    },
    /// Anything else.
    #[error("{0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn hint(flag: Option<&str>) -> String {
    flag.map(|flag| format!("; give {flag} a larger number and restart")).unwrap_or_default()
}

impl DataplaneError {
    /// `map` has no room for what `op` wanted to add.
    pub fn full(op: impl Into<String>, map: MapName, capacities: &Capacities) -> Self {
        let kind = FailureKind::Full { capacity: capacities.of(map), flag: map.size_flag() };
        Self { op: op.into(), map, kind }
    }

    /// Something went wrong that is not a lack of room.
    pub fn failed(
        op: impl Into<String>,
        map: MapName,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { op: op.into(), map, kind: FailureKind::Failed(source.into()) }
    }

    /// The families that are behind because of it. Want of room is the matter of the Service that does not fit: it is
    /// reported under its name, and a new attempt would not make more of it.
    pub const fn behind(&self) -> Families {
        if self.is_full() { Families::NONE } else { self.map.families() }
    }

    /// True if there was no room.
    pub const fn is_full(&self) -> bool {
        matches!(self.kind, FailureKind::Full { .. })
    }
}
