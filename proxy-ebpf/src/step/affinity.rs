//! `sessionAffinity: ClientIP`: a client keeps the endpoint that it was given, for a time that each of its new
//! connections begins anew (rules 78–84).

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use proxy_common::abi::{Affinity, AffinityKey, Flow, FlowKey};
use proxy_common::{Address as _, Outcome};

use crate::clock::{now_secs, secs_since};
use crate::maps::{self, Maps};

/// Slots that are searched for an endpoint whose place in the run has changed; beyond, the client gets another one.
const SEARCHED: u32 = 1_024;

/// The endpoint that the client has. `RequestNew`: its place in the run stands in `found.ifindex`; `NotOurs`: none, or none
/// that the run offers (rule 80).
#[inline(always)]
fn recall<F: Maps>(key: &FlowKey<F>, found: &mut Flow<F>, base: u32, len: u32, timeout_secs: u32) -> Outcome {
    let client = client(key, found);
    let Some(held) = F::affinities().get_ptr(&client) else { return Outcome::NotOurs };
    // SAFETY: the map's element, copied out once; a torn value names an endpoint that the slot contradicts.
    let Affinity { endpoint_id, endpoint_gen, index, last_new_secs } = unsafe { *held };
    if (secs_since(last_new_secs) >= timeout_secs && !mutant!("rule-79-never"))
        || maps::generation(endpoint_id) != Some(endpoint_gen)
    {
        return Outcome::NotOurs;
    }
    if index < len && holds::<F>(base.wrapping_add(index), endpoint_id) {
        found.ifindex = index;
        return Outcome::RequestNew;
    }
    let mut search = Search { base, len, endpoint_id, index: NOWHERE };
    let (callback, context) = (compare::<F> as *mut c_void, (&raw mut search).cast());
    // SAFETY: the helper calls `compare` with this context. A loop of our own would be walked by the verifier, a thousand
    // times over.
    unsafe { bpf_loop(SEARCHED, callback, context, 0) };
    if search.index == NOWHERE {
        return Outcome::NotOurs;
    }
    found.ifindex = search.index;
    Outcome::RequestNew
}

/// What is searched for in a run.
#[repr(C)]
struct Search {
    base: u32,
    len: u32,
    endpoint_id: u32,
    /// Where it was found.
    index: u32,
}

const NOWHERE: u32 = u32::MAX;

/// One slot of the run; 1 ends the search.
extern "C" fn compare<F: Maps>(index: u32, search: *mut Search) -> i64 {
    // SAFETY: the helper hands on what it was given.
    let search = unsafe { &mut *search };
    if index >= search.len {
        return 1;
    }
    if !holds::<F>(search.base.wrapping_add(index), search.endpoint_id) {
        return 0;
    }
    search.index = index;
    1
}

/// Whose affinity it is.
#[inline(always)]
fn client<F: Maps>(key: &FlowKey<F>, found: &Flow<F>) -> AffinityKey<F> {
    let port_id = if mutant!("rule-78-classes") { key.dst.words()[0] } else { found.port_id };
    AffinityKey { client: key.src.copied(), port_id }
}

/// True if this slot is the endpoint's.
#[inline(always)]
fn holds<F: Maps>(index: u32, endpoint_id: u32) -> bool {
    // SAFETY: the map's element; one word is read.
    F::slots()
        .get_ptr(index)
        .is_some_and(|slot| unsafe { (&raw const (*slot).endpoint_id).read_volatile() } == endpoint_id)
}

/// A new connection of the client has this endpoint.
#[inline(never)]
pub(crate) fn note<F: Maps>(key: &FlowKey<F>, found: &Flow<F>, index: u32) {
    let client = client(key, found);
    let value =
        Affinity { endpoint_id: found.endpoint_id, endpoint_gen: found.endpoint_gen, index, last_new_secs: now_secs() };
    // An LRU map takes the place of its oldest entry; if it cannot, this client is balanced once more.
    if F::affinities().insert(&client, &value, if mutant!("rule-81") { maps::NOEXIST } else { maps::ANY }).is_err() {}
}

subprograms! {
    /// [`recall`] of a family, as a global subprogram.
    Recall: Maps => recall(; base: u32, len: u32, timeout_secs: u32) as recall_v4, recall_v6
}
