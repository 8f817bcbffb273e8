//! Tuples are reserved, never shared: the reply's tuple belongs to one flow over `NEW` and `FLOWS` together.

use proxy_common::abi::{Flow, FlowKey};

use super::flow::{self, read};
use crate::clock::{now_secs, secs_since};
use crate::maps::{self, Entry, Maps};

/// What asking for a tuple gave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reservation {
    /// It is ours from now on.
    Fresh,
    /// It was ours already: a further packet of a half-open flow.
    Ours,
    /// It belongs to another live flow.
    Taken,
    /// The table has no room.
    Full,
}

/// Asks for the reply's tuple.
#[inline(always)]
pub(crate) fn reply<F: Maps>(reply: &mut Entry<F>) -> Reservation {
    let Entry { key, value, partner } = reply;
    if let Some(entry) = F::flows().get_ptr(&*key) {
        // SAFETY: the map's element; each field is read once.
        let held = unsafe { &*entry };
        if leads_to_same(held, value) {
            held.partner_into(key, partner);
            if F::flows().get_ptr(&*partner).is_some() {
                // Confirmed by another CPU since we looked.
                return Reservation::Ours;
            }
            // Its owner entry is missing: the reply makes it anew.
            maps::forget(key);
        } else if is_live(key, held, partner) && !mutant!("shared-tuples") {
            return Reservation::Taken;
        } else {
            flow::remove(key, held, partner);
        }
    }
    // Asked before it is tried: an insert into an LRU map takes a node from its list first, even if it fails.
    let mut held = F::new_flows().get_ptr_mut(&*key);
    if held.is_none() {
        match F::new_flows().insert(&*key, &*value, maps::NOEXIST) {
            Ok(()) => return Reservation::Fresh,
            // Another CPU was faster, perhaps with a packet of the same flow.
            Err(maps::EXISTS) => held = F::new_flows().get_ptr_mut(&*key),
            Err(_) => return Reservation::Full,
        }
    }
    held.map_or(Reservation::Taken, |held| half_open(key, value, held))
}

/// The tuple is half open: ours, stale, or another's.
#[inline(always)]
fn half_open<F: Maps>(key: &FlowKey<F>, value: &mut Flow<F>, held: *mut Flow<F>) -> Reservation {
    // SAFETY: the map's element; each field is read once.
    let (ours, flags) = unsafe { (leads_to_same(&*held, value), (*held).flags) };
    let stale = flow::is_stale(read!(held, last_seen_secs));
    if !stale {
        // The endpoint has a connection of its own in this tuple.
        if !ours || flags & Flow::<F>::CONTESTED != 0 {
            return Reservation::Taken;
        }
        let stored = flags & !Flow::<F>::HALF_OPEN == value.flags;
        value.flags |= flags & Flow::<F>::HALF_OPEN;
        if stored {
            refresh(held);
            return Reservation::Ours;
        }
    }
    match F::new_flows().insert(key, &*value, maps::ANY) {
        Ok(()) if ours => Reservation::Ours,
        Ok(()) => Reservation::Fresh,
        Err(_) => Reservation::Full,
    }
}

/// A half-open flow that is used in two later seconds of the clock, or again after two, is a lasting one.
const LASTING_SECS: u32 = 2;

/// Notes that a half-open entry is used; false if this second has been noted already.
#[inline(always)]
pub(crate) fn refresh<F: Maps>(entry: *mut Flow<F>) -> bool {
    let idle = secs_since(read!(entry, last_seen_secs));
    if idle == 0 {
        return false;
    }
    let flags = read!(entry, flags);
    let lasting = idle >= LASTING_SECS || flags & Flow::<F>::AGED != 0;
    let age = if lasting { Flow::<F>::LASTING } else { Flow::<F>::AGED };
    // SAFETY: the map's element; aligned words. A value that was recycled meanwhile would age a little early.
    unsafe {
        (&raw mut (*entry).flags).write_volatile(flags | age);
        (&raw mut (*entry).last_seen_secs).write_volatile(now_secs());
    }
    true
}

/// True if both give the reply to the same client under the same Service address.
#[inline(always)]
pub(crate) fn leads_to_same<F: Maps>(a: &Flow<F>, b: &Flow<F>) -> bool {
    a.src == b.src && a.dst == b.dst && a.sport == b.sport && a.dport == b.dport
}

/// True if the flow of a confirmed reply entry is still open.
#[inline(always)]
pub(crate) fn is_live<F: Maps>(key: &FlowKey<F>, reply: &Flow<F>, room: &mut FlowKey<F>) -> bool {
    reply.partner_into(key, room);
    match F::flows().get_ptr(&*room) {
        // SAFETY: the map's element; each field is read once.
        Some(owner) => unsafe { !(*owner).is_closed() },
        None => false,
    }
}
