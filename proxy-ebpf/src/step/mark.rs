//! Replies leave by the uplink on which their requests arrived, where the routes alone would choose another: bits of
//! `skb->mark` tell a rule of the node (`--reply-mark`).

use proxy_common::abi::{Flow, FlowKey};

use super::flow::read;
use super::fragment;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};
use crate::packet::Parse;

/// The bits of `skb->mark` that are ours, which the loader stores before it loads: to the verifier it is a constant, and
/// without any, nothing of this file is in the kernel.
#[unsafe(no_mangle)]
pub(crate) static REPLY_MARK: u32 = 0;

/// The bits that are ours.
#[inline(always)]
pub(crate) fn mask() -> u32 {
    // SAFETY: a static; volatile, because its value is not the one that is compiled in.
    unsafe { (&raw const REPLY_MARK).read_volatile() }
}

/// Marks the packet if it is a reply that only its way out will translate.
#[inline(always)]
pub(crate) fn reply<F: Maps>(skb: &Skb, key: &FlowKey<F>) {
    let held = F::flows().get_ptr(key).or_else(|| F::new_flows().get_ptr(key));
    if let Some(held) = held {
        as_of(skb, held);
    }
}

/// The same of a later fragment, whose first one has gone ahead.
#[inline(always)]
pub(crate) fn later_fragment<F: Parse + Maps>(skb: &Skb, key: &FlowKey<F>, id: u32) {
    let Some(work) = F::reply() else { return };
    fragment::datagram(key, id, &mut work.partner);
    if let Some(held) = F::fragments().get_ptr(&work.partner) {
        as_of(skb, held);
    }
}

#[inline(always)]
fn as_of<F: Maps>(skb: &Skb, held: *const Flow<F>) {
    let elsewhere = Flow::<F>::REINJECT | Flow::<F>::HAIRPIN | Flow::<F>::BRIDGED | Flow::<F>::MASQUERADED;
    if read!(held, flags) & (Flow::<F>::REPLY | elsewhere) != Flow::<F>::REPLY {
        return;
    }
    let Some(uplink) = maps::device(read!(held, ifindex)) else { return };
    if uplink.reply_mark != 0 {
        skb.set_mark(skb.mark() & !mask() | uplink.reply_mark & mask());
    }
}
