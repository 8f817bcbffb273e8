//! A packet to an endpoint's own address. Where a Service flow of the same client port holds the reply's tuple, the
//! source port is exchanged, as the kernel's NAT does: both connections work.

use proxy_common::Outcome;
use proxy_common::abi::{Direction, Flow, FlowKey};
use proxy_common::algo::timeout;

use super::attempt::{reply_entry, store_owner};
use super::choose::{SPARE_ATTEMPTS, spare_port, tuple_hash};
use super::flow::{self, read};
use super::reserve::{self, Reservation};
use super::resolve::Seen;
use crate::clock::now_secs;
use crate::maps::{self, Entry, Maps};
use crate::packet::{ACK, RST, SYN};

#[inline(always)]
fn direct<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    if key.proto == timeout::TCP && seen.tcp_flags() & (SYN | ACK | RST) != SYN {
        return Outcome::NotOurs;
    }
    let Some(reply) = F::reply() else { return Outcome::DropHelper };
    reply.key = key.reversed(key.direction().flip());
    if !is_held(reply, found.ifindex) {
        return Outcome::NotOurs;
    }
    let hash = tuple_hash(key, 0);
    *found = Flow { src: key.src, dst: key.dst, dport: key.dport, ..Flow::EMPTY };
    found.flags = Flow::<F>::DIRECT | Flow::<F>::PINNED;
    found.last_seen_secs = now_secs();
    for attempt in 0..SPARE_ATTEMPTS {
        found.sport = spare_port(hash, attempt);
        reply_entry(key, found, reply);
        if matches!(reserve::reply(reply), Reservation::Fresh | Reservation::Ours) {
            maps::note_direct_rewrite();
            let stored = store_owner(key, found, reply);
            return if stored.is_ok() { Outcome::DirectRewritten } else { Outcome::DropHelper };
        }
    }
    Outcome::DropTupleClash
}

/// True if a live Service flow expects its replies under this key. One that is over gives the key up: its entry would
/// go on translating, and the answer to this packet is not its own.
///
/// A packet that comes in by another device than the flow's requests is one of these requests, already translated, that
/// left the node and is back: a gateway of the CNI's sends it round.
#[inline(always)]
fn is_held<F: Maps>(reply: &mut Entry<F>, ifindex: u32) -> bool {
    let Entry { key, partner, .. } = reply;
    // A request's own entry expects nothing: where the node is an endpoint, the re-injected answer to its own process is
    // on that key. And where both ends are the node's, no direct packet is like that.
    let skipped =
        |flags: u16| flags & Flow::<F>::REPLY == 0 || flags & Flow::<F>::DIRECT != 0 || Flow::<F>::is_of_node(flags);
    if let Some(held) = F::flows().get_ptr(&*key) {
        // SAFETY: the map's element; each field is read once.
        let held = unsafe { &*held };
        if skipped(held.flags) || is_second_pass(key, held, ifindex) {
            return false;
        }
        let live = reserve::is_live(key, held, partner);
        if !live {
            flow::remove(key, held, partner);
        }
        return live;
    }
    let Some(held) = F::new_flows().get_ptr(&*key) else { return false };
    // SAFETY: as above.
    let (flags, last_seen_secs) = unsafe { ((*held).flags, (*held).last_seen_secs) };
    if skipped(flags) || is_second_pass(key, held, ifindex) {
        return false;
    }
    let stale = flow::is_stale(last_seen_secs);
    if stale {
        maps::forget_new(key);
    }
    !stale
}

/// True if what arrives at this device under a reply's tuple, read backwards, is a request that we have translated.
#[inline(always)]
fn is_second_pass<F: Maps>(key: &FlowKey<F>, held: *const Flow<F>, ifindex: u32) -> bool {
    let elsewhere =
        Flow::<F>::REINJECT | Flow::<F>::HAIRPIN | Flow::<F>::BRIDGED | Flow::<F>::MASQUERADE | Flow::<F>::MASQUERADED;
    // The reply is awaited on its way out: requests arrive. Of a flow from before an update the device is not known.
    key.dir == Direction::Out as u8
        && read!(held, flags) & elsewhere == 0
        && read!(held, ifindex) != 0
        && read!(held, ifindex) != ifindex
        && !mutant!("second-pass")
}

subprograms! {
    /// [`direct`] of a family, as a global subprogram.
    Direct: Maps => direct(; seen: Seen) as direct_v4, direct_v6
}
