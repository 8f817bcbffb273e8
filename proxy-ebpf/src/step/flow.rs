//! An established flow: one look-up, and the value says everything.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{Direction, Flow, FlowKey, filter};
use proxy_common::{Outcome, algo::timeout};

use super::forward;
use crate::clock::{now_secs, secs_since};
use crate::config;
use crate::ctx::PacketCtx;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};
use crate::packet::{ACK, FIN, L4, RST, SYN, has_ports};

/// A packet of a confirmed flow: what it is, and what the flow remembers of it. `NotOurs`: the flow was over, and is
/// gone.
#[inline(always)]
pub(crate) fn established<F: Maps>(skb: &Skb, key: &FlowKey<F>, entry: *mut Flow<F>, tcp_flags: u8) -> Outcome {
    let flags = read!(entry, flags);
    if flags & Flow::<F>::REPLY == 0 {
        if !is_for_us(skb, key, entry) {
            return Outcome::LayerTwoTransit;
        }
        if is_over(key, tcp_flags, entry) {
            if let Some(work) = F::reply() {
                remove(key, entry, &mut work.partner);
            }
            return Outcome::NotOurs;
        }
    }
    if tcp_flags & (FIN | RST) != 0 && key.proto == timeout::TCP {
        note_end(entry, key, tcp_flags);
    }
    touch(skb, entry, flags);
    match flags & (Flow::<F>::REPLY | Flow::<F>::DIRECT) {
        0 => Outcome::Request,
        Flow::<F>::DIRECT => Outcome::DirectRewritten,
        _ => Outcome::Reply,
    }
}

/// One field of an entry in a map, read once: the element may be recycled at any time.
macro_rules! read {
    ($entry:expr, $field:ident) => {
        // SAFETY: the pointer is a map's element, which stays readable.
        unsafe { (&raw const (*$entry).$field).read_volatile() }
    };
}
pub(crate) use read;

/// False for a bridged frame on its way to somebody else: the flow remembers the gateway MAC it was opened through. A
/// direct packet is bridged to its endpoint as a rule, and its port is exchanged all the same.
#[inline(always)]
pub(crate) fn is_for_us<F: Maps>(skb: &Skb, key: &FlowKey<F>, owner: *const Flow<F>) -> bool {
    key.dir == Direction::Out as u8
        || skb.is_for_device()
        || read!(owner, flags) & Flow::<F>::DIRECT != 0
        || skb.load_at::<[u8; 6], 0>().is_some_and(|mac| same_mac(&mac, &read!(owner, entry_mac)))
}

/// Word by word: an array comparison becomes a memcmp call.
#[inline(always)]
pub(crate) fn same_mac(a: &[u8; 6], b: &[u8; 6]) -> bool {
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]) == 0
}

/// True if this packet begins anew: a SYN on a closed connection, or UDP to an endpoint that has gone.
#[inline(always)]
fn is_over<F: Maps>(key: &FlowKey<F>, tcp_flags: u8, owner: *const Flow<F>) -> bool {
    match key.proto {
        timeout::TCP if mutant!("closed-lives") => false,
        timeout::TCP if mutant!("rule-65") && is_dead(owner) => true,
        // SAFETY: a map's element.
        timeout::TCP => tcp_flags & (SYN | ACK | RST) == SYN && unsafe { (*owner).is_closed() } && !is_direct(owner),
        timeout::UDP if mutant!("dead-endpoints") => false,
        timeout::UDP => !is_direct(owner) && (is_dead(owner) || mutant!("rule-113")),
        _ => false,
    }
}

#[inline(always)]
fn is_direct<F: Maps>(owner: *const Flow<F>) -> bool {
    read!(owner, flags) & Flow::<F>::DIRECT != 0
}

/// True if the endpoint has gone since it was chosen.
#[inline(always)]
pub(crate) fn is_dead<F: Maps>(owner: *const Flow<F>) -> bool {
    maps::generation(read!(owner, endpoint_id)) != Some(read!(owner, endpoint_gen))
}

/// Sets flags of an entry in a map.
#[inline(always)]
pub(crate) fn set_flags<F: Maps>(entry: *mut Flow<F>, flags: u16) {
    // SAFETY: the map's element; a value that was recycled meanwhile would be asked for again a little later.
    unsafe { (*entry).flags |= flags }
}

/// Removes a pair. Both halves, or the one left would hold the tuple.
#[inline(always)]
pub(crate) fn remove<F: Maps>(key: &FlowKey<F>, value: *const Flow<F>, room: &mut FlowKey<F>) {
    // SAFETY: a map's element.
    unsafe { (*value).partner_into(key, room) };
    maps::forget(room);
    maps::forget(key);
}

/// Notes a FIN or RST where the flow's state lives: in the owner entry.
#[inline(always)]
fn note_end<F: Maps>(entry: *mut Flow<F>, key: &FlowKey<F>, tcp_flags: u8) {
    let mut seen = 0;
    if tcp_flags & FIN != 0 {
        seen |= Flow::<F>::FIN;
    }
    if tcp_flags & RST != 0 {
        seen |= Flow::<F>::RST;
    }
    // Each side has its own byte, so two CPUs never write the same one; a value that was recycled meanwhile would age
    // a little early.
    if read!(entry, flags) & Flow::<F>::REPLY == 0 {
        // SAFETY: the map's element.
        unsafe { (*entry).seen_client |= seen }
        return;
    }
    let Some(work) = F::reply() else { return };
    // SAFETY: a map's element.
    unsafe { (*entry).partner_into(key, &mut work.partner) };
    if let Some(owner) = F::flows().get_ptr_mut(&work.partner) {
        // SAFETY: the map's element.
        unsafe { (*owner).seen_server |= seen }
    }
}

/// Once a second: the time of the last packet, and the next hop's MAC on a bridge.
#[inline(always)]
fn touch<F: Maps>(skb: &Skb, entry: *mut Flow<F>, flags: u16) {
    let now = now_secs();
    let bridged = forward::is_bridged::<F>(flags);
    if read!(entry, last_seen_secs) == now && !(bridged && forward::is_unknown(&read!(entry, next_mac))) {
        return;
    }
    // SAFETY: one aligned word.
    unsafe { (&raw mut (*entry).last_seen_secs).write_volatile(now) }
    if bridged {
        refresh_next_hop(skb.as_ptr(), entry);
    }
}

/// A function of its own: the question is 64 bytes of stack.
#[inline(never)]
fn refresh_next_hop<F: Maps>(skb: *mut __sk_buff, entry: *mut Flow<F>) {
    let mac = forward::bridge_next_hop(&Skb::new(skb), entry).unwrap_or([0; 6]);
    // SAFETY: a torn read would send one packet to a wrong MAC, which the sender repeats.
    unsafe { (*entry).next_mac = mac }
}

/// False for a packet to an endpoint's own address while no direct flow had its port exchanged: it stands in no table.
#[inline(always)]
pub(crate) fn may_be_tracked(dir: Direction, bits: u8) -> bool {
    bits != direct(dir) || config::get().is_some_and(|c| c.direct_rewrites != 0)
}

/// What the filter says of a packet to an endpoint's own address.
#[inline(always)]
pub(crate) const fn direct(dir: Direction) -> u8 {
    match dir {
        Direction::In => filter::ENDPOINT,
        Direction::Out => filter::DIRECT,
    }
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
    secs_since(last_seen_secs) > limit
}
