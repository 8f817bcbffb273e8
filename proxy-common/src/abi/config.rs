//! `CONFIG`: the one entry of settings that programs read at run time.

use crate::{Addr4, Addr6, abi_struct};

abi_struct! {
    /// Value of `CONFIG[0]`.
    pub struct Config: 120 {
        /// [`crate::ABI_VERSION`] of whoever made the maps.
        abi_version: u32,
        /// Bits of this type, written by the agent.
        flags: u32,
        /// Seeds the choice of endpoints; drawn once per set of maps, so that it survives restarts.
        seed: u64,
        /// A half-open entry older than this gives up its tuple, seconds.
        new_timeout_secs: u32,
        /// Answers (RST, ICMP) per second and CPU.
        reject_per_sec: u32,
        /// Non-zero once a direct flow's port had to be exchanged: only then are direct packets looked up. Written by
        /// the programs.
        direct_rewrites: u64,
        /// First source port that masquerade may use, below the node's own (`ip_local_port_range`) …
        snat_low_first: u16,
        /// … and how many.
        snat_low_count: u16,
        /// First one above the node's own …
        snat_high_first: u16,
        /// … and how many.
        snat_high_count: u16,
        /// IPv4 clients in here are pods ([`Config::LOCAL_CIDR_V4`]).
        local_v4: Addr4,
        /// Its mask.
        local_mask_v4: Addr4,
        /// The same of IPv6.
        local_v6: Addr6,
        /// Its mask.
        local_mask_v6: Addr6,
        /// The longest prefix that every ServiceCIDR of IPv4 has in common ([`Config::SERVICE_CIDRS_V4`]).
        service_v4: Addr4,
        /// Its mask.
        service_mask_v4: Addr4,
        /// The same of IPv6.
        service_v6: Addr6,
        /// Its mask.
        service_mask_v6: Addr6,
    }
}

impl Config {
    /// kube-proxy's rules still stand: TCP in mid-stream without a flow is left to them.
    pub const KUBE_PROXY: u32 = 1;
    /// `bpf_fib_lookup` knows `BPF_FIB_LOOKUP_SRC` (6.7).
    pub const FIB_SOURCE: u32 = 2;
    /// Every request to a ClusterIP is masqueraded (`--masquerade-all`).
    pub const MASQUERADE_ALL: u32 = 4;
    /// Pods of this node are told by the device their packets arrive on ([`super::Device::PODS`]).
    pub const LOCAL_DEVICES: u32 = 8;
    /// Pods of IPv4 are told by their address.
    pub const LOCAL_CIDR_V4: u32 = 16;
    /// Pods of IPv6 are told by their address.
    pub const LOCAL_CIDR_V6: u32 = 32;
    /// There are ServiceCIDRs of IPv4: an address in `SVC_CIDRS_V4` that is nobody's is dropped.
    pub const SERVICE_CIDRS_V4: u32 = 64;
    /// The same of IPv6.
    pub const SERVICE_CIDRS_V6: u32 = 128;

    /// Default of `new_timeout_secs`: nf_conntrack's SYN_SENT timeout is 120 s, UDP's unreplied 30 s; an evicted
    /// half-open flow costs one retransmission, so the shorter one.
    pub const NEW_TIMEOUT_SECS: u32 = 30;
    /// Default of `reject_per_sec`, the kernel's `net.ipv4.icmp_msgs_per_sec`.
    pub const REJECT_PER_SEC: u32 = 1_000;
}

abi_struct! {
    /// Value of `REJECTS`, per CPU: the token bucket of generated answers.
    pub struct RejectBucket: 16 {
        /// Nanoseconds of `CLOCK_MONOTONIC` when tokens were last added.
        filled_ns: u64,
        /// Answers left.
        tokens: u64,
    }
}
