//! From a destination to a Service port, and to the run its policy names.

use aya_ebpf::btf_maps::lpm_trie::Key;
use proxy_common::abi::{
    Class, Config, Device, Direction, FlowKey, NodeAddr, Policy, Port, Run, RunVerdict, Service, ServiceKey,
    SourceRange, filter, range,
};
use proxy_common::{Address, Outcome, V4, V6};

use super::resolve::Seen;
use crate::config;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};

/// The Service that owns the destination: an exact address first, then a NodePort of this node (rule 90).
#[inline(always)]
pub(crate) fn find<F: Maps>(key: &FlowKey<F>, seen: Seen) -> Option<Service> {
    if mutant!("rule-90") && maps::is_node_port(key.dport) && takes_node_ports::<F>(&key.dst) {
        return get::<F>(F::UNSPECIFIED, key.dport, key.proto);
    }
    if seen.bits_of_filter() & filter::SERVICE != 0
        && let Some(service) = get::<F>(key.dst, key.dport, key.proto)
    {
        return Some(service);
    }
    let node = seen.bits_of_filter() & filter::NODE != 0 || mutant!("rule-93");
    if node && maps::is_node_port(key.dport) && (takes_node_ports::<F>(&key.dst) || mutant!("rule-93")) {
        return get::<F>(F::UNSPECIFIED, key.dport, key.proto);
    }
    None
}

#[inline(always)]
fn get<F: Maps>(addr: F::Addr, port: u16, proto: u8) -> Option<Service> {
    // SAFETY: the map is not preallocated, so the element stays what it is until we are done (RCU).
    unsafe { F::services().get(ServiceKey::<F>::new(addr, port, proto)).copied() }
}

#[inline(always)]
fn takes_node_ports<F: Maps>(addr: &F::Addr) -> bool {
    let addr = *addr;
    // SAFETY: as in `get`.
    unsafe { F::node_addrs().get(&addr).is_some_and(|a| a.flags & NodeAddr::NODE_PORTS != 0 || mutant!("rule-85")) }
}

/// True if the address is some Service's ClusterIP.
#[inline(always)]
pub(crate) fn is_cluster_ip<F: Maps>(addr: &F::Addr) -> bool {
    let addr = *addr;
    F::cluster_ips().get_ptr(&addr).is_some()
}

/// The words of a port that one decision needs, read once each.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    /// The run to choose from.
    pub(crate) run: Run,
    /// The run of the last quiet period, while flows may still be half open under it.
    pub(crate) settled: Run,
    /// True if the run moved a short time ago.
    pub(crate) moved: bool,
    /// The source is exchanged on the way out.
    pub(crate) masquerade: bool,
    /// How long a client keeps its endpoint; 0: each connection is by itself.
    pub(crate) affinity_secs: u32,
}

/// The run that a Service's policy names for this client, and whether its source is exchanged (rule 68).
#[inline(always)]
pub(crate) fn choice<F: Cidrs>(skb: &Skb, key: &FlowKey<F>, service: &Service) -> Option<Choice> {
    let port = maps::port(service.port_id)?;
    let outward = key.dir == Direction::Out as u8;
    let policy = Policy { word: word(port, offset_of!(policy)) };
    let (local, masquerade) = if service.class == Class::ClusterIp as u8 {
        let internal = mutant!("rule-73") && policy.flags() & Policy::INTERNAL_LOCAL != 0;
        let masquerade = !outward && !internal && is_masqueraded_to_cluster_ip::<F>(skb, key);
        (policy.flags() & Policy::INTERNAL_LOCAL != 0, masquerade)
    } else if policy.flags() & Policy::EXTERNAL_LOCAL == 0 {
        (false, !outward)
    } else {
        // Pods of this node and the node itself may use any endpoint, whatever the external policy (rule 69).
        let pod = is_pod::<F>(skb, key).unwrap_or(mutant!("rule-69-everybody")) && !mutant!("rule-69");
        ((!outward || mutant!("rule-70")) && !pod, !outward && mutant!("rule-68-local"))
    };
    let (run, settled, moved) = if local != mutant!("runs-swapped") {
        (offset_of!(local), offset_of!(local_settled), Policy::LOCAL_MOVED)
    } else {
        (offset_of!(cluster), offset_of!(cluster_settled), Policy::CLUSTER_MOVED)
    };
    let run = Run { word: word(port, run) };
    // Read again behind the run: the agent sets the flag before it moves the run.
    let policy = Policy { word: word(port, offset_of!(policy)) };
    let masquerade = masquerade && !mutant!("no-masquerade");
    let affinity_secs = if mutant!("rule-84") { 60 } else { policy.affinity_secs() };
    let moved = policy.flags() & moved != 0;
    Some(Choice { run, settled: Run { word: word(port, settled) }, moved, masquerade, affinity_secs })
}

/// A ClusterIP is the pods' own: who is none is masqueraded, if it can be told (rule 68).
#[inline(always)]
fn is_masqueraded_to_cluster_ip<F: Cidrs>(skb: &Skb, key: &FlowKey<F>) -> bool {
    let all = config::get().is_some_and(|c| c.flags & Config::MASQUERADE_ALL != 0) && !mutant!("rule-68-all");
    all || is_pod::<F>(skb, key) == Some(false) || mutant!("rule-68")
}

/// True if the packet comes from a pod of this node, as `--detect-local-mode` tells them (rule 71); `None`: it tells
/// nothing.
#[inline(always)]
fn is_pod<F: Cidrs>(skb: &Skb, key: &FlowKey<F>) -> Option<bool> {
    let config = config::get()?;
    if config.flags & Config::LOCAL_DEVICES != 0 {
        return Some(maps::device(skb.ifindex()).is_some_and(|d| d.flags & Device::PODS != 0));
    }
    if config.flags & F::LOCAL_CIDR == 0 {
        return mutant!("rule-71-none").then_some(false);
    }
    let (addr, mask) = F::local_cidr(config);
    Some(is_within(&key.src, addr, mask) != mutant!("rule-71"))
}

/// True if an address lies in a network, whose address is masked.
#[inline(always)]
fn is_within<A: Address>(addr: &A, network: &A, mask: &A) -> bool {
    let (addr, network, mask) = (addr.words(), words(network), words(mask));
    (addr[0] & mask[0]) == network[0]
        && (addr[1] & mask[1]) == network[1]
        && (addr[2] & mask[2]) == network[2]
        && (addr[3] & mask[3]) == network[3]
}

/// The words of an address in `CONFIG`. The type says that octets may lie anywhere, and LLVM would load one by one.
#[inline(always)]
fn words<A: Address>(addr: &A) -> [u32; 4] {
    let first = core::ptr::from_ref(addr).cast::<u32>();
    // SAFETY: fields of `Config` before which all others are words (its layout is tested); an address has one or four.
    unsafe {
        if size_of::<A>() == size_of::<u32>() {
            return [first.read(), 0, 0, 0];
        }
        [first.read(), first.add(1).read(), first.add(2).read(), first.add(3).read()]
    }
}

/// True if the address lies in what all ServiceCIDRs have in common: most addresses are told by that alone.
#[inline(always)]
pub(crate) fn may_be_unallocated<F: Cidrs>(addr: &F::Addr) -> bool {
    let Some(config) = config::get() else { return false };
    if config.flags & F::SERVICE_CIDRS == 0 {
        return false;
    }
    let (network, mask) = F::service_cidr(config);
    is_within(addr, network, mask)
}

/// True if the address is a ServiceCIDR's, and neither a Service nor the node has it.
#[inline(never)]
pub(crate) fn is_unallocated<F: Cidrs>(addr: &F::Addr) -> bool {
    let addr = addr.copied();
    !mutant!("rule-63")
        && F::service_cidrs().get(&Key::new(8 * size_of::<F::Addr>() as u32, addr)).is_some()
        && F::cluster_ips().get_ptr(&addr).is_none()
        && F::node_addrs().get_ptr(&addr).is_none()
}

/// The CIDRs in `CONFIG`: address and mask of each.
pub(crate) trait Cidrs: Maps {
    /// The flag that says that pods are told by their address.
    const LOCAL_CIDR: u32;
    /// The flag that says that there are ServiceCIDRs.
    const SERVICE_CIDRS: u32;
    /// The pods'.
    fn local_cidr(config: &Config) -> (&Self::Addr, &Self::Addr);
    /// What all ServiceCIDRs have in common.
    fn service_cidr(config: &Config) -> (&Self::Addr, &Self::Addr);
}

macro_rules! cidrs {
    ($family:ty, $local_flag:ident, $service_flag:ident, $local:ident $local_mask:ident, $service:ident $service_mask:ident) => {
        impl Cidrs for $family {
            const LOCAL_CIDR: u32 = Config::$local_flag;
            const SERVICE_CIDRS: u32 = Config::$service_flag;

            #[inline(always)]
            fn local_cidr(config: &Config) -> (&Self::Addr, &Self::Addr) {
                (&config.$local, &config.$local_mask)
            }

            #[inline(always)]
            fn service_cidr(config: &Config) -> (&Self::Addr, &Self::Addr) {
                (&config.$service, &config.$service_mask)
            }
        }
    };
}

cidrs!(V4, LOCAL_CIDR_V4, SERVICE_CIDRS_V4, local_v4 local_mask_v4, service_v4 service_mask_v4);
cidrs!(V6, LOCAL_CIDR_V6, SERVICE_CIDRS_V6, local_v6 local_mask_v6, service_v6 service_mask_v6);

/// True if the client may use a LoadBalancer address with source ranges (rule 21).
#[inline(never)]
pub(crate) fn is_allowed<F: Maps>(key: &FlowKey<F>, port_id: u32) -> bool {
    let data = SourceRange { port_id, addr: key.src.copied() };
    let bits = range::PORT_ID_BITS + 8 * size_of::<F::Addr>() as u32;
    F::source_ranges().get(&Key::new(bits, data)).is_some() && !mutant!("rule-21-in")
}

macro_rules! offset_of {
    ($field:ident) => {
        core::mem::offset_of!(Port, $field)
    };
}
use offset_of;

/// One aligned word of a port, read whole.
#[inline(always)]
fn word(port: *const Port, offset: usize) -> u64 {
    // SAFETY: the map's element; `offset` is that of a u64 field.
    unsafe { port.cast::<u8>().add(offset).cast::<u64>().read_volatile() }
}

/// What an empty run says.
#[inline(always)]
pub(crate) fn refuse(run: Run) -> Outcome {
    match run.verdict() {
        RunVerdict::Reject => Outcome::RejectNoEndpoint,
        RunVerdict::Drop => Outcome::DropNoLocalEndpoint,
    }
}
