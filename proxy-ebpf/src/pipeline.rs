//! A packet's path, top to bottom. No logic of its own: each line is a step.
//!
//! | | looks at | finds |
//! |---|---|---|
//! | `ingress` | destination | a request to a Service, or a reply to a translated source |
//! | `egress` | source | a reply to a Service's client; destination, for requests of the node's own processes |

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use proxy_common::abi::{Direction, Flow, FlowKey, filter, program, tc_index};
use proxy_common::{Family as _, Kind, Outcome, V4, V6};

use crate::ctx::tc::Skb;
use crate::hook::{self, Leave};
use crate::maps;
use crate::packet::{self, Parse, Unread};
use crate::step::resolve::{Resolve, Seen};
use crate::step::{Argument as _, flow, forward, reject, rewrite, service};

/// A packet arrives on a device.
#[inline(always)]
pub(crate) fn ingress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    skb.set_tc_index(tc_index::NOT_OURS);
    match family(&skb) {
        Some(false) if is_relevant(&skb, entering::<V4>(&skb)) => maps::jump(ctx, program::INGRESS_V4),
        Some(true) if is_relevant(&skb, entering::<V6>(&skb)) => maps::jump(ctx, program::INGRESS_V6),
        _ => {}
    }
    hook::NEXT
}

/// A packet leaves by a device.
#[inline(always)]
pub(crate) fn egress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    if skb.tc_index() != u32::from(tc_index::NOT_OURS) {
        return hook::NEXT;
    }
    match family(&skb) {
        Some(false) if is_relevant(&skb, leaving::<V4>(&skb)) => maps::jump(ctx, program::EGRESS_V4),
        Some(true) if is_relevant(&skb, leaving::<V6>(&skb)) => maps::jump(ctx, program::EGRESS_V6),
        _ => {}
    }
    hook::NEXT
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

/// What the filter says of an arriving packet's destination; `None`: too short to say.
#[inline(always)]
fn entering<F: Parse>(skb: &Skb) -> Option<u8> {
    Some(maps::filter(&F::destination(skb)?))
}

/// What the filter says of a leaving packet: of its source, and of its destination if a process of the node sent it.
#[inline(always)]
fn leaving<F: Parse>(skb: &Skb) -> Option<u8> {
    let bits = maps::filter(&F::source(skb)?) & filter::ENDPOINT;
    if skb.ingress_ifindex() != 0 {
        return Some(bits);
    }
    let dst = maps::filter(&F::destination(skb)?);
    let direct = if dst & filter::ENDPOINT != 0 { filter::DIRECT } else { 0 };
    Some(bits | dst & filter::SERVICE | direct)
}

/// True if the packet may be ours, or is too short to say. Tells the program that is jumped to.
#[inline(always)]
fn is_relevant(skb: &Skb, bits: Option<u8>) -> bool {
    if bits == Some(0) {
        return false;
    }
    skb.set_note(bits.unwrap_or(0));
    true
}

/// A packet that may be ours arrives.
#[inline(always)]
pub(crate) fn arrive<F: Parse + Resolve>(ctx: &TcContext) -> i32 {
    judge::<F>(&Skb::new(ctx.skb.skb), Direction::In)
}

/// A packet that may be ours leaves.
#[inline(always)]
pub(crate) fn leave<F: Parse + Resolve>(ctx: &TcContext) -> i32 {
    judge::<F>(&Skb::new(ctx.skb.skb), Direction::Out)
}

#[inline(always)]
fn judge<F: Parse + Resolve>(skb: &Skb, dir: Direction) -> i32 {
    let mut key = MaybeUninit::<FlowKey<F>>::uninit();
    // SAFETY: `read` writes every field before it says that there is a tuple; zeroing them first would be a loop over
    // their bytes.
    let key = unsafe { &mut *key.as_mut_ptr() };
    let read = packet::read(skb, dir, key);
    if read == Err(Unread::Malformed) {
        return hook::finish(skb, Outcome::Malformed, Leave::NEXT);
    }
    let bits = skb.note();
    let l4 = match read {
        Ok(l4) => l4,
        Err(why) => return hook::finish(skb, unread::<F>(&key.dst, bits, why), Leave::NEXT),
    };
    let (key, seen) = (&*key, Seen::new(l4.tcp_flags, bits, l4.offset));
    let tracked = flow::may_be_tracked(dir, bits);
    if tracked {
        if let Some(entry) = F::flows().get_ptr_mut(key) {
            let outcome = flow::established(skb, key, entry, l4.tcp_flags);
            if outcome != Outcome::NotOurs {
                let (outcome, leave) = translate(skb, key, l4.offset, entry, outcome);
                return hook::finish(skb, outcome, leave);
            }
        }
    } else if !flow::may_begin(&l4) {
        return hook::NEXT;
    }
    begin::<F>(skb.as_ptr(), key, seen.number(), tracked)
}

/// A packet of no confirmed flow; `tracked`: perhaps of a half-open one.
#[inline(never)]
fn begin<F: Parse + Resolve>(skb: *mut __sk_buff, key: &FlowKey<F>, seen: u32, tracked: bool) -> i32 {
    let (skb, seen) = (&Skb::new(skb), Seen::from_number(seen));
    let Some(found) = F::request() else { return hook::finish(skb, Outcome::DropHelper, Leave::NEXT) };
    let mut outcome = if tracked { F::half_open(skb, key, found, seen) } else { Outcome::NotOurs };
    if cfg!(feature = "mutant-no-direction") && outcome == Outcome::NotOurs {
        let mut other = *key;
        other.dir ^= 1;
        outcome = F::half_open(skb, &other, found, seen);
    }
    if outcome == Outcome::NotOurs {
        outcome = F::resolve(skb, key, found, seen);
    }
    let (outcome, leave) = match outcome.kind() {
        Kind::Pass | Kind::Drop => (outcome, Leave::NEXT),
        Kind::Reject => reject::answer::<F>(skb, key, seen.offset(), outcome),
        Kind::Translate => return translated(skb.as_ptr(), key, seen.number(), found, outcome as u32),
    };
    hook::finish(skb, outcome, leave)
}

/// [`translate`] with a stack of its own, for the packets that begin a flow.
#[inline(never)]
fn translated<F: Resolve>(skb: *mut __sk_buff, key: &FlowKey<F>, seen: u32, flow: &Flow<F>, outcome: u32) -> i32 {
    let (skb, outcome) = (&Skb::new(skb), Outcome::from_code(outcome).unwrap_or(Outcome::DropHelper));
    let (outcome, leave) = translate(skb, key, Seen::from_number(seen).offset(), flow, outcome);
    hook::finish(skb, outcome, leave)
}

/// Makes the packet what the flow says and sends it on. `flow` may lie in a map: each of its fields is read once.
#[inline(always)]
fn translate<F: Resolve>(
    skb: &Skb,
    key: &FlowKey<F>,
    l4: u32,
    flow: *const Flow<F>,
    outcome: Outcome,
) -> (Outcome, Leave) {
    if outcome.kind() == Kind::Pass {
        return (outcome, Leave::NEXT);
    }
    // SAFETY: a map's element or working memory.
    match unsafe { rewrite::apply(skb, key, l4, flow) } {
        Ok(()) => forward::forward(skb, flow, key, outcome),
        Err(_) => (Outcome::DropHelper, Leave::NEXT),
    }
}

/// What becomes of a packet without a tuple: only one to a ClusterIP is ours to judge.
#[inline(always)]
fn unread<F: Resolve>(dst: &F::Addr, bits: u8, why: Unread) -> Outcome {
    if bits & filter::SERVICE == 0 || !service::is_cluster_ip::<F>(dst) {
        return Outcome::NotOurs;
    }
    if why == Unread::Fragment { Outcome::DropFragment } else { Outcome::DropTruncated }
}
