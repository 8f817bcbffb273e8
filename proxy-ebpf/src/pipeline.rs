//! A packet's path, top to bottom. No logic of its own: each line is a step.
//!
//! | | looks at | finds |
//! |---|---|---|
//! | `ingress` | destination | a request to a Service, or a reply to a translated source |
//! | `egress` | source | a reply to a Service's client; destination, for requests of the node's own processes |
//! | `masquerade` | what ingress said of it | the pair that exchanges a request's source |
//! | `icmp` | the packet that an error quotes | the flow that it is about |
//! | `mark` | the tuple of what has arrived | a reply that is to leave by the uplink of its requests |

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use proxy_common::abi::{Direction, Flow, FlowKey, filter, program, tc_index};
use proxy_common::algo::timeout;
use proxy_common::{Family as _, Kind, Outcome, V4, V6};

use crate::ctx::tc::Skb;
use crate::hook::{self, Leave};
use crate::maps::{self, jump};
use crate::packet::{self, L4, Parse, Unread};
use crate::step::choose::Choose;
use crate::step::confirm::HalfOpen;
use crate::step::direct::Direct;
use crate::step::fragment::{Follow, Remember};
use crate::step::icmp::Icmp;
use crate::step::masquerade::Masquerade;
use crate::step::reject::Answer;
use crate::step::resolve::{self, Resolve, Seen};
use crate::step::rewrite::{Rewrite, Rewritten};
use crate::step::sctp::Settle;
use crate::step::service::Cidrs;
use crate::step::{Argument as _, flow, forward, mark, masquerade, reject, rewrite, service};

/// A packet arrives on a device.
#[inline(always)]
pub(crate) fn ingress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    skb.set_tc_index(tc_index::NOT_OURS);
    match family(&skb) {
        Some(false) => arrives::<V4>(ctx, &skb),
        Some(true) => arrives::<V6>(ctx, &skb),
        None => {}
    }
    hook::NEXT
}

#[inline(always)]
fn arrives<F: Steps>(ctx: &TcContext, skb: &Skb) {
    if is_relevant(skb, entering::<F>(skb)) {
        jump!(ctx, F::INGRESS);
    } else if mark::mask() != 0 {
        jump!(ctx, F::MARK);
    }
}

/// A packet leaves by a device.
#[inline(always)]
pub(crate) fn egress(ctx: &TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    let told = skb.tc_index();
    if told != u32::from(tc_index::NOT_OURS) && told != u32::from(tc_index::REQUEST_SNAT) {
        return hook::NEXT;
    }
    let masquerade = told == u32::from(tc_index::REQUEST_SNAT);
    match family(&skb) {
        Some(false) => leaves::<V4>(ctx, &skb, masquerade),
        Some(true) => leaves::<V6>(ctx, &skb, masquerade),
        None => {}
    }
    hook::NEXT
}

#[inline(always)]
fn leaves<F: Steps>(ctx: &TcContext, skb: &Skb, masquerade: bool) {
    if masquerade {
        jump!(ctx, F::MASQUERADE);
    } else if is_relevant(skb, leaving::<F>(skb)) {
        jump!(ctx, F::EGRESS);
    } else if F::next(skb) == Some(F::ICMP) {
        // An error comes from any router; what it is about tells whether it is ours.
        skb.set_note(filter::OUT);
        jump!(ctx, F::ICMP_ERROR);
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

/// What the filter says of an arriving packet's destination; `None`: too short to say.
#[inline(always)]
fn entering<F: Steps>(skb: &Skb) -> Option<u8> {
    Some(maps::filter(&F::destination(skb)?))
}

/// What the filter says of a leaving packet: of its source, and of its destination if a process of the node sent it. And
/// whether it may go to an address of a ServiceCIDR: whoever could have translated it has had the packet by now.
#[inline(always)]
fn leaving<F: Steps>(skb: &Skb) -> Option<u8> {
    let (src, dst) = F::addresses(skb)?;
    let unallocated = if service::may_be_unallocated::<F>(&dst) { filter::UNALLOCATED } else { 0 };
    let bits = maps::filter(&src) & filter::ENDPOINT | unallocated;
    if skb.ingress_ifindex() != 0 {
        return Some(bits);
    }
    let dst = maps::filter(&dst);
    let direct = if dst & filter::ENDPOINT != 0 { filter::DIRECT } else { 0 };
    // A NodePort of the own node is met on lo.
    Some(bits | dst & (filter::SERVICE | filter::NODE) | direct)
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
pub(crate) fn arrive<F: Steps>(ctx: &TcContext) -> i32 {
    let verdict = judge::<F>(ctx, Direction::In);
    if mark::mask() != 0 && verdict == hook::NEXT {
        jump!(ctx, F::MARK);
    }
    verdict
}

/// What has arrived goes on to the stack: with its source exchanged back, if it was.
#[inline(always)]
pub(crate) fn mark<F: Steps>(ctx: &TcContext) -> i32 {
    if mark::mask() == 0 {
        return hook::NEXT;
    }
    let skb = &Skb::new(ctx.skb.skb);
    let mut key = MaybeUninit::<FlowKey<F>>::uninit();
    // SAFETY: as in `judge`.
    let key = unsafe { &mut *key.as_mut_ptr() };
    match packet::read(skb, Direction::Out, key) {
        Ok(l4) if l4.proto != F::ICMP => mark::reply(skb, key),
        Err(Unread::Fragment) => mark_later_fragment::<F>(skb.as_ptr(), key),
        _ => {}
    }
    hook::NEXT
}

#[inline(never)]
fn mark_later_fragment<F: Steps>(skb: *mut __sk_buff, key: &FlowKey<F>) {
    let id = fragment_id::<F>(skb);
    if id != NO_ID {
        mark::later_fragment(&Skb::new(skb), key, id as u32);
    }
}

/// A packet that may be ours leaves.
#[inline(always)]
pub(crate) fn leave<F: Steps>(ctx: &TcContext) -> i32 {
    judge::<F>(ctx, Direction::Out)
}

/// A request leaves whose source is to be exchanged.
#[inline(always)]
pub(crate) fn masquerade<F: Steps>(ctx: &TcContext) -> i32 {
    let skb = &Skb::new(ctx.skb.skb);
    // An overlay's outer packet carries what is told here, too.
    skb.set_tc_index(tc_index::REQUEST);
    let mut key = MaybeUninit::<FlowKey<F>>::uninit();
    // SAFETY: as in `judge`.
    let key = unsafe { &mut *key.as_mut_ptr() };
    let l4 = match packet::read(skb, Direction::Out, key) {
        Ok(l4) => l4,
        Err(why) => return unread::<F>(skb.as_ptr(), key, 0, why as u32),
    };
    if l4.proto == F::ICMP {
        skb.set_note(filter::OUT);
        jump!(ctx, F::ICMP_ERROR);
        return hook::NEXT;
    }
    let (key, seen) = (&*key, Seen::new(l4.tcp_flags, 0, l4.offset, l4.first));
    if let Some(verdict) = confirmed(skb, key, &l4, seen) {
        return verdict;
    }
    let Some(found) = F::request() else { return hook::finish(skb, Outcome::DropHelper, Leave::NEXT) };
    let mut outcome = F::half_open(skb, key, found, seen);
    if outcome == Outcome::NotOurs {
        outcome = masquerade::begin(skb, key, found);
    }
    if outcome.kind() == Kind::Translate {
        return translated(skb.as_ptr(), key, seen.number(), found, outcome as u32);
    }
    hook::finish(skb, outcome, Leave::NEXT)
}

#[inline(always)]
fn judge<F: Steps>(ctx: &TcContext, dir: Direction) -> i32 {
    let skb = &Skb::new(ctx.skb.skb);
    let mut key = MaybeUninit::<FlowKey<F>>::uninit();
    // SAFETY: `read` writes every field before it says that there is a tuple; zeroing them first would be a loop over
    // their bytes.
    let key = unsafe { &mut *key.as_mut_ptr() };
    let read = packet::read(skb, dir, key);
    if read == Err(Unread::Malformed) {
        return hook::finish(skb, Outcome::Malformed, Leave::NEXT);
    }
    let note = skb.note();
    let bits = note & filter::ALL;
    if note & filter::UNALLOCATED != 0 {
        if service::is_unallocated::<F>(&key.dst) {
            return hook::finish(skb, Outcome::DropUnallocated, Leave::NEXT);
        }
        if bits == 0 && read.as_ref().map_or(true, |l4| l4.proto != F::ICMP) {
            return hook::NEXT;
        }
    }
    let l4 = match read {
        Ok(l4) => l4,
        Err(why) => return unread::<F>(skb.as_ptr(), key, bits, why as u32),
    };
    if l4.proto == F::ICMP {
        skb.set_note(if dir as u8 == Direction::Out as u8 { bits | filter::OUT } else { bits });
        jump!(ctx, F::ICMP_ERROR);
    }
    let (key, seen) = (&*key, Seen::new(l4.tcp_flags, bits, l4.offset, l4.first));
    let tracked = flow::may_be_tracked(dir, bits);
    if tracked {
        if let Some(verdict) = confirmed(skb, key, &l4, seen) {
            return verdict;
        }
    } else if !flow::may_begin(&l4) {
        return hook::NEXT;
    }
    go_on::<F>(skb, key, seen, tracked)
}

/// A packet of a confirmed flow, on its way. `None`: it is of none.
#[inline(always)]
fn confirmed<F: Steps>(skb: &Skb, key: &FlowKey<F>, l4: &L4, seen: Seen) -> Option<i32> {
    let entry = F::flows().get_ptr_mut(key)?;
    let outcome = flow::established(skb, key, entry, l4.tcp_flags);
    let (outcome, leave) = match outcome.kind() {
        _ if outcome == Outcome::NotOurs => return None,
        Kind::Translate if l4.first || l4.proto == timeout::SCTP => {
            return Some(translated(skb.as_ptr(), key, seen.number(), entry, outcome as u32));
        }
        Kind::Translate => translate(skb, key, l4.offset, entry, outcome),
        _ => (outcome, Leave::NEXT),
    };
    Some(hook::finish(skb, outcome, leave))
}

/// What [`begin`] returns beside verdicts: this, plus the outcome of a packet that is to be translated.
const BEGUN: i32 = 1_000;

/// A packet of no confirmed flow. What translates it is not called by what decided: both have much on the stack.
#[inline(always)]
fn go_on<F: Steps>(skb: &Skb, key: &FlowKey<F>, seen: Seen, tracked: bool) -> i32 {
    let verdict = begin::<F>(skb.as_ptr(), key, seen.number(), tracked);
    if verdict < BEGUN {
        return verdict;
    }
    let Some(found) = F::request() else { return hook::finish(skb, Outcome::DropHelper, Leave::NEXT) };
    translated(skb.as_ptr(), key, seen.number(), found, (verdict - BEGUN) as u32)
}

/// A packet of no confirmed flow; `tracked`: perhaps of a half-open one.
#[inline(never)]
fn begin<F: Steps>(skb: *mut __sk_buff, key: &FlowKey<F>, seen: u32, tracked: bool) -> i32 {
    let (skb, seen) = (&Skb::new(skb), Seen::from_number(seen));
    let Some(found) = F::request() else { return hook::finish(skb, Outcome::DropHelper, Leave::NEXT) };
    let mut outcome = if tracked { F::half_open(skb, key, found, seen) } else { Outcome::NotOurs };
    if mutant!("no-direction") && outcome == Outcome::NotOurs {
        let mut other = *key;
        other.dir ^= 1;
        outcome = F::half_open(skb, &other, found, seen);
    }
    if outcome == Outcome::NotOurs {
        outcome = match F::resolve(skb, key, found, seen) {
            Outcome::RequestNew => F::choose(skb, key, found),
            Outcome::DirectRewritten => F::direct(key, found, seen),
            outcome => outcome,
        };
    }
    let (outcome, leave) = match outcome.kind() {
        Kind::Pass | Kind::Drop => (outcome, Leave::NEXT),
        Kind::Reject => reject::answer::<F>(skb, key, seen.offset(), outcome),
        Kind::Translate => return BEGUN + outcome as i32,
    };
    hook::finish(skb, outcome, leave)
}

/// [`translate`] for the packets that begin a flow, and for those that few send: each step verified by itself. `flow` may
/// lie in a map.
#[inline(never)]
fn translated<F: Steps>(skb: *mut __sk_buff, key: &FlowKey<F>, seen: u32, flow: *mut Flow<F>, outcome: u32) -> i32 {
    let (skb, outcome) = (&Skb::new(skb), Outcome::from_code(outcome).unwrap_or(Outcome::DropHelper));
    let seen = Seen::from_number(seen);
    // SAFETY: a map's element or working memory.
    let found = unsafe { &mut *flow };
    if seen.is_first_fragment() {
        let _: Outcome = F::remember(skb, key, found);
    }
    let settled = if key.proto == timeout::SCTP { F::settle(skb, key, found, seen.offset()) } else { outcome };
    if settled == Outcome::DropHelper || F::rewritten(skb, key, found, seen.offset()) == Outcome::DropHelper {
        return hook::finish(skb, Outcome::DropHelper, Leave::NEXT);
    }
    let (outcome, leave) = forward::forward(skb, flow, key, outcome);
    hook::finish(skb, outcome, leave)
}

/// Makes the packet what the flow says and sends it on. `flow` may lie in a map: each of its fields is read once.
#[inline(always)]
fn translate<F: Rewrite>(
    skb: &Skb,
    key: &FlowKey<F>,
    l4: u32,
    flow: *const Flow<F>,
    outcome: Outcome,
) -> (Outcome, Leave) {
    // SAFETY: a map's element or working memory.
    match unsafe { rewrite::apply(skb, key, l4, flow) } {
        Ok(()) => forward::forward(skb, flow, key, outcome),
        Err(_) => (Outcome::DropHelper, Leave::NEXT),
    }
}

/// What becomes of a packet without a tuple: a later fragment follows its first one, and what goes to a ClusterIP is ours
/// to judge. `why` is an [`Unread`].
#[inline(never)]
fn unread<F: Steps>(skb: *mut __sk_buff, key: &FlowKey<F>, bits: u8, why: u32) -> i32 {
    let (skb, later) = (&Skb::new(skb), why == Unread::Fragment as u32);
    let Some(found) = F::request() else { return hook::finish(skb, Outcome::DropHelper, Leave::NEXT) };
    let id = if later { fragment_id::<F>(skb.as_ptr()) } else { NO_ID };
    let outcome = if id == NO_ID { Outcome::NotOurs } else { F::follow(skb, key, found, id as u32) };
    if outcome == Outcome::Fragment {
        let (outcome, leave) = forward::forward(skb, found, key, outcome);
        return hook::finish(skb, outcome, leave);
    }
    let ours = outcome == Outcome::NotOurs
        && bits & filter::SERVICE != 0
        && !mutant!("rule-102-dropped")
        && service::is_cluster_ip::<F>(&key.dst);
    let outcome = match (ours, later) {
        (false, _) => outcome,
        _ if !resolve::entered_for_us(skb, key, found) => Outcome::LayerTwoTransit,
        (true, true) => Outcome::DropFragment,
        (true, false) => Outcome::DropTruncated,
    };
    hook::finish(skb, outcome, Leave::NEXT)
}

/// No identification.
const NO_ID: u64 = u64::MAX;

/// The identification of a fragment's datagram. It walks the headers again: a function of its own, beside the one that
/// rewrites.
#[inline(never)]
fn fragment_id<F: Steps>(skb: *mut __sk_buff) -> u64 {
    let Some(work) = F::reply() else { return NO_ID };
    packet::fragment_id::<F, _>(&Skb::new(skb), &mut work.key).map_or(NO_ID, u64::from)
}

/// ICMP that may be about a translated packet; which way it goes stands in the note.
#[inline(always)]
pub(crate) fn icmp<F: Steps>(ctx: &TcContext) -> i32 {
    let skb = &Skb::new(ctx.skb.skb);
    let bits = skb.note();
    let dir = if bits & filter::OUT != 0 { Direction::Out } else { Direction::In };
    let mut key = MaybeUninit::<FlowKey<F>>::uninit();
    // SAFETY: as in `judge`.
    let key = unsafe { &mut *key.as_mut_ptr() };
    let Ok(l4) = packet::read(skb, dir, key) else { return hook::NEXT };
    let key = &*key;
    let Some(found) = F::request() else { return hook::finish(skb, Outcome::DropHelper, Leave::NEXT) };
    let mut outcome = F::concerns(skb, key, found, l4.offset);
    if outcome == Outcome::NotOurs {
        if bits & filter::ALL == 0 {
            return hook::NEXT;
        }
        return go_on::<F>(skb, key, Seen::new(0, bits & filter::ALL, l4.offset, false), true);
    }
    if outcome == Outcome::IcmpError {
        outcome = F::requote(skb, key, found, l4.offset);
    }
    let (outcome, leave) =
        if outcome == Outcome::IcmpError { forward::forward(skb, found, key, outcome) } else { (outcome, Leave::NEXT) };
    hook::finish(skb, outcome, leave)
}

/// Every step that the pipeline takes with a family, and its programs' slots.
pub(crate) trait Steps:
    Parse
    + Cidrs
    + HalfOpen
    + Resolve
    + Choose
    + Direct
    + Masquerade
    + Icmp
    + Rewritten
    + Settle
    + Remember
    + Follow
    + Answer
{
    /// What arrives and may be ours.
    const INGRESS: u32;
    /// What leaves and may be ours.
    const EGRESS: u32;
    /// Requests whose source is to be exchanged.
    const MASQUERADE: u32;
    /// Errors.
    const ICMP_ERROR: u32;
    /// What has arrived and may be a reply.
    const MARK: u32;
}

impl Steps for V4 {
    const INGRESS: u32 = program::INGRESS_V4;
    const EGRESS: u32 = program::EGRESS_V4;
    const MASQUERADE: u32 = program::MASQUERADE_V4;
    const ICMP_ERROR: u32 = program::ICMP_V4;
    const MARK: u32 = program::MARK_V4;
}

impl Steps for V6 {
    const INGRESS: u32 = program::INGRESS_V6;
    const EGRESS: u32 = program::EGRESS_V6;
    const MASQUERADE: u32 = program::MASQUERADE_V6;
    const ICMP_ERROR: u32 = program::ICMP_V6;
    const MARK: u32 = program::MARK_V6;
}
