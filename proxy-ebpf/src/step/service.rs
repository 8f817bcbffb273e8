//! From a destination to a Service port, and to the run its policy names.

use proxy_common::Outcome;
use proxy_common::abi::{Class, FlowKey, NodeAddr, Policy, Port, Role, Run, RunVerdict, Service, ServiceKey, filter};

use super::resolve::Seen;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};

/// The Service that owns the destination: an exact address first, then a NodePort of this node (rule 90).
#[inline(always)]
pub(crate) fn find<F: Maps>(key: &FlowKey<F>, seen: Seen) -> Option<Service> {
    if seen.bits_of_filter() & filter::SERVICE != 0
        && let Some(service) = get::<F>(key.dst, key.dport, key.proto)
    {
        return Some(service);
    }
    if seen.bits_of_filter() & filter::NODE != 0 && maps::is_node_port(key.dport) && takes_node_ports::<F>(&key.dst) {
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
    // SAFETY: as in `get`.
    unsafe { F::node_addrs().get(addr).is_some_and(|a| a.flags & NodeAddr::NODE_PORTS != 0) }
}

/// True if the address is some Service's ClusterIP.
#[inline(always)]
pub(crate) fn is_cluster_ip<F: Maps>(addr: &F::Addr) -> bool {
    F::cluster_ips().get_ptr(addr).is_some()
}

/// The words of a port that one decision needs, read once each.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    /// The run to choose from.
    pub(crate) run: Run,
    /// The run of the last quiet period, while flows may still be half open under it.
    pub(crate) settled: Run,
    /// True if the run moved a short time ago.
    pub(crate) moved: bool,
}

/// The run that a Service's policy names for this client.
#[inline(always)]
pub(crate) fn choice(skb: &Skb, service: &Service, outward: bool) -> Option<Choice> {
    let port = maps::port(service.port_id)?;
    let policy = Policy { word: word(port, offset_of!(policy)) };
    let local = match service.class {
        class if class == Class::ClusterIp as u8 => policy.flags() & Policy::INTERNAL_LOCAL != 0,
        // Pods of this node and the node itself may use any endpoint, whatever the external policy (rule 69).
        _ => policy.flags() & Policy::EXTERNAL_LOCAL != 0 && !outward && !is_from_pod(skb),
    };
    let (run, settled, moved) = if local != cfg!(feature = "mutant-runs-swapped") {
        (offset_of!(local), offset_of!(local_settled), Policy::LOCAL_MOVED)
    } else {
        (offset_of!(cluster), offset_of!(cluster_settled), Policy::CLUSTER_MOVED)
    };
    let run = Run { word: word(port, run) };
    // Read again behind the run: the agent sets the flag before it moves the run.
    let policy = Policy { word: word(port, offset_of!(policy)) };
    Some(Choice { run, settled: Run { word: word(port, settled) }, moved: policy.flags() & moved != 0 })
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

/// True if the packet came in by the device of a pod of this node.
#[inline(always)]
fn is_from_pod(skb: &Skb) -> bool {
    maps::device(skb.ifindex()).is_some_and(|d| d.role == Role::Pod as u8 || d.role == Role::BridgePort as u8)
}

/// What an empty run says.
#[inline(always)]
pub(crate) fn refuse(run: Run) -> Outcome {
    match run.verdict() {
        RunVerdict::Reject => Outcome::RejectNoEndpoint,
        RunVerdict::Drop => Outcome::DropNoLocalEndpoint,
    }
}
