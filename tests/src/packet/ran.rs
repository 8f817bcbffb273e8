//! What a run did, and the assertions on it: each compares everything, and shows everything when it fails.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;

use proxy_common::abi::tc_index;
use proxy_common::{Kind, Outcome};

use super::build::Packet;
use super::kernel::{Left, Meta};
use super::node::Node;
use super::show::{show, sockets, verify_checksums};

/// `TCX_NEXT`.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const DROP: i32 = 2;
/// `TC_ACT_REDIRECT`.
const REDIRECT: i32 = 7;

thread_local! {
    static SEEN: RefCell<BTreeSet<Outcome>> = const { RefCell::new(BTreeSet::new()) };
}

/// The outcomes that assertions of this thread have confirmed so far.
pub fn seen_outcomes() -> BTreeSet<Outcome> {
    SEEN.with_borrow(Clone::clone)
}

/// Where a packet meets the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Ingress,
    Egress,
}

/// One packet's run through one hook.
#[must_use = "a run that nobody looks at shows nothing"]
pub struct Ran<'a> {
    node: &'a Node,
    hook: Hook,
    what: String,
    sent: Vec<u8>,
    meta: Meta,
    left: Left,
    counted: BTreeMap<u32, u64>,
    /// What `tc_index` is if the programs have nothing to say: ingress clears it, egress keeps it.
    told_before: u16,
}

impl<'a> Ran<'a> {
    pub(super) fn new(
        node: &'a Node,
        hook: Hook,
        what: String,
        sent: Vec<u8>,
        meta: Meta,
        left: Left,
        before: &BTreeMap<u32, u64>,
    ) -> Self {
        let counted = node
            .maps
            .counters()
            .into_iter()
            .map(|(code, count)| (code, count - before.get(&code).copied().unwrap_or(0)))
            .filter(|(_, delta)| *delta != 0)
            .collect();
        let told_before = if hook == Hook::Ingress { tc_index::NOT_OURS } else { meta.tc_index };
        Self { node, hook, what, sent, meta, left, counted, told_before }
    }

    /// The frame as it left the hook.
    pub fn bytes(&self) -> &[u8] {
        &self.left.bytes
    }

    /// Where it goes now; for cases in which several endpoints could have been chosen.
    #[track_caller]
    pub fn destination(&self) -> SocketAddr {
        self.sockets().1
    }

    /// Where it seems to come from now; for cases in which a port was exchanged.
    #[track_caller]
    pub fn source(&self) -> SocketAddr {
        self.sockets().0
    }

    #[track_caller]
    fn sockets(&self) -> (SocketAddr, SocketAddr) {
        match sockets(&self.left.bytes) {
            Some(sockets) => sockets,
            None => panic!("{}", self.report("it should have ports", None)),
        }
    }

    /// What the run counted.
    pub fn counted(&self) -> Vec<Outcome> {
        self.counted.keys().filter_map(|code| Outcome::from_code(*code)).collect()
    }

    /// True if the packet goes on by the stack.
    pub const fn goes_on(&self) -> bool {
        self.left.verdict == NEXT
    }

    /// What the packet tells the egress hook.
    pub const fn tc_index(&self) -> u16 {
        self.left.tc_index
    }

    /// What `skb->mark` is now.
    pub const fn mark(&self) -> u32 {
        self.left.mark
    }

    /// It goes on to the stack as `expected`.
    #[track_caller]
    pub fn becomes(self, outcome: Outcome, expected: &Packet) {
        assert_eq!(outcome.kind(), Kind::Translate, "{outcome:?} translates nothing");
        let told = self.told(outcome);
        self.compare(NEXT, &[outcome], told, &expected.bytes());
    }

    /// It goes on to the stack as `expected`, and egress is told to exchange its source.
    #[track_caller]
    pub fn becomes_due(self, outcome: Outcome, expected: &Packet) {
        assert_eq!(outcome.kind(), Kind::Translate, "{outcome:?} translates nothing");
        self.compare(NEXT, &[outcome], tc_index::REQUEST_SNAT, &expected.bytes());
    }

    /// It goes back by its device as `expected`, and egress is told this.
    #[track_caller]
    pub fn goes_back(self, outcome: Outcome, told: u16, expected: &Packet) {
        self.compare(REDIRECT, &[outcome], told, &expected.bytes());
    }

    /// It goes on as `expected`, on the way of a flow's replies.
    #[track_caller]
    pub fn becomes_reply(self, outcome: Outcome, expected: &Packet) {
        self.compare(NEXT, &[outcome], tc_index::REPLY, &expected.bytes());
    }

    /// It goes on as `expected`, and egress is to look at it as at any other packet.
    #[track_caller]
    pub fn becomes_between(self, outcome: Outcome, expected: &Packet) {
        self.compare(NEXT, &[outcome], tc_index::NOT_OURS, &expected.bytes());
    }

    /// It is sent past the stack as `expected`, on the way of a flow's replies.
    #[track_caller]
    pub fn is_redirected_as_reply(self, outcome: Outcome, expected: &Packet) {
        self.compare(REDIRECT, &[outcome], tc_index::REPLY, &expected.bytes());
    }

    /// A request that was due goes on as it came, and no other hook looks at it again.
    #[track_caller]
    pub fn is_left_to_others(self) {
        let sent = self.sent.clone();
        self.compare(NEXT, &[], tc_index::REQUEST, &sent);
    }

    /// It is sent past the stack as `expected`.
    #[track_caller]
    pub fn is_redirected(self, outcome: Outcome, expected: &Packet) {
        assert_eq!(outcome.kind(), Kind::Translate, "{outcome:?} translates nothing");
        let told = self.told(outcome);
        self.compare(REDIRECT, &[outcome], told, &expected.bytes());
    }

    /// It is refused: `answer` goes back where the packet came from.
    #[track_caller]
    pub fn is_answered(self, outcome: Outcome, answer: &Packet) {
        assert_eq!(outcome.kind(), Kind::Reject, "{outcome:?} is no reject");
        self.compare(REDIRECT, &[outcome], tc_index::REPLY, &answer.bytes());
    }

    /// It vanishes, and only this is counted.
    #[track_caller]
    pub fn is_dropped(self, outcome: Outcome) {
        assert_eq!(outcome.kind(), Kind::Drop, "{outcome:?} is no drop");
        let told = self.left.tc_index;
        // One that the kernel refused to change may be changed by half.
        let half_done = outcome == Outcome::DropHelper;
        let expected = if half_done { self.left.bytes.clone() } else { self.sent.clone() };
        self.compare(DROP, &[outcome], told, &expected);
    }

    /// It goes on as it came, and this is counted.
    #[track_caller]
    pub fn passes(self, outcome: Outcome) {
        assert_eq!(outcome.kind(), Kind::Pass, "{outcome:?} is no pass");
        let sent = self.sent.clone();
        self.compare(NEXT, &[outcome], tc_index::NOT_OURS, &sent);
    }

    /// It is none of our business: it goes on as it came, and nothing is counted.
    #[track_caller]
    pub fn is_left_alone(self) {
        let sent = self.sent.clone();
        let told = self.told_before;
        self.compare(NEXT, &[], told, &sent);
        SEEN.with_borrow_mut(|seen| seen.insert(Outcome::NotOurs));
    }

    /// Something else was expected: shows everything.
    #[track_caller]
    pub fn fails(self, why: &str) -> ! {
        panic!("{}", self.report(why, None))
    }

    fn told(&self, outcome: Outcome) -> u16 {
        match outcome {
            Outcome::FlowsFull if self.hook == Hook::Egress => tc_index::REPLY,
            Outcome::Unmasqueraded => tc_index::NOT_OURS,
            Outcome::Reply | Outcome::ReplyHalfOpen | Outcome::ReplyReset => tc_index::REPLY,
            _ => tc_index::REQUEST,
        }
    }

    #[track_caller]
    fn compare(self, verdict: i32, outcomes: &[Outcome], told: u16, expected: &[u8]) {
        let mut wrong = Vec::new();
        let counted: BTreeMap<u32, u64> = outcomes.iter().map(|outcome| (*outcome as u32, 1)).collect();
        if self.counted != counted {
            wrong.push(format!("it should count {outcomes:?}"));
        }
        if self.left.verdict != verdict {
            wrong.push(format!("the verdict should be {}", show_verdict(verdict)));
        }
        if self.left.tc_index != told {
            wrong.push(format!("tc_index should be {told}"));
        }
        if self.left.bytes != expected {
            wrong.push("the frame differs".to_owned());
        }
        if self.left.mark != self.meta.mark && !self.node.marks_replies() {
            wrong.push(format!("the mark should be {:#x} as before, not {:#x}", self.meta.mark, self.left.mark));
        }
        // An answer is a new packet; everything else keeps its segments.
        if verdict != REDIRECT && self.left.gso != (self.meta.gso_size, self.meta.gso_segs) {
            wrong.push(format!("the segments should be {:?}", (self.meta.gso_size, self.meta.gso_segs)));
        }
        if !wrong.is_empty() {
            panic!("{}", self.report(&wrong.join("; "), Some(expected)));
        }
        SEEN.with_borrow_mut(|seen| seen.extend(outcomes));
    }

    fn report(&self, why: &str, expected: Option<&[u8]>) -> String {
        let mut out = format!("a packet {}: {why}\n", self.what);
        let mut line = |text: String| writeln!(out, "{text}").expect("strings take everything");
        line(format!("  it was\n{}", show(&self.sent)));
        let counted: Vec<_> = self.counted.iter().map(|(code, n)| (Outcome::from_code(*code), *code, *n)).collect();
        line(format!(
            "  verdict {}, tc_index {}, counted {counted:?}, segments {:?}",
            show_verdict(self.left.verdict),
            self.left.tc_index,
            self.left.gso
        ));
        line(format!("  it became\n{}", show(&self.left.bytes)));
        if let Some(expected) = expected
            && expected != self.left.bytes
        {
            line(format!("  expected was\n{}", show(expected)));
            line(format!("  they differ at {}", differences(&self.left.bytes, expected)));
        }
        if let Err(problem) = verify_checksums(&self.left.bytes) {
            line(format!("  {problem}"));
        }
        line(format!("  state afterwards\n{}", self.node.maps.describe()));
        out
    }
}

fn show_verdict(verdict: i32) -> String {
    match verdict {
        NEXT => "next".to_owned(),
        DROP => "drop".to_owned(),
        REDIRECT => "redirect".to_owned(),
        other => other.to_string(),
    }
}

fn differences(got: &[u8], expected: &[u8]) -> String {
    let at: Vec<_> = (0..got.len().max(expected.len()))
        .filter(|i| got.get(*i) != expected.get(*i))
        .map(|i| format!("{i:#x}"))
        .collect();
    at.join(" ")
}
