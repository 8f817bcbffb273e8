//! One attempt at a flow: this endpoint, this source port. Succeeds if the reply's tuple is free, or ours already.

use proxy_common::abi::{Flow, FlowKey};
use proxy_common::{Outcome, algo::timeout};

use super::flow;
use super::reserve::{self, Reservation};
use super::route::{self, Source};
use crate::clock::now_secs;
use crate::ctx::tc::Skb;
use crate::maps::{self, Entry, Maps};

/// `found` comes with the port id, the source port and perhaps [`Flow::PINNED`], and leaves as the owner entry.
/// `NotOurs`: another live flow holds the tuple. `keep`: only if this very flow holds it already.
#[inline(always)]
fn attempt<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, index: u32, keep: bool) -> Outcome {
    let Some(slot) = F::slots().get_ptr(index) else { return Outcome::DropSlotRace };
    // SAFETY: the map's element; each field is read once. Slots are not reused before a grace period has passed.
    let slot = unsafe { &*slot };
    if slot.owner != found.port_id && !mutant!("any-slot") {
        // A reader that is late finds another port's slot: the packet comes again.
        return Outcome::DropSlotRace;
    }
    found.src = key.src;
    found.dst = slot.addr;
    found.dport = slot.port;
    found.seen_client = 0;
    found.seen_server = 0;
    found.endpoint_id = slot.endpoint_id;
    found.endpoint_gen = slot.endpoint_gen;
    found.ifindex = skb.ifindex();
    found.next_mac = [0; 6];
    found.last_seen_secs = now_secs();
    if let Err(outcome) = route::request(skb, key, found) {
        return outcome;
    }
    let Some(reply) = F::reply() else { return Outcome::DropHelper };
    if let Err(outcome) = reply_half(skb, key, found, reply) {
        return outcome;
    }
    if keep { hold(key, found, reply) } else { claim(key, found, reply) }
}

/// Stores the owner entry. It takes the room of the reply's, which is stored by now or not wanted: before 6.2 the
/// verifier takes no argument of a subprogram for a map's key or value.
#[inline(always)]
pub(crate) fn store_owner<F: Maps>(key: &FlowKey<F>, owner: &Flow<F>, room: &mut Entry<F>) -> Result<(), i32> {
    room.partner = *key;
    room.value = *owner;
    F::new_flows().insert(&room.partner, &room.value, maps::ANY)
}

/// The reply's half of an owner entry, which tells by which device a request of the node's own left.
#[inline(always)]
pub(crate) fn reply_half<F: Maps>(
    skb: &Skb,
    key: &FlowKey<F>,
    owner: &Flow<F>,
    reply: &mut Entry<F>,
) -> Result<(), Outcome> {
    reply_entry(key, owner, reply);
    if owner.flags & Flow::<F>::REDIRECT != 0 {
        let device = maps::device(skb.ifindex()).ok_or(Outcome::DropNoRoute)?;
        reply.value.flags = reply.value.flags & !Flow::<F>::REDIRECT | Flow::<F>::REINJECT;
        reply.value.ifindex = skb.ifindex();
        reply.value.entry_mac = device.mac;
    }
    Ok(())
}

/// The reply's entry of an owner entry.
#[inline(always)]
pub(crate) fn reply_entry<F: Maps>(key: &FlowKey<F>, owner: &Flow<F>, reply: &mut Entry<F>) {
    owner.partner_into(key, &mut reply.key);
    reply.value = *owner;
    reply.value.src = key.dst;
    reply.value.sport = if mutant!("rule-76") { owner.dport } else { key.dport };
    reply.value.dst = key.src;
    reply.value.dport = key.sport;
    reply.value.flags |= Flow::<F>::REPLY;
}

/// Stays with this endpoint if the flow is half open with it, and it lives. From now on the owner entry is stored: once
/// the change has settled, the hash would lead elsewhere.
#[inline(always)]
fn hold<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>, reply: &mut Entry<F>) -> Outcome {
    let Some(entry) = F::new_flows().get_ptr_mut(&reply.key) else { return Outcome::NotOurs };
    // SAFETY: the map's element; each field is read once.
    let held = unsafe { &*entry };
    let dead = reply.key.proto == timeout::UDP && maps::generation(held.endpoint_id) != Some(held.endpoint_gen);
    let contested = held.flags & Flow::<F>::CONTESTED != 0;
    if !reserve::leads_to_same(held, &reply.value) || flow::is_stale(held.last_seen_secs) || dead || contested {
        return Outcome::NotOurs;
    }
    found.flags |= Flow::<F>::PINNED | held.flags & Flow::<F>::ANSWERED;
    reserve::refresh(entry);
    flow::set_flags(entry, Flow::<F>::PINNED);
    match store_owner(key, found, reply) {
        Ok(()) => Outcome::RequestHalfOpen,
        Err(_) => Outcome::DropHelper,
    }
}

/// Reserves the reply's tuple, and the request's where the plain hash would not find the way again.
#[inline(always)]
fn claim<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>, reply: &mut Entry<F>) -> Outcome {
    let outcome = match reserve::reply(reply) {
        Reservation::Fresh => Outcome::RequestNew,
        Reservation::Ours => Outcome::RequestHalfOpen,
        Reservation::Taken => return Outcome::NotOurs,
        Reservation::Full => return Outcome::DropHelper,
    };
    // The endpoint may have answered before this half was evicted.
    found.flags |= reply.value.flags & Flow::<F>::ANSWERED;
    if found.flags & Flow::<F>::PINNED != 0 && store_owner(key, found, reply).is_err() {
        return Outcome::DropHelper;
    }
    outcome
}

subprograms! {
    /// [`attempt`] of a family, as a global subprogram.
    Attempt: Source => attempt(skb; index: u32, keep: bool) as attempt_v4, attempt_v6
}
