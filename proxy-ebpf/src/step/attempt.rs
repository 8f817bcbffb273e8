//! One attempt at a flow: this endpoint, this source port. Succeeds if the reply's tuple is free, or ours already.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::{Outcome, V4, V6, algo::timeout};

use super::flow;
use super::reserve::{self, Reservation};
use super::resolve::Seen;
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
    if slot.owner != found.port_id && !cfg!(feature = "mutant-any-slot") {
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
    found.ifindex = 0;
    found.next_mac = [0; 6];
    found.last_seen_secs = now_secs();
    if let Err(outcome) = route::request(skb, key, found) {
        return outcome;
    }
    let Some(reply) = F::reply() else { return Outcome::DropHelper };
    reply_entry(key, found, reply);
    if found.flags & Flow::<F>::REDIRECT != 0 {
        let Some(device) = maps::device(skb.ifindex()) else { return Outcome::DropNoRoute };
        reply.value.flags = reply.value.flags & !Flow::<F>::REDIRECT | Flow::<F>::REINJECT;
        reply.value.ifindex = skb.ifindex();
        reply.value.entry_mac = device.mac;
    }
    if keep {
        return if is_kept(reply) { Outcome::RequestHalfOpen } else { Outcome::NotOurs };
    }
    claim(key, found, reply)
}

/// The reply's entry of an owner entry.
#[inline(always)]
pub(crate) fn reply_entry<F: Maps>(key: &FlowKey<F>, owner: &Flow<F>, reply: &mut Entry<F>) {
    owner.partner_into(key, &mut reply.key);
    reply.value = *owner;
    reply.value.src = key.dst;
    reply.value.sport = key.dport;
    reply.value.dst = key.src;
    reply.value.dport = key.sport;
    reply.value.flags |= Flow::<F>::REPLY;
}

/// True if this flow is half open with this very endpoint, and the endpoint lives.
#[inline(always)]
fn is_kept<F: Maps>(reply: &Entry<F>) -> bool {
    let Some(held) = F::new_flows().get_ptr(&reply.key) else { return false };
    // SAFETY: the map's element; each field is read once.
    let held = unsafe { &*held };
    let dead = reply.key.proto == timeout::UDP && maps::generation(held.endpoint_id) != Some(held.endpoint_gen);
    reserve::leads_to_same(held, &reply.value) && !flow::is_stale(held.last_seen_secs) && !dead
}

/// Reserves the reply's tuple, and the request's where the plain hash would not find the way again.
#[inline(always)]
fn claim<F: Maps>(key: &FlowKey<F>, found: &Flow<F>, reply: &mut Entry<F>) -> Outcome {
    let outcome = match reserve::reply(reply) {
        Reservation::Fresh => Outcome::RequestNew,
        Reservation::Ours => Outcome::RequestHalfOpen,
        Reservation::Taken => return Outcome::NotOurs,
        Reservation::Full => return Outcome::DropFlowsFull,
    };
    if found.flags & Flow::<F>::PINNED != 0 && F::new_flows().insert(key, found, maps::ANY).is_err() {
        return Outcome::DropFlowsFull;
    }
    outcome
}

macro_rules! subprogram {
    ($name:ident, $family:ty) => {
        /// Verified by itself, with its own stack.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(
            skb: *mut __sk_buff,
            key: *const FlowKey<$family>,
            found: *mut Flow<$family>,
            index: u32,
            keep: u32,
        ) -> u32 {
            if key.is_null() || found.is_null() {
                return Outcome::DropHelper as u32;
            }
            // SAFETY: not null, and the verifier checks the caller's memory against the types' sizes.
            let (key, found) = unsafe { (&*key, &mut *found) };
            attempt::<$family>(&Skb::new(skb), key, found, index, keep != 0) as u32
        }

        impl Attempt for $family {
            #[inline(always)]
            fn attempt(skb: &Skb, key: &FlowKey<Self>, found: &mut Flow<Self>, index: u32, keep: bool) -> Outcome {
                Seen::outcome($name(skb.as_ptr(), key, found, index, u32::from(keep)))
            }
        }
    };
}

/// [`attempt`] of a family, as a global subprogram.
pub(crate) trait Attempt: Maps {
    fn attempt(skb: &Skb, key: &FlowKey<Self>, found: &mut Flow<Self>, index: u32, keep: bool) -> Outcome;
}

subprogram!(attempt_v4, V4);
subprogram!(attempt_v6, V6);
