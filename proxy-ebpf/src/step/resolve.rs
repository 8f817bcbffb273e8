//! The first packet of a flow: which Service, which endpoint, which tuple.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{Config, Direction, Flow, FlowKey, Role, Run, Service, Slot, filter};
use proxy_common::algo::{hash, timeout};
use proxy_common::{Outcome, V4, V6};

use super::reserve::{self, Reservation};
use super::service::{self, Choice};
use super::route::{self, Source};
use super::{confirm::HalfOpen, flow};
use crate::ctx::PacketCtx;
use crate::ctx::tc::{Skb, now_secs};
use crate::maps::{self, Maps, Scratch};
use crate::packet::{ACK, RST, SYN};
use crate::{config, step::reject::Answer, step::rewrite::Rewrite};

/// What the fast path saw of the packet, as one word: a subprogram's argument is a scalar or a pointer.
#[derive(Clone, Copy)]
pub(crate) struct Seen(u32);

impl Seen {
    #[inline(always)]
    pub(crate) const fn new(tcp_flags: u8, filter: u8) -> Self {
        Self(tcp_flags as u32 | (filter as u32) << 8)
    }

    #[inline(always)]
    pub(crate) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    #[inline(always)]
    pub(crate) const fn bits(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub(crate) const fn tcp_flags(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    pub(crate) const fn bits_of_filter(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// The outcome that a subprogram returned as its code.
    #[inline(always)]
    pub(crate) fn outcome(code: u32) -> Outcome {
        Outcome::from_code(code).unwrap_or(Outcome::DropHelper)
    }
}

/// Attempts at a free tuple: the plain choice, three other endpoints, then four other source ports.
const ENDPOINT_ATTEMPTS: u32 = 4;
const ATTEMPTS: u32 = 8;
/// Where source ports that had to be exchanged come from: above the default `ip_local_port_range`.
const SPARE_PORTS: u32 = 61_000;
const SPARE_PORT_COUNT: u32 = 4_536;

#[inline(always)]
fn resolve<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let bits = seen.bits_of_filter();
    if key.dir == Direction::Out as u8 && bits & filter::SERVICE == 0 {
        return Outcome::NotOurs;
    }
    let Some(service) = service::find(key, seen) else { return no_service(skb, key, found, seen) };
    if !entered_for_us(skb, key, found) {
        return Outcome::LayerTwoTransit;
    }
    if key.proto == timeout::TCP && seen.tcp_flags() & (SYN | ACK | RST) != SYN {
        return mid_stream(seen);
    }
    let Some(choice) = service::choice(skb, &service, key.dir == Direction::Out as u8) else {
        return Outcome::RejectNoEndpoint;
    };
    let outcome = if choice.run.is_empty() { service::refuse(choice.run) } else { choose(skb, key, found, &service, &choice) };
    maps::count_port(service.port_id, !matches!(outcome, Outcome::RequestNew | Outcome::RequestHalfOpen));
    outcome
}

/// The destination is no Service port. A ClusterIP refuses; an endpoint's own address is guarded against a clash.
#[inline(always)]
fn no_service<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let bits = seen.bits_of_filter();
    if bits & filter::SERVICE != 0 && service::is_cluster_ip::<F>(&key.dst) {
        return if entered_for_us(skb, key, found) { Outcome::RejectUnknownPort } else { Outcome::LayerTwoTransit };
    }
    if bits & filter::ENDPOINT != 0 && key.dir == Direction::In as u8 {
        return direct(key, found, seen);
    }
    Outcome::NotOurs
}

/// False for a bridged frame that is not addressed to the device or its bridge. Remembers the MAC that it carries.
#[inline(always)]
fn entered_for_us<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> bool {
    if key.dir == Direction::Out as u8 || skb.is_for_device() {
        return true;
    }
    let (Some(device), Some(mac)) = (maps::device(skb.ifindex()), skb.load_at::<[u8; 6], 0>()) else { return false };
    found.entry_mac = mac;
    device.role == Role::BridgePort as u8 && flow::same_mac(&mac, &device.master_mac)
}

/// A TCP segment that opens nothing and belongs to no flow we know.
#[inline(always)]
fn mid_stream(seen: Seen) -> Outcome {
    if config::get().is_some_and(|c| c.flags & Config::KUBE_PROXY != 0) {
        return Outcome::ForeignConnection;
    }
    if seen.tcp_flags() & RST != 0 { Outcome::DropUnanswerable } else { Outcome::RejectNoFlow }
}

/// Chooses an endpoint and reserves the reply's tuple.
#[inline(always)]
fn choose<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, service: &Service, choice: &Choice) -> Outcome {
    let seed = config::get().map_or(0, |c| c.seed);
    let hash = hash::tuple(key, seed);
    if choice.moved && !choice.settled.is_empty() {
        // The run moved while this flow may be half open under the earlier one: it keeps the endpoint it had.
        if let Some(slot) = slot::<F>(service.port_id, choice.settled, hash::index(hash, choice.settled.len()))
            && let Some(outcome) = keep(skb, key, found, service.port_id, &slot)
        {
            return outcome;
        }
    }
    let first = hash::index(hash, choice.run.len());
    for attempt in 0..ATTEMPTS {
        let (index, sport) = candidate(attempt, first, choice.run.len(), hash, key.sport);
        if attempt != 0 && attempt < ENDPOINT_ATTEMPTS && index == first {
            continue;
        }
        let Some(slot) = slot::<F>(service.port_id, choice.run, index) else { return Outcome::DropSlotRace };
        fill(key, found, service.port_id, &slot, sport);
        if attempt != 0 || choice.moved {
            found.flags |= Flow::<F>::PINNED;
        }
        if let Err(outcome) = route::request(skb, key, found) {
            return outcome;
        }
        match claim(skb, key, found) {
            Reservation::Fresh => return Outcome::RequestNew,
            Reservation::Ours => return Outcome::RequestHalfOpen,
            Reservation::Full => return Outcome::DropFlowsFull,
            Reservation::Taken => {}
        }
    }
    Outcome::DropTupleClash
}

/// Index and source port of an attempt.
#[inline(always)]
fn candidate(attempt: u32, first: u32, len: u32, hash: u32, sport: u16) -> (u32, u16) {
    if attempt < ENDPOINT_ATTEMPTS {
        let index = first + attempt;
        // One subtraction folds it: the index is below len, and more attempts than endpoints come round to the first.
        return (if index >= len { if index - len >= len { first } else { index - len } } else { index }, sport);
    }
    (first, (SPARE_PORTS + (hash >> 4).wrapping_add(attempt * 797) % SPARE_PORT_COUNT) as u16)
}

/// Follows a half-open flow of the settled run, if its reply's tuple is held by it.
#[inline(always)]
fn keep<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, port_id: u32, slot: &Slot<F>) -> Option<Outcome> {
    let scratch = F::scratch()?;
    scratch.key = FlowKey::new(slot.addr, slot.port, key.src, key.sport, key.proto, Direction::Out);
    let held = F::new_flows().get_ptr(scratch.key)?;
    // SAFETY: the map's element; each field is read once.
    let held = unsafe { &*held };
    if held.src != key.dst || held.sport != key.dport || flow::is_stale(held.last_seen_secs) {
        return None;
    }
    if key.proto == timeout::UDP && maps::generation(slot.endpoint_id) != Some(slot.endpoint_gen) {
        return None;
    }
    fill(key, found, port_id, slot, key.sport);
    route::request(skb, key, found).ok()?;
    Some(Outcome::RequestHalfOpen)
}

/// One slot of a run. The owner is checked: a reader that is late finds another port's.
#[inline(always)]
fn slot<F: Maps>(port_id: u32, run: Run, index: u32) -> Option<Slot<F>> {
    let slot = F::slots().get_ptr(run.base().wrapping_add(index))?;
    // SAFETY: the map's element, copied out once. Slots are not reused before a grace period has passed.
    let slot = unsafe { *slot };
    (slot.owner == port_id).then_some(slot)
}

/// The owner entry of a flow to this endpoint.
#[inline(always)]
fn fill<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>, port_id: u32, slot: &Slot<F>, sport: u16) {
    found.src = key.src;
    found.sport = sport;
    found.dst = slot.addr;
    found.dport = slot.port;
    found.flags = 0;
    found.seen_client = 0;
    found.seen_server = 0;
    found.port_id = port_id;
    found.endpoint_id = slot.endpoint_id;
    found.endpoint_gen = slot.endpoint_gen;
    found.last_seen_secs = now_secs();
}

/// Reserves the reply's tuple, and the request's where the plain hash would not find the way again.
#[inline(always)]
fn claim<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &Flow<F>) -> Reservation {
    let Some(scratch) = F::scratch() else { return Reservation::Taken };
    reply_entry(key, found, scratch);
    if found.flags & Flow::<F>::REDIRECT != 0 {
        let Some(device) = maps::device(skb.ifindex()) else { return Reservation::Taken };
        scratch.value.flags = scratch.value.flags & !Flow::<F>::REDIRECT | Flow::<F>::REINJECT;
        scratch.value.ifindex = skb.ifindex();
        scratch.value.entry_mac = device.mac;
    }
    let reservation = reserve::reply(&scratch.key, &scratch.value);
    if found.flags & Flow::<F>::PINNED != 0
        && matches!(reservation, Reservation::Fresh | Reservation::Ours)
        && F::new_flows().insert(key, found, maps::ANY).is_err()
    {
        return Reservation::Full;
    }
    reservation
}

/// The reply's entry of an owner entry.
#[inline(always)]
fn reply_entry<F: Maps>(key: &FlowKey<F>, owner: &Flow<F>, scratch: &mut Scratch<F>) {
    scratch.key = owner.partner_key(key);
    scratch.value = *owner;
    scratch.value.src = key.dst;
    scratch.value.sport = key.dport;
    scratch.value.dst = key.src;
    scratch.value.dport = key.sport;
    scratch.value.flags |= Flow::<F>::REPLY;
}

/// A packet to an endpoint's own address. If a Service flow holds the reply's tuple, the source port is exchanged.
#[inline(always)]
fn direct<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    if key.proto == timeout::TCP && seen.tcp_flags() & (SYN | ACK | RST) != SYN {
        return Outcome::NotOurs;
    }
    if !is_held(&key.reversed(Direction::Out)) {
        return Outcome::NotOurs;
    }
    let hash = hash::tuple(key, 0);
    for attempt in ENDPOINT_ATTEMPTS..ATTEMPTS {
        let (_, sport) = candidate(attempt, 0, 1, hash, key.sport);
        *found = Flow {
            src: key.src,
            dst: key.dst,
            sport,
            dport: key.dport,
            flags: Flow::<F>::DIRECT | Flow::<F>::PINNED,
            last_seen_secs: now_secs(),
            ..Flow::EMPTY
        };
        let Some(scratch) = F::scratch() else { return Outcome::DropHelper };
        reply_entry(key, found, scratch);
        if matches!(reserve::reply(&scratch.key, &scratch.value), Reservation::Fresh | Reservation::Ours) {
            maps::note_direct_rewrite();
            if F::new_flows().insert(key, &*found, maps::ANY).is_err() {
                return Outcome::DropFlowsFull;
            }
            return Outcome::DirectRewritten;
        }
    }
    Outcome::DropTupleClash
}

/// True if a live Service flow expects its replies under this key.
#[inline(always)]
fn is_held<F: Maps>(reply_key: &FlowKey<F>) -> bool {
    let skip = Flow::<F>::DIRECT | Flow::<F>::HAIRPIN;
    if let Some(held) = F::flows().get_ptr(reply_key) {
        // SAFETY: the map's element; each field is read once.
        let held = unsafe { &*held };
        return held.flags & skip == 0 && reserve::is_live(reply_key, held);
    }
    match F::new_flows().get_ptr(reply_key) {
        // SAFETY: as above.
        Some(held) => unsafe { (*held).flags & skip == 0 && !flow::is_stale((*held).last_seen_secs) },
        None => false,
    }
}

macro_rules! subprogram {
    ($name:ident, $family:ty) => {
        /// Verified by itself, with its own stack.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff, key: *const FlowKey<$family>, found: *mut Flow<$family>, seen: u32) -> u32 {
            if key.is_null() || found.is_null() {
                return Outcome::DropHelper as u32;
            }
            // SAFETY: not null, and the verifier checks the caller's memory against the types' sizes.
            let (key, found) = unsafe { (&*key, &mut *found) };
            resolve::<$family>(&Skb::new(skb), key, found, Seen::from_bits(seen)) as u32
        }
    };
}

subprogram!(resolve_v4, V4);
subprogram!(resolve_v6, V6);

/// Everything that the pipeline needs of a family; [`resolve`] as a global subprogram.
pub(crate) trait Resolve: HalfOpen + Rewrite + Answer + Source {
    fn resolve(skb: &Skb, key: &FlowKey<Self>, found: &mut Flow<Self>, seen: Seen) -> Outcome;
}

macro_rules! dispatch {
    ($family:ty, $name:ident) => {
        impl Resolve for $family {
            #[inline(always)]
            fn resolve(skb: &Skb, key: &FlowKey<Self>, found: &mut Flow<Self>, seen: Seen) -> Outcome {
                Seen::outcome($name(skb.as_ptr(), key, found, seen.bits()))
            }
        }
    };
}

dispatch!(V4, resolve_v4);
dispatch!(V6, resolve_v6);
