//! A half-open flow, until it is confirmed and moves to `FLOWS`, from where nothing evicts it:
//!
//! | | is confirmed by |
//! |---|---|
//! | TCP | a segment of the client after the endpoint's SYN-ACK: the handshake is complete |
//! | UDP | an answer, once the flow has lasted for two seconds, as `nf_conntrack` assures it |
//! | any other | the first answer |
//!
//! So neither SYNs from forged addresses nor short queries fill `FLOWS`, answered or not, and a DNS query costs one
//! entry of a table that forgets its oldest. Either half may be evicted at any time: what is missing is made again from
//! the other half, or the packet begins anew.

use proxy_common::abi::{Flow, FlowKey};
use proxy_common::{Outcome, algo::timeout};

use super::attempt::reply_half;
use super::flow::{self, read};
use super::reserve;
use super::resolve::Seen;
use super::route::Source;
use crate::clock::now_secs;
use crate::ctx::tc::Skb;
use crate::maps::{self, Entry, Maps};
use crate::packet::{ACK, FIN, RST, SYN};

/// Looks the packet up among the half-open flows.
#[inline(always)]
fn half_open<F: Source>(skb: &Skb, key: &FlowKey<F>, _found: &mut Flow<F>, seen: Seen) -> Outcome {
    // Before 6.2 the verifier takes no argument of a subprogram for a map's key or value: the key is copied, and the
    // packet's own entry asked for again.
    let key = &{ *key };
    let Some(entry) = F::new_flows().get_ptr_mut(key) else { return Outcome::NotOurs };
    let Some(found) = F::request() else { return Outcome::DropHelper };
    // SAFETY: the map's element, copied out once.
    *found = unsafe { *entry };
    if flow::is_stale(found.last_seen_secs) {
        return Outcome::NotOurs;
    }
    if found.flags & Flow::<F>::REPLY == 0 {
        return request(skb, key, entry, found, seen);
    }
    if key.proto == timeout::TCP {
        return answer(key, entry, found, seen);
    }
    if is_superseded(key, found) {
        return Outcome::DropTupleClash;
    }
    if key.proto == timeout::UDP {
        refresh_pair(key, entry, found);
        if found.flags & Flow::<F>::LASTING == 0 && !mutant!("udp-at-once") {
            return Outcome::ReplyHalfOpen;
        }
    }
    confirm_by_answer(key, found)
}

/// A further request of a half-open flow whose owner entry is stored.
#[inline(always)]
fn request<F: Source>(skb: &Skb, key: &FlowKey<F>, entry: *mut Flow<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    if !flow::is_for_us(skb, key, entry) {
        return Outcome::LayerTwoTransit;
    }
    let direct = found.flags & Flow::<F>::DIRECT != 0;
    if key.proto == timeout::UDP && !direct && flow::is_dead(entry) && !mutant!("rule-104-half-open") {
        forget_pair(key, found);
        return Outcome::NotOurs;
    }
    let Some(reply) = F::reply() else { return Outcome::DropHelper };
    if !other_half(skb, key, found, reply) {
        maps::forget_new(key);
        return Outcome::NotOurs;
    }
    if found.flags & Flow::<F>::ANSWERED != 0 && seen.tcp_flags() & (SYN | RST) == 0 {
        if seen.tcp_flags() & FIN != 0 {
            found.seen_client |= Flow::<F>::FIN;
        }
        if let Err(outcome) = store(key, found, &reply.key, &mut reply.value) {
            return outcome;
        }
    } else {
        reserve::refresh(entry);
    }
    if direct { Outcome::DirectRewritten } else { Outcome::RequestHalfOpen }
}

/// Finds the reply's half of an owner, refreshes and copies it; makes it again if it was evicted. False if the tuple is
/// another flow's by now.
#[inline(always)]
fn other_half<F: Source>(skb: &Skb, key: &FlowKey<F>, owner: &Flow<F>, reply: &mut Entry<F>) -> bool {
    owner.partner_into(key, &mut reply.key);
    if let Some(held) = F::new_flows().get_ptr_mut(&reply.key) {
        // SAFETY: the map's element, copied out once.
        reply.value = unsafe { *held };
        let value = &reply.value;
        let ours = value.src == key.dst && value.sport == key.dport && value.dst == key.src && value.dport == key.sport;
        if ours {
            reserve::refresh(held);
        }
        return ours;
    }
    if reply_half(skb, key, owner, reply).is_err() {
        return false;
    }
    F::new_flows().insert(&reply.key, &reply.value, maps::NOEXIST).is_ok()
}

/// What an endpoint answers to a SYN.
#[inline(always)]
fn answer<F: Maps>(key: &FlowKey<F>, entry: *mut Flow<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let flags = seen.tcp_flags();
    if flags & SYN == 0 && found.flags & Flow::<F>::CONTESTED != 0 {
        return Outcome::NotOurs;
    }
    if flags & RST != 0 {
        return Outcome::ReplyReset;
    }
    if flags & SYN == 0 && found.flags & Flow::<F>::ANSWERED != 0 {
        refresh_pair(key, entry, found);
        return Outcome::ReplyHalfOpen;
    }
    if flags & (SYN | ACK) != SYN | ACK {
        return contest(key, entry, found);
    }
    if is_superseded(key, found) {
        return Outcome::DropTupleClash;
    }
    let Some(Entry { key: owner_key, value: owner, .. }) = F::reply() else { return Outcome::DropHelper };
    found.partner_into(key, owner_key);
    if let Some(held) = F::new_flows().get_ptr_mut(&*owner_key) {
        flow::set_flags(held, Flow::<F>::ANSWERED);
    } else if found.flags & Flow::<F>::PINNED != 0 {
        // Evicted before the answer came: the client asks again, and both are made anew.
        return Outcome::DropTupleClash;
    } else {
        derive(key, found, owner);
        owner.flags |= Flow::<F>::ANSWERED;
        if F::new_flows().insert(&*owner_key, &*owner, maps::ANY).is_err() {
            return Outcome::DropHelper;
        }
    }
    flow::set_flags(entry, Flow::<F>::ANSWERED);
    Outcome::ReplyHalfOpen
}

/// The endpoint has a connection in this tuple already, which began without a Service: what comes is that one's (an
/// acknowledgement that challenges our SYN, RFC 5961 §4, or plain data). It is left to it, and the next SYN gets
/// another tuple.
#[inline(always)]
fn contest<F: Maps>(key: &FlowKey<F>, entry: *mut Flow<F>, found: &Flow<F>) -> Outcome {
    if !mutant!("uncontested") {
        flow::set_flags(entry, Flow::<F>::CONTESTED);
    }
    if found.flags & Flow::<F>::PINNED != 0
        && let Some(work) = F::reply()
    {
        found.partner_into(key, &mut work.partner);
        maps::forget_new(&work.partner);
    }
    Outcome::NotOurs
}

/// True if the client's requests go to another endpoint by now: it must not hear two in one conversation.
#[inline(always)]
fn is_superseded<F: Maps>(key: &FlowKey<F>, reply: &Flow<F>) -> bool {
    let Some(work) = F::reply() else { return false };
    reply.partner_into(key, &mut work.partner);
    if let Some(owner) = F::new_flows().get_ptr(&work.partner) {
        return !leads_to(owner, key);
    }
    F::flows().get_ptr(&work.partner).is_some_and(|owner| !leads_to(owner, key))
}

/// True if an owner's requests go to the endpoint that answers here.
#[inline(always)]
fn leads_to<F: Maps>(owner: *const Flow<F>, reply_key: &FlowKey<F>) -> bool {
    // SAFETY: a map's element; each field is read once.
    unsafe { (*owner).dst == reply_key.src && (*owner).dport == reply_key.sport }
}

/// Once a second: both halves are in use.
#[inline(always)]
fn refresh_pair<F: Maps>(key: &FlowKey<F>, entry: *mut Flow<F>, found: &mut Flow<F>) {
    if !reserve::refresh(entry) || found.flags & (Flow::<F>::PINNED | Flow::<F>::ANSWERED) == 0 {
        found.flags = read!(entry, flags);
        return;
    }
    found.flags = read!(entry, flags);
    let Some(work) = F::reply() else { return };
    found.partner_into(key, &mut work.partner);
    if let Some(partner) = F::new_flows().get_ptr_mut(&work.partner) {
        reserve::refresh(partner);
    }
}

#[inline(always)]
fn forget_pair<F: Maps>(key: &FlowKey<F>, found: &Flow<F>) {
    if let Some(work) = F::reply() {
        found.partner_into(key, &mut work.partner);
        maps::forget_new(&work.partner);
    }
    maps::forget_new(key);
}

/// An answer confirms the flow.
#[inline(always)]
fn confirm_by_answer<F: Maps>(key: &FlowKey<F>, reply: &mut Flow<F>) -> Outcome {
    let Some(Entry { key: owner_key, value: owner, .. }) = F::reply() else { return Outcome::DropHelper };
    reply.partner_into(key, owner_key);
    if reply.flags & Flow::<F>::PINNED != 0 {
        // Confirmed already without this half; or evicted before the answer came: then the client asks again, and both
        // are made anew.
        let held = F::new_flows().get_ptr(&*owner_key).or_else(|| F::flows().get_ptr(&*owner_key));
        let Some(held) = held else { return Outcome::DropTupleClash };
        // SAFETY: the map's element, copied out once.
        *owner = unsafe { *held };
    } else {
        derive(key, reply, owner);
    }
    match store(owner_key, owner, key, reply) {
        Ok(()) => Outcome::ReplyHalfOpen,
        Err(outcome) => outcome,
    }
}

/// Moves a pair from `NEW` to `FLOWS`.
#[inline(always)]
fn store<F: Maps>(
    owner_key: &FlowKey<F>,
    owner: &mut Flow<F>,
    reply_key: &FlowKey<F>,
    reply: &mut Flow<F>,
) -> Result<(), Outcome> {
    let now = now_secs();
    owner.flags &= !Flow::<F>::HALF_OPEN;
    reply.flags &= !Flow::<F>::HALF_OPEN;
    (owner.last_seen_secs, reply.last_seen_secs) = (now, now);
    // The owner first: a request that finds it needs nothing else, one that finds only the reply would take it for a
    // leftover.
    let fresh = match F::flows().insert(owner_key, &*owner, maps::NOEXIST) {
        Ok(()) => true,
        Err(maps::EXISTS) if F::flows().get_ptr(owner_key).is_some_and(|owner| leads_to(owner, reply_key)) => false,
        // An answer of an endpoint that was asked first and has been replaced since.
        Err(maps::EXISTS) => return Err(Outcome::DropTupleClash),
        Err(_) => return Err(Outcome::FlowsFull),
    };
    match F::flows().insert(reply_key, &*reply, maps::NOEXIST) {
        Ok(()) | Err(maps::EXISTS) => {}
        Err(_) => {
            if fresh {
                maps::forget(owner_key);
            }
            return Err(Outcome::FlowsFull);
        }
    }
    maps::forget_new(reply_key);
    maps::forget_new(owner_key);
    Ok(())
}

/// The owner entry of a reply entry whose choice was the plain hash.
#[inline(always)]
fn derive<F: Maps>(key: &FlowKey<F>, reply: &Flow<F>, owner: &mut Flow<F>) {
    *owner = *reply;
    owner.src = key.dst;
    owner.dst = key.src;
    owner.sport = key.dport;
    owner.dport = key.sport;
    owner.flags &= !Flow::<F>::REPLY;
}

subprograms! {
    /// [`half_open`] of a family, as a global subprogram.
    HalfOpen: Source => half_open(skb; seen: Seen) as half_open_v4, half_open_v6
}
