//! Every outcome is reached by a test, and that test is named here.

use fairlead_tests::packet::{Wire, seen_outcomes};
use proxy_agent::model::IpFamily;
use proxy_common::Outcome;

use crate::{bridge, classes, flows, headers, icmp, limits, masquerade, node, policy, reject, tuples};

/// A test that shows this outcome. A new outcome does not compile before it has one.
fn shown_by(outcome: Outcome) -> fn() {
    match outcome {
        Outcome::NotOurs => || headers::a_packet_to_anybody_else_that_is_cut_off_is_left_alone(Wire::UDP_V4),
        Outcome::LayerTwoTransit => || bridge::pitfall_p1_10_a_frame_in_transit_is_left_alone(Wire::TCP_V4),
        Outcome::Malformed => || headers::a_header_that_makes_no_sense_is_left_to_the_kernel(IpFamily::V4),
        Outcome::ForeignConnection => {
            || reject::pitfall_p1_13_a_connection_that_began_under_kube_proxy_is_left_to_its_rules(IpFamily::V4)
        }
        Outcome::RequestNew | Outcome::Request | Outcome::ReplyHalfOpen | Outcome::Reply => {
            || flows::the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service(Wire::TCP_V4)
        }
        Outcome::RequestHalfOpen => || flows::a_second_packet_before_the_reply_goes_to_the_same_endpoint(Wire::TCP_V4),
        Outcome::ReplyReset => || flows::a_reset_from_the_endpoint_does_not_confirm_a_flow(IpFamily::V4),
        Outcome::DirectRewritten => {
            || tuples::pitfall_p1_2_a_direct_packet_on_a_services_tuple_gets_another_port(Wire::TCP_V4)
        }
        Outcome::Masqueraded | Outcome::Unmasqueraded => {
            || masquerade::rule_68_a_node_port_masquerades_a_client_outside(Wire::TCP_V4)
        }
        Outcome::DropNoSourcePort => {
            || masquerade::when_every_port_is_taken_the_packet_is_dropped_and_others_live(Wire::TCP_V4)
        }
        Outcome::IcmpError => || icmp::an_error_from_beyond_the_endpoint_quotes_the_service_to_the_client(Wire::UDP_V4),
        Outcome::DropRedirect => icmp::a_redirect_that_names_the_endpoint_is_dropped,
        Outcome::Fragment => || headers::later_fragments_follow_the_first(Wire::UDP_V4),
        Outcome::DropSourceRange => || classes::rule_21_a_client_in_no_source_range_is_dropped(Wire::TCP_V4),
        Outcome::DropUnallocated => || classes::an_address_of_a_service_cidr_that_nobody_has_is_dropped(IpFamily::V4),
        Outcome::RejectNoEndpoint => || reject::rule_54_a_syn_without_any_endpoint_is_reset(IpFamily::V4),
        Outcome::RejectUnknownPort => || reject::rule_66_an_unknown_port_of_a_cluster_ip_is_refused(IpFamily::V4),
        Outcome::RejectNoFlow => || reject::pitfall_p1_13_a_segment_in_mid_stream_without_a_flow_is_reset(IpFamily::V4),
        Outcome::DropNoLocalEndpoint => || policy::rule_54_a_local_policy_without_an_endpoint_here_drops(Wire::TCP_V4),
        Outcome::FlowsFull => || limits::when_flows_is_full_new_flows_work_half_open(Wire::TCP_V4),
        Outcome::DropTupleClash => || tuples::when_every_tuple_is_taken_the_packet_is_dropped(Wire::TCP_V4),
        Outcome::DropSlotRace => || limits::pitfall_p1_7_a_slot_that_changed_hands_is_not_used(Wire::TCP_V4),
        Outcome::DropFragment => || headers::a_later_fragment_to_a_cluster_ip_is_dropped(Wire::TCP_V4),
        Outcome::DropTruncated => || headers::a_packet_to_a_cluster_ip_that_is_cut_off_is_dropped(Wire::TCP_V4),
        Outcome::DropNoRoute => || node::an_endpoint_that_no_route_leads_to_is_dropped(Wire::TCP_V4),
        Outcome::DropHelper => || headers::a_packet_that_cannot_be_rewritten_is_dropped(IpFamily::V4),
        Outcome::DropRejectLimit => || reject::answers_are_limited(IpFamily::V4),
        Outcome::DropUnanswerable => || reject::a_reset_without_a_flow_is_not_answered(IpFamily::V4),
    }
}

#[test]
fn every_outcome_is_reached() {
    for outcome in Outcome::ALL {
        // On a thread of its own: what it saw is its own as well.
        let seen = std::thread::spawn(move || {
            shown_by(*outcome)();
            seen_outcomes()
        });
        let seen = seen.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        assert!(seen.contains(outcome), "the test of {outcome:?} shows only {seen:?}");
    }
}
