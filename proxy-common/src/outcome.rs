//! What became of a packet: one stable code for counters, metrics, `fairlead trace` and tests.

/// How an outcome leaves the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Untouched, on to the next program.
    Pass,
    /// Addresses exchanged, on its way.
    Translate,
    /// Answered with a TCP RST or an ICMP port unreachable.
    Reject,
    /// Silently dropped.
    Drop,
}

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $kind:ident, $name:literal;)+) => {
        /// The result of one run of a program. Codes are ABI: they never move, a retired one is not used again.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[must_use]
        pub enum Outcome { $($(#[doc = $doc])+ $variant = $code),+ }

        impl Outcome {
            /// Every outcome, in order of its code.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable label used by counters and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// One sentence for people.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+)),+ }
            }

            /// How the packet leaves.
            #[inline(always)]
            pub const fn kind(self) -> Kind {
                match self { $(Self::$variant => Kind::$kind),+ }
            }

            /// The outcome with this code.
            pub const fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

outcomes! {
    /// No address of ours. Not counted.
    NotOurs = 0, Pass, "not_ours";
    /// A bridged frame that is not addressed to this host: left alone.
    LayerTwoTransit = 1, Pass, "layer2_transit";
    /// Too short or inconsistent to parse: the kernel judges it.
    Malformed = 2, Pass, "malformed";
    /// A TCP segment of a connection that began under kube-proxy, whose rules still stand.
    ForeignConnection = 3, Pass, "foreign_connection";

    /// First packet of a flow: an endpoint was chosen.
    RequestNew = 10, Translate, "request_new";
    /// A request of a flow that is not confirmed yet.
    RequestHalfOpen = 11, Translate, "request_half_open";
    /// A request of a confirmed flow.
    Request = 12, Translate, "request";
    /// A reply of a flow that is not confirmed yet.
    ReplyHalfOpen = 13, Translate, "reply_half_open";
    /// A reply of a confirmed flow.
    Reply = 14, Translate, "reply";
    /// The endpoint resets a TCP connection that is not confirmed yet.
    ReplyReset = 15, Translate, "reply_reset";
    /// A packet to an endpoint's own address whose source port was exchanged, because the tuple belongs to a Service flow.
    DirectRewritten = 16, Translate, "direct_rewritten";

    /// A packet that would confirm its flow, but `FLOWS` is full: the flow works on half open, and may be forgotten.
    FlowsFull = 17, Translate, "flows_full";

    /// A request whose source became the node's on its way out.
    Masqueraded = 18, Translate, "masqueraded";
    /// A reply to a masqueraded request, given back its destination.
    Unmasqueraded = 19, Translate, "unmasqueraded";
    /// An ICMP error about a translated packet, made to quote what its sender knows.
    IcmpError = 20, Translate, "icmp_error";
    /// A later fragment, translated as the first one was.
    Fragment = 21, Translate, "fragment";

    /// The Service has no usable endpoint anywhere.
    RejectNoEndpoint = 30, Reject, "reject_no_endpoint";
    /// A ClusterIP, but no such port or protocol.
    RejectUnknownPort = 31, Reject, "reject_unknown_port";
    /// A TCP segment in mid-stream that belongs to no flow.
    RejectNoFlow = 32, Reject, "reject_no_flow";

    /// A Local policy, and no endpoint on this node.
    DropNoLocalEndpoint = 50, Drop, "drop_no_local_endpoint";
    // 51 was a full flow table.
    /// Every tuple that was tried belongs to a live flow.
    DropTupleClash = 52, Drop, "drop_tuple_clash";
    /// The endpoint's slot changed hands while it was read, twice.
    DropSlotRace = 53, Drop, "drop_slot_race";
    /// A fragment without ports, addressed to a Service.
    DropFragment = 54, Drop, "drop_fragment";
    /// A packet to a Service whose layer 4 header is cut off.
    DropTruncated = 55, Drop, "drop_truncated";
    /// The node has no route to the endpoint.
    DropNoRoute = 56, Drop, "drop_no_route";
    /// A kernel helper refused to change the packet.
    DropHelper = 57, Drop, "drop_helper";
    /// An answer was due, but the limit on answers per second is reached.
    DropRejectLimit = 58, Drop, "drop_reject_limit";
    /// An answer was due, but this packet must not be answered (an ICMP error, a multicast or a reset).
    DropUnanswerable = 59, Drop, "drop_unanswerable";
    /// The client is in none of the Service's `loadBalancerSourceRanges`.
    DropSourceRange = 60, Drop, "drop_source_range";
    /// An address of a ServiceCIDR that no Service has.
    DropUnallocated = 61, Drop, "drop_unallocated";
    /// Every source port that was tried for the masquerade is in use.
    DropNoSourcePort = 62, Drop, "drop_no_source_port";
    /// An ICMP redirect that would name an endpoint as the shorter way to a Service.
    DropRedirect = 63, Drop, "drop_redirect";
}

/// Size of the counter array: codes stay below it.
pub const CODES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_fit_the_counters() {
        for pair in Outcome::ALL.windows(2) {
            assert!((pair[0] as u32) < pair[1] as u32, "{pair:?} out of order");
        }
        for outcome in Outcome::ALL {
            assert!((*outcome as u32) < CODES);
            assert_eq!(Outcome::from_code(*outcome as u32), Some(*outcome));
        }
    }

    #[test]
    fn names_say_the_kind() {
        for outcome in Outcome::ALL {
            let name = outcome.name();
            match outcome.kind() {
                Kind::Reject => assert!(name.starts_with("reject_"), "{name}"),
                Kind::Drop => assert!(name.starts_with("drop_"), "{name}"),
                Kind::Pass | Kind::Translate => {
                    assert!(!name.starts_with("reject_") && !name.starts_with("drop_"), "{name}");
                }
            }
        }
    }
}
