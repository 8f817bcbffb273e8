//! A half-open flow: its first reply confirms it.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::{Outcome, V4, V6, algo::timeout};

use super::flow;
use super::resolve::Seen;
use crate::clock::now_secs;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};
use crate::packet::RST;

/// Looks the packet up among the half-open flows. A reply moves the pair to `FLOWS`, from where nothing evicts it.
#[inline(always)]
fn half_open<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let Some(entry) = F::new_flows().get_ptr_mut(key) else { return Outcome::NotOurs };
    // SAFETY: the map's element, copied out once.
    *found = unsafe { *entry };
    if flow::is_stale(found.last_seen_secs) {
        return Outcome::NotOurs;
    }
    if found.flags & Flow::<F>::REPLY == 0 {
        return follow(skb, key, found);
    }
    if key.proto == timeout::TCP && seen.tcp_flags() & RST != 0 {
        return Outcome::ReplyUnconfirmed;
    }
    promote(key, found)
}

/// A further request of a half-open flow whose choice was not the plain hash.
#[inline(always)]
fn follow<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &Flow<F>) -> Outcome {
    if !flow::is_for_us(skb, key, found) {
        return Outcome::LayerTwoTransit;
    }
    if found.flags & Flow::<F>::DIRECT != 0 {
        return Outcome::DirectRewritten;
    }
    if key.proto == timeout::UDP && maps::generation(found.endpoint_id) != Some(found.endpoint_gen) {
        if let Some(work) = F::reply() {
            found.partner_into(key, &mut work.partner);
            maps::forget_new(&work.partner);
        }
        maps::forget_new(key);
        return Outcome::NotOurs;
    }
    Outcome::RequestHalfOpen
}

#[inline(always)]
fn promote<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>) -> Outcome {
    let Some(owner) = F::reply() else { return Outcome::DropHelper };
    found.partner_into(key, &mut owner.key);
    let pinned = found.flags & Flow::<F>::PINNED != 0;
    if pinned {
        // Evicted before the reply came: the client asks again, and both are made anew.
        let Some(held) = F::new_flows().get_ptr(&owner.key) else { return Outcome::DropTupleClash };
        // SAFETY: the map's element, copied out once.
        owner.value = unsafe { *held };
    } else {
        derive(key, found, &mut owner.value);
    }
    let now = now_secs();
    owner.value.last_seen_secs = now;
    found.last_seen_secs = now;
    // The owner first: a request that finds it needs nothing else, one that finds only the reply would take it for a
    // leftover.
    let fresh = match F::flows().insert(&owner.key, &owner.value, maps::NOEXIST) {
        Ok(()) => true,
        Err(maps::EXISTS) if leads_here(&owner.key, key) => false,
        // An answer of an endpoint that was asked first and has been replaced since.
        Err(maps::EXISTS) => return Outcome::DropTupleClash,
        Err(_) => return Outcome::DropFlowsFull,
    };
    match F::flows().insert(key, &*found, maps::NOEXIST) {
        Ok(()) | Err(maps::EXISTS) => {}
        Err(_) => {
            if fresh {
                maps::forget(&owner.key);
            }
            return Outcome::DropFlowsFull;
        }
    }
    maps::forget_new(key);
    if pinned {
        maps::forget_new(&owner.key);
    }
    Outcome::ReplyFirst
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

/// True if the confirmed owner's requests go to the endpoint that answers here.
#[inline(always)]
fn leads_here<F: Maps>(owner_key: &FlowKey<F>, reply_key: &FlowKey<F>) -> bool {
    match F::flows().get_ptr(owner_key) {
        // SAFETY: the map's element, read once.
        Some(owner) => unsafe { (*owner).dst == reply_key.src && (*owner).dport == reply_key.sport },
        None => false,
    }
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
            seen: u32,
        ) -> u32 {
            if key.is_null() || found.is_null() {
                return Outcome::DropHelper as u32;
            }
            // SAFETY: not null, and the verifier checks the caller's memory against the types' sizes.
            let (key, found) = unsafe { (&*key, &mut *found) };
            half_open::<$family>(&Skb::new(skb), key, found, Seen::from_bits(seen)) as u32
        }
    };
}

subprogram!(half_open_v4, V4);
subprogram!(half_open_v6, V6);

/// [`half_open`] of a family, as a global subprogram.
pub(crate) trait HalfOpen: Maps {
    fn half_open(skb: &Skb, key: &FlowKey<Self>, found: &mut Flow<Self>, seen: Seen) -> Outcome;
}

macro_rules! dispatch {
    ($family:ty, $name:ident) => {
        impl HalfOpen for $family {
            #[inline(always)]
            fn half_open(skb: &Skb, key: &FlowKey<Self>, found: &mut Flow<Self>, seen: Seen) -> Outcome {
                Seen::outcome($name(skb.as_ptr(), key, found, seen.bits()))
            }
        }
    };
}

dispatch!(V4, half_open_v4);
dispatch!(V6, half_open_v6);
