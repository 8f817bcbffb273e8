//! Fragments. The first one has the ports, and finds its flow; what it found is remembered by the datagram's
//! identification, and the later ones follow it. One that comes before the first is left to what its destination says:
//! to a ClusterIP it is dropped.

use proxy_common::Outcome;
use proxy_common::abi::{Flow, FlowKey};

use super::flow;
use super::rewrite::{self, Rewrite};
use crate::clock::{now_secs, secs_since};
use crate::ctx::tc::Skb;
use crate::maps::{self, Entry, Maps};
use crate::packet::{self, Parse};

/// As long as the kernel waits for the rest of a datagram (`net.ipv4.ipfrag_time`), seconds.
const TIMEOUT_SECS: u32 = 30;

/// The first fragment is translated by this flow.
#[inline(always)]
fn remember<F: Parse + Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Outcome {
    let Some(Entry { key: room, value, partner }) = F::reply() else { return Outcome::DropHelper };
    if mutant!("rule-102") {
        return Outcome::NotOurs;
    }
    let Some(id) = packet::fragment_id::<F, _>(skb, room) else { return Outcome::NotOurs };
    datagram(key, id, partner);
    *value = *found;
    value.last_seen_secs = now_secs();
    // An LRU map takes the place of its oldest entry; if it cannot, the later fragments are lost like any packet.
    if F::fragments().insert(&*partner, &*value, maps::ANY).is_err() {}
    Outcome::NotOurs
}

/// A later fragment: becomes what the first one of its datagram became, whose flow is copied out.
#[inline(always)]
fn follow<F: Rewrite + Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, id: u32) -> Outcome {
    let Some(Entry { partner, .. }) = F::reply() else { return Outcome::DropHelper };
    datagram(key, id, partner);
    let Some(flow) = F::fragments().get_ptr(&*partner) else { return Outcome::NotOurs };
    // SAFETY: the map's element, copied out once.
    *found = unsafe { *flow };
    if secs_since(found.last_seen_secs) > TIMEOUT_SECS {
        return Outcome::NotOurs;
    }
    if found.flags & Flow::<F>::REPLY == 0 && !flow::is_for_us(skb, key, found) {
        return Outcome::LayerTwoTransit;
    }
    // SAFETY: working memory.
    match unsafe { rewrite::apply_addresses(skb, key, found) } {
        Ok(()) => Outcome::Fragment,
        Err(_) => Outcome::DropHelper,
    }
}

/// A datagram's key: its identification stands in the place of the ports.
#[inline(always)]
pub(crate) fn datagram<F: Maps>(key: &FlowKey<F>, id: u32, out: &mut FlowKey<F>) {
    *out = *key;
    out.sport = (id >> 16) as u16;
    out.dport = id as u16;
}

/// What this file needs of a family.
pub(crate) trait Needs: Parse + Rewrite + Maps {}

impl<F: Parse + Rewrite + Maps> Needs for F {}

subprograms! {
    /// [`remember`] of a family, as a global subprogram.
    Remember: Needs => remember(skb;) as remember_v4, remember_v6
}

subprograms! {
    /// [`follow`] of a family, as a global subprogram.
    Follow: Needs => follow(skb; id: u32) as follow_v4, follow_v6
}
