//! From an outcome to what the tc hook returns: one match, and one place that counts.

use proxy_common::{Kind, Outcome};

use crate::ctx::tc::Skb;
use crate::maps;

/// `TCX_NEXT`, `TC_ACT_UNSPEC`: on to the next program.
pub(crate) const NEXT: i32 = -1;
/// `TCX_DROP`, `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// Where a packet that stays alive goes: what a redirect helper returned, or [`Leave::NEXT`].
///
/// A number and not an enum: an enum's payload is undefined in its other variants, and the verifier refuses to copy
/// what was never written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leave(i32);

impl Leave {
    /// On to the next program, as any packet does.
    pub(crate) const NEXT: Self = Self(NEXT);

    /// A redirect helper was called.
    #[inline(always)]
    pub(crate) const fn redirected(verdict: i32) -> Self {
        Self(verdict)
    }
}

/// Counts the outcome and returns the hook's verdict.
#[inline(always)]
pub(crate) fn finish(skb: &Skb, outcome: Outcome, leave: Leave) -> i32 {
    log(skb, outcome);
    if outcome == Outcome::NotOurs {
        return NEXT;
    }
    maps::count(outcome);
    match outcome.kind() {
        Kind::Drop => DROP,
        Kind::Pass => NEXT,
        // A reject leaves only as its answer.
        Kind::Reject if leave == Leave::NEXT => DROP,
        Kind::Translate | Kind::Reject => leave.0,
    }
}

/// One line per packet that may be ours, in the debug build alone: feature `log`, read from
/// `/sys/kernel/tracing/trace_pipe`.
#[inline(always)]
fn log(skb: &Skb, outcome: Outcome) {
    #[cfg(feature = "log")]
    // SAFETY: the arguments are as the format says.
    unsafe {
        aya_ebpf::bpf_printk!(c"fairlead: outcome %u, device %u, %u bytes", outcome as u32, skb.ifindex(), skb.len());
    }
    #[cfg(not(feature = "log"))]
    let _: (&Skb, Outcome) = (skb, outcome);
}
