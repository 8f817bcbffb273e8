//! `SERVICES_V4/6`, `CLUSTER_IPS_V4/6`, `PORTS`, `NODE_ADDRS_V4/6`: from an address to a run of endpoints.

use crate::{Family, abi_struct};

abi_struct! {
    /// Key of `SERVICES_V4/6`. A NodePort stands under the unspecified address.
    pub struct ServiceKey<F>: V4 = 8, V6 = 20 {
        /// Service address; all zero for a NodePort.
        addr: F::Addr,
        /// Service port, host order.
        port: u16,
        /// IP protocol number.
        proto: u8,
        /// Zero.
        _pad: u8,
    }
}

impl<F: Family> ServiceKey<F> {
    /// The key of one address, port and protocol.
    #[inline(always)]
    pub const fn new(addr: F::Addr, port: u16, proto: u8) -> Self {
        Self { addr, port, proto, _pad: 0 }
    }
}

/// What kind of address a Service entry is. Rules 15–20: which policy applies depends on it.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `spec.clusterIPs`.
    ClusterIp = 1,
    /// `spec.ports[].nodePort` on an address of this node.
    NodePort = 2,
    /// `spec.externalIPs`.
    ExternalIp = 3,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer = 4,
}

abi_struct! {
    /// Value of `SERVICES_V4/6`; written only when an address comes or goes.
    pub struct Service: 8 {
        /// Index into `PORTS`.
        port_id: u32,
        /// A [`Class`].
        class: u8,
        /// Bits of this type.
        flags: u8,
        /// Zero.
        _pad: u16,
    }
}

impl Service {
    /// Only clients that `SRC_RANGES_V4/6` holds for the port may use the address (rule 21).
    pub const SOURCE_RANGES: u8 = 1;

    /// A Service address of this class.
    pub const fn new(port_id: u32, class: Class) -> Self {
        Self { port_id, class: class as u8, flags: 0, _pad: 0 }
    }
}

/// A run: the contiguous slots of a port's endpoints, as one word that is read and written whole.
///
/// | bits | field |
/// |---|---|
/// | 0–31 | base: index of the first slot; of an empty run, its [`RunVerdict`] |
/// | 32–51 | len: number of slots |
/// | 52–63 | gen: counts up with each change |
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    /// The packed word.
    pub word: u64,
}

/// What an empty run says, carried in the word's base so that it changes with the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunVerdict {
    /// No usable endpoint anywhere (rule 54): reject.
    Reject,
    /// Endpoints exist, but not on this node (rule 54): drop.
    Drop,
}

impl Run {
    /// Longest run.
    pub const MAX_LEN: u32 = (1 << 20) - 1;

    /// A run of `len` slots from `base`. `len` beyond [`Self::MAX_LEN`] is the planner's error to report.
    #[inline(always)]
    pub const fn new(base: u32, len: u32, generation: u16) -> Self {
        Self { word: base as u64 | ((len & Self::MAX_LEN) as u64) << 32 | ((generation & 0xfff) as u64) << 52 }
    }

    /// A run without endpoints.
    #[inline(always)]
    pub const fn empty(verdict: RunVerdict, generation: u16) -> Self {
        Self::new(matches!(verdict, RunVerdict::Drop) as u32, 0, generation)
    }

    /// Index of the first slot.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.word as u32
    }

    /// Number of slots.
    #[inline(always)]
    pub const fn len(self) -> u32 {
        (self.word >> 32) as u32 & Self::MAX_LEN
    }

    /// True if there is no endpoint to choose.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Counts changes, modulo 4,096.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        (self.word >> 52) as u16
    }

    /// What to do if the run is empty.
    #[inline(always)]
    pub const fn verdict(self) -> RunVerdict {
        if self.base() == 0 { RunVerdict::Reject } else { RunVerdict::Drop }
    }
}

abi_struct! {
    /// Value of `PORTS`: one Service port, protocol and family. Each word is stored whole; each run is complete in
    /// itself, so they may switch one after the other.
    pub struct Port: 40 {
        /// The endpoints of a Cluster policy.
        cluster: Run,
        /// The endpoints of a Local policy.
        local: Run,
        /// While flows may still be half open under an earlier cluster run: that run. Else zero.
        cluster_settled: Run,
        /// The same for the local run.
        local_settled: Run,
        /// Flags in the low half, the affinity timeout in seconds in the high half; see [`Policy`].
        policy: Policy,
    }
}

impl Port {
    /// A port nobody owns: every run empty.
    pub const UNUSED: Self = Self {
        cluster: Run { word: 0 },
        local: Run { word: 0 },
        cluster_settled: Run { word: 0 },
        local_settled: Run { word: 0 },
        policy: Policy { word: 0 },
    };
}

/// A port's policy, as one word.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Flags in bits 0–31, affinity timeout in seconds in bits 32–63 (0: no affinity).
    pub word: u64,
}

impl Policy {
    /// `internalTrafficPolicy: Local` (rule 24): the ClusterIP uses the local run.
    pub const INTERNAL_LOCAL: u32 = 1;
    /// `externalTrafficPolicy: Local`, effective (rule 23): external addresses use the local run.
    pub const EXTERNAL_LOCAL: u32 = 2;
    /// The cluster run changed a short time ago: see `docs/packet-path.md`, half-open flows.
    pub const CLUSTER_MOVED: u32 = 4;
    /// The local run changed a short time ago.
    pub const LOCAL_MOVED: u32 = 8;

    /// A policy word.
    pub const fn new(flags: u32, affinity_secs: u32) -> Self {
        Self { word: flags as u64 | (affinity_secs as u64) << 32 }
    }

    /// The flags.
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        self.word as u32
    }

    /// Session affinity's timeout, seconds; 0 without affinity.
    #[inline(always)]
    pub const fn affinity_secs(self) -> u32 {
        (self.word >> 32) as u32
    }
}

abi_struct! {
    /// Value of `NODE_ADDRS_V4/6`: what an address of this node is good for.
    pub struct NodeAddr: 4 {
        /// Bits of this type.
        flags: u32,
    }
}

impl NodeAddr {
    /// The address is local to the node's network namespace.
    pub const LOCAL: u32 = 1;
    /// NodePorts are answered here (rule 85).
    pub const NODE_PORTS: u32 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_its_fields_apart() {
        let run = Run::new(u32::MAX, Run::MAX_LEN, 0xfff);
        assert_eq!((run.base(), run.len(), run.generation()), (u32::MAX, Run::MAX_LEN, 0xfff));
        let run = Run::new(7, 3, 4097);
        assert_eq!((run.base(), run.len(), run.generation()), (7, 3, 1));
    }

    #[test]
    fn an_empty_run_carries_its_verdict() {
        assert_eq!(Run::empty(RunVerdict::Reject, 5).verdict(), RunVerdict::Reject);
        assert_eq!(Run::empty(RunVerdict::Drop, 5).verdict(), RunVerdict::Drop);
        assert!(Run::empty(RunVerdict::Drop, 5).is_empty());
        assert_eq!(Port::UNUSED.cluster.verdict(), RunVerdict::Reject);
    }
}
