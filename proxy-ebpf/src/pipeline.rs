//! A packet's path, top to bottom. No logic of its own: each line is a step.
//!
//! | | looks at | finds |
//! |---|---|---|
//! | `ingress` | destination | a request to a Service, or a reply to a translated source |
//! | `egress` | source | a reply to a Service's client; destination, for requests of the node's own processes |

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use proxy_common::abi::{Direction, filter, tc_index};
use proxy_common::{Family as _, Kind, Outcome, V4, V6};

use crate::ctx::tc::Skb;
use crate::hook::{self, Leave};
use crate::maps::{self, Entry};
use crate::packet::{self, L4, NoL4, Parse};
use crate::step::resolve::{Resolve, Seen};
use crate::step::{flow, forward, reject, rewrite, service};

/// A packet arrives on a device.
#[inline(always)]
pub(crate) fn ingress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    skb.set_tc_index(tc_index::NOT_OURS);
    match family(&skb) {
        Some(false) => arrive::<V4>(ctx.skb.skb),
        Some(true) => arrive::<V6>(ctx.skb.skb),
        None => hook::NEXT,
    }
}

/// A packet leaves by a device.
#[inline(always)]
pub(crate) fn egress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    if skb.tc_index() != u32::from(tc_index::NOT_OURS) {
        return hook::NEXT;
    }
    match family(&skb) {
        Some(false) => leave::<V4>(ctx.skb.skb),
        Some(true) => leave::<V6>(ctx.skb.skb),
        None => hook::NEXT,
    }
}

/// IPv6? `None` for anything but IP, and for tagged frames: those meet us on the VLAN's own device.
#[inline(always)]
fn family(skb: &Skb) -> Option<bool> {
    let protocol = skb.protocol_be();
    if skb.vlan_present() != 0 {
        return None;
    }
    if protocol == u32::from(V4::ETHERTYPE.to_be()) {
        return Some(false);
    }
    (protocol == u32::from(V6::ETHERTYPE.to_be())).then_some(true)
}

// A function of its own per family: each has its own frame of the 512 bytes of stack.
#[inline(never)]
fn arrive<F: Parse + Resolve>(skb: *mut __sk_buff) -> i32 {
    let skb = &Skb::new(skb);
    let Some(ip) = F::ip(skb) else { return hook::finish(Outcome::Malformed, Leave::NEXT) };
    let bits = maps::filter(&ip.dst);
    if bits == 0 {
        return hook::NEXT;
    }
    let (outcome, leave) = translate::<F>(skb, &ip, Direction::In, bits);
    hook::finish(outcome, leave)
}

#[inline(never)]
fn leave<F: Parse + Resolve>(skb: *mut __sk_buff) -> i32 {
    let skb = &Skb::new(skb);
    let Some(ip) = F::ip(skb) else { return hook::finish(Outcome::Malformed, Leave::NEXT) };
    let mut bits = maps::filter(&ip.src) & filter::ENDPOINT;
    if skb.ingress_ifindex() == 0 {
        bits |= maps::filter(&ip.dst) & filter::SERVICE;
    }
    if bits == 0 {
        return hook::NEXT;
    }
    let (outcome, leave) = translate::<F>(skb, &ip, Direction::Out, bits);
    hook::finish(outcome, leave)
}

#[inline(always)]
fn translate<F: Parse + Resolve>(skb: &Skb, ip: &packet::Ip<F>, dir: Direction, bits: u8) -> (Outcome, Leave) {
    let l4 = match L4::parse(skb, ip) {
        Ok(l4) => l4,
        Err(error) => return (unparsed::<F>(&ip.dst, bits, error), Leave::NEXT),
    };
    let Some(Entry { key, value: found, .. }) = F::request() else { return (Outcome::DropHelper, Leave::NEXT) };
    *key = packet::key(ip, &l4, dir);
    let seen = Seen::new(l4.tcp_flags, bits);
    let mut outcome = Outcome::NotOurs;
    if flow::may_be_tracked(dir, bits) {
        outcome = flow::established(skb, key, l4.tcp_flags, found);
        if outcome == Outcome::NotOurs {
            outcome = F::half_open(skb, key, found, seen);
        }
        if cfg!(feature = "mutant-no-direction") && outcome == Outcome::NotOurs {
            key.dir ^= 1;
            outcome = F::half_open(skb, key, found, seen);
            key.dir ^= 1;
        }
    } else if !flow::may_begin(&l4) {
        return (Outcome::NotOurs, Leave::NEXT);
    }
    if outcome == Outcome::NotOurs {
        outcome = F::resolve(skb, key, found, seen);
    }
    match outcome.kind() {
        Kind::Pass | Kind::Drop => (outcome, Leave::NEXT),
        Kind::Reject => reject::answer::<F>(skb, key, l4.offset, outcome),
        Kind::Translate => match rewrite::apply(skb, ip, &l4, found) {
            Ok(()) => forward::forward(skb, found, key, outcome),
            Err(_) => (Outcome::DropHelper, Leave::NEXT),
        },
    }
}

/// What becomes of a packet without a usable layer 4 header: only one to a ClusterIP is ours to judge.
#[inline(always)]
fn unparsed<F: Resolve>(dst: &F::Addr, bits: u8, error: NoL4) -> Outcome {
    if bits & filter::SERVICE == 0 || !service::is_cluster_ip::<F>(dst) {
        return Outcome::NotOurs;
    }
    match error {
        NoL4::Fragment => Outcome::DropFragment,
        NoL4::Truncated => Outcome::DropTruncated,
    }
}
