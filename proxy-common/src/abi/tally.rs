//! Look-ups by map, counted only in the build that measures them (feature `tally` of `proxy-ebpf`).

macro_rules! tallied {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// A map, or the two of a family pair, of which each look-up, update and delete is counted.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Tally { $($(#[doc = $doc])+ $variant),+ }

        impl Tally {
            /// All of them; each one's place is its index among the counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The map's name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

tallied! {
    /// `FILTER`.
    Filter = "FILTER",
    /// `FLOWS_V4/6`.
    Flows = "FLOWS",
    /// `NEW_V4/6`.
    New = "NEW",
    /// `SERVICES_V4/6`.
    Services = "SERVICES",
    /// `CLUSTER_IPS_V4/6`.
    ClusterIps = "CLUSTER_IPS",
    /// `NODE_ADDRS_V4/6`.
    NodeAddrs = "NODE_ADDRS",
    /// `DEVICES`.
    Devices = "DEVICES",
    /// `NODE_PORTS`.
    NodePorts = "NODE_PORTS",
    /// `PORTS`.
    Ports = "PORTS",
    /// `SLOTS_V4/6`.
    Slots = "SLOTS",
    /// `LIVE`.
    Live = "LIVE",
    /// `AFFINITY_V4/6`.
    Affinity = "AFFINITY",
    /// `SRC_RANGES_V4/6`.
    SourceRanges = "SRC_RANGES",
    /// `SVC_CIDRS_V4/6`.
    ServiceCidrs = "SVC_CIDRS",
    /// `FRAGS_V4/6`.
    Fragments = "FRAGS",
    /// `CONFIG`.
    Config = "CONFIG",
    /// `REJECTS`.
    Rejects = "REJECTS",
    /// `STATS` and `PORT_STATS`.
    Stats = "STATS",
    /// The programs' own working memory.
    Scratch = "SCRATCH",
}

impl Tally {
    /// True for a hash map: its look-ups walk memory. An array's are an address computed in place.
    pub const fn is_hash(self) -> bool {
        matches!(
            self,
            Self::Flows
                | Self::New
                | Self::Services
                | Self::ClusterIps
                | Self::NodeAddrs
                | Self::Devices
                | Self::Affinity
                | Self::SourceRanges
                | Self::ServiceCidrs
                | Self::Fragments
        )
    }
}
