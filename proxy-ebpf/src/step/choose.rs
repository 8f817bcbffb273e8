//! The first packet of a flow: which endpoint, and which tuple.

use proxy_common::Outcome;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::algo::hash;

use super::service::Choice;
use super::{affinity, affinity::Recall, attempt::Attempt};
use crate::config;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};

/// Attempts at a free tuple: the plain choice and three other endpoints …
const ENDPOINT_ATTEMPTS: u32 = 4;
/// … then other source ports.
pub(crate) const SPARE_ATTEMPTS: u32 = 4;
/// Where source ports that had to be exchanged come from: above the default `ip_local_port_range`.
const SPARE_PORTS: u32 = 61_000;
const SPARE_PORT_COUNT: u32 = 4_536;

/// The source port of an attempt that exchanges it.
#[inline(always)]
pub(crate) const fn spare_port(hash: u32, attempt: u32) -> u16 {
    (SPARE_PORTS + (hash >> 4).wrapping_add(attempt * 797) % SPARE_PORT_COUNT) as u16
}

/// `found` comes with the port id, and leaves as the owner entry; what there is to choose from stands in `maps::choice`.
#[inline(always)]
fn choose<F: Needs>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Outcome {
    let Some(choice) = maps::choice() else { return Outcome::DropHelper };
    let port_id = found.port_id;
    let outcome = pick(skb, key, found, choice);
    match outcome {
        Outcome::RequestNew => maps::count_port(port_id, false),
        Outcome::RequestHalfOpen => {}
        _ => maps::count_port(port_id, true),
    }
    outcome
}

/// Chooses an endpoint and reserves the reply's tuple.
#[inline(always)]
fn pick<F: Needs>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, choice: &Choice) -> Outcome {
    let seed = config::get().map_or(0, |c| c.seed);
    let hash = if mutant!("rule-78-ports") { hash::endpoint(&key.src, 0, key.proto) } else { tuple_hash(key, seed) };
    let due = if choice.masquerade { Flow::<F>::MASQUERADE } else { 0 };
    if choice.moved && !choice.settled.is_empty() && !mutant!("unsettled") {
        // The run moved while this flow may be half open under the earlier one: it keeps the endpoint it had.
        let settled = choice.settled;
        (found.sport, found.flags) = (key.sport, due);
        let index = settled.base().wrapping_add(hash::index(hash, settled.len()));
        if F::attempt(skb, key, found, index, true) == Outcome::RequestHalfOpen {
            return Outcome::RequestHalfOpen;
        }
    }
    let run = choice.run;
    let affine = choice.affinity_secs != 0;
    let kept = affine
        && F::recall(key, found, run.base(), run.len(), choice.affinity_secs) == Outcome::RequestNew
        && !mutant!("rule-78");
    let first = match kept {
        true => found.ifindex,
        false if mutant!("rule-77") => 0,
        false if mutant!("rule-77-again") => maps::next_of(hash).checked_rem(run.len()).unwrap_or(0),
        false => hash::index(hash, run.len()),
    };
    for attempt in 0..ENDPOINT_ATTEMPTS + SPARE_ATTEMPTS {
        let (index, sport) = candidate(attempt, first, run.len(), hash, key.sport);
        if attempt != 0 && attempt < ENDPOINT_ATTEMPTS && (kept || index == first) {
            continue;
        }
        found.sport = if mutant!("rule-75") { sport ^ 1 } else { sport };
        found.flags = due | if attempt != 0 || choice.moved || affine { Flow::<F>::PINNED } else { 0 };
        let outcome = F::attempt(skb, key, found, run.base().wrapping_add(index), false);
        if outcome != Outcome::NotOurs {
            if affine && outcome == Outcome::RequestNew && !(kept && mutant!("rule-79")) {
                affinity::note(key, found, index);
            }
            return outcome;
        }
    }
    Outcome::DropTupleClash
}

/// The hash of a tuple, in a frame of its own: inlined, it keeps both addresses on the caller's stack.
#[inline(never)]
pub(crate) fn tuple_hash<F: Maps>(key: &FlowKey<F>, seed: u64) -> u32 {
    hash::tuple(key, seed)
}

/// Index and source port of an attempt.
#[inline(always)]
const fn candidate(attempt: u32, first: u32, len: u32, hash: u32, sport: u16) -> (u32, u16) {
    if attempt >= ENDPOINT_ATTEMPTS {
        return (first, spare_port(hash, attempt));
    }
    let index = first + attempt;
    // The index is below len, so one subtraction folds it; more attempts than endpoints come round to the first.
    if index < len {
        (index, sport)
    } else if index - len < len {
        (index - len, sport)
    } else {
        (first, sport)
    }
}

subprograms! {
    /// [`choose`] of a family, as a global subprogram.
    Choose: Needs => choose(skb;) as choose_v4, choose_v6
}

/// What [`choose`] needs of a family.
pub(crate) trait Needs: Attempt + Recall {}

impl<F: Attempt + Recall> Needs for F {}
