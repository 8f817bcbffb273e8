//! From an outcome to what the tc hook returns: one match, and one place that counts.

use proxy_common::{Kind, Outcome};

use crate::maps;

/// `TCX_NEXT`, `TC_ACT_UNSPEC`: on to the next program.
pub(crate) const NEXT: i32 = -1;
/// `TCX_DROP`, `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// Where a packet that stays alive goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// On to the next program, as any packet does.
    Next,
    /// A redirect helper was called; this is what it returned.
    Redirected(i32),
}

/// Counts the outcome and returns the hook's verdict.
#[inline(always)]
pub(crate) fn finish(outcome: Outcome, leave: Leave) -> i32 {
    match outcome {
        Outcome::NotOurs => return NEXT,
        _ => maps::count(outcome),
    }
    match (outcome.kind(), leave) {
        (Kind::Drop, _) => DROP,
        (Kind::Pass, _) | (Kind::Translate, Leave::Next) => NEXT,
        // A reject leaves only as its answer.
        (Kind::Reject, Leave::Next) => DROP,
        (Kind::Translate | Kind::Reject, Leave::Redirected(verdict)) => verdict,
    }
}
