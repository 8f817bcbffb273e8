//! An established flow: one look-up, and the value says everything.

use proxy_common::abi::{Direction, Flow, FlowKey, filter};
use proxy_common::{Outcome, algo::timeout};

use super::forward;
use crate::config;
use crate::ctx::PacketCtx;
use crate::ctx::tc::{Skb, now_secs};
use crate::maps::{self, Maps};
use crate::packet::{ACK, FIN, L4, RST, SYN, has_ports};

/// Looks the packet up among the confirmed flows and copies what is to be done. `NotOurs`: there is none.
#[inline(always)]
pub(crate) fn established<F: Maps>(skb: &Skb, key: &FlowKey<F>, tcp_flags: u8, found: &mut Flow<F>) -> Outcome {
    let Some(entry) = F::flows().get_ptr_mut(key) else { return Outcome::NotOurs };
    // SAFETY: the map's element; copied out once and not read again.
    *found = unsafe { *entry };
    if found.flags & Flow::<F>::REPLY == 0 {
        if !is_for_us(skb, key, found) {
            return Outcome::LayerTwoTransit;
        }
        if is_over(key, tcp_flags, found) {
            if let Some(work) = F::reply() {
                remove(key, found, &mut work.partner);
            }
            return Outcome::NotOurs;
        }
    }
    if tcp_flags & (FIN | RST) != 0 && key.proto == timeout::TCP {
        note_end(entry, key, tcp_flags, found);
    }
    touch(skb, entry, found);
    match found.flags & (Flow::<F>::REPLY | Flow::<F>::DIRECT) {
        0 => Outcome::Request,
        Flow::<F>::DIRECT => Outcome::DirectRewritten,
        _ => Outcome::Reply,
    }
}

/// False for a bridged frame on its way to somebody else: the flow remembers the gateway MAC it was opened through. A
/// direct packet is bridged to its endpoint as a rule, and its port is exchanged all the same.
#[inline(always)]
pub(crate) fn is_for_us<F: Maps>(skb: &Skb, key: &FlowKey<F>, owner: &Flow<F>) -> bool {
    key.dir == Direction::Out as u8
        || skb.is_for_device()
        || owner.flags & Flow::<F>::DIRECT != 0
        || skb.load_at::<[u8; 6], 0>().is_some_and(|mac| same_mac(&mac, &owner.entry_mac))
}

/// Word by word: an array comparison becomes a memcmp call.
#[inline(always)]
pub(crate) fn same_mac(a: &[u8; 6], b: &[u8; 6]) -> bool {
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]) == 0
}

/// True if this packet begins anew: a SYN on a closed connection, or UDP to an endpoint that has gone.
#[inline(always)]
fn is_over<F: Maps>(key: &FlowKey<F>, tcp_flags: u8, owner: &Flow<F>) -> bool {
    if owner.flags & Flow::<F>::DIRECT != 0 {
        return false;
    }
    match key.proto {
        timeout::TCP if cfg!(feature = "mutant-closed-lives") => false,
        timeout::TCP => tcp_flags & (SYN | ACK | RST) == SYN && owner.is_closed(),
        timeout::UDP if cfg!(feature = "mutant-dead-endpoints") => false,
        timeout::UDP => maps::generation(owner.endpoint_id) != Some(owner.endpoint_gen),
        _ => false,
    }
}

/// Removes a pair. Both halves, or the one left would hold the tuple.
#[inline(always)]
pub(crate) fn remove<F: Maps>(key: &FlowKey<F>, value: &Flow<F>, room: &mut FlowKey<F>) {
    value.partner_into(key, room);
    maps::forget(room);
    maps::forget(key);
}

/// Notes a FIN or RST where the flow's state lives: in the owner entry.
#[inline(always)]
fn note_end<F: Maps>(entry: *mut Flow<F>, key: &FlowKey<F>, tcp_flags: u8, found: &Flow<F>) {
    let mut seen = 0;
    if tcp_flags & FIN != 0 {
        seen |= Flow::<F>::FIN;
    }
    if tcp_flags & RST != 0 {
        seen |= Flow::<F>::RST;
    }
    // Each side has its own byte, so two CPUs never write the same one; a value that was recycled meanwhile would age
    // a little early.
    if found.flags & Flow::<F>::REPLY == 0 {
        // SAFETY: the map's element.
        unsafe { (*entry).seen_client |= seen }
        return;
    }
    let Some(work) = F::reply() else { return };
    found.partner_into(key, &mut work.partner);
    if let Some(owner) = F::flows().get_ptr_mut(&work.partner) {
        // SAFETY: the map's element.
        unsafe { (*owner).seen_server |= seen }
    }
}

/// Once a second: the time of the last packet, and the next hop's MAC on a bridge.
#[inline(always)]
fn touch<F: Maps>(skb: &Skb, entry: *mut Flow<F>, found: &mut Flow<F>) {
    let now = now_secs();
    if found.last_seen_secs == now && found.flags & Flow::<F>::BRIDGED == 0 {
        return;
    }
    if found.last_seen_secs != now {
        // SAFETY: one aligned word.
        unsafe { (&raw mut (*entry).last_seen_secs).write_volatile(now) }
    } else if found.next_mac[0] | found.next_mac[1] | found.next_mac[2] | found.next_mac[3] != 0 {
        return;
    }
    if found.flags & (Flow::<F>::BRIDGED | Flow::<F>::REPLY) == Flow::<F>::BRIDGED {
        found.next_mac = forward::bridge_next_hop(skb, found).unwrap_or([0; 6]);
        // SAFETY: a torn read would send one packet to a wrong MAC, which the sender repeats.
        unsafe { (*entry).next_mac = found.next_mac }
    }
}

/// False for a packet to an endpoint's own address while no direct flow had its port exchanged: it stands in no table.
#[inline(always)]
pub(crate) fn may_be_tracked(dir: Direction, bits: u8) -> bool {
    dir == Direction::Out || bits != filter::ENDPOINT || config::get().is_some_and(|c| c.direct_rewrites != 0)
}

/// True for the packets that may begin a flow: UDP has no other sign.
#[inline(always)]
pub(crate) fn may_begin(l4: &L4) -> bool {
    match l4.proto {
        timeout::TCP => l4.opens(),
        proto => has_ports(proto),
    }
}

/// Half-open entries older than this have given up their tuple.
#[inline(always)]
pub(crate) fn is_stale(last_seen_secs: u32) -> bool {
    let limit = config::get().map_or(proxy_common::abi::Config::NEW_TIMEOUT_SECS, |c| c.new_timeout_secs);
    now_secs().wrapping_sub(last_seen_secs) > limit
}
