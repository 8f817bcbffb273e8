//! kube-proxy's own table of endpoint choices, in our words: rules 45, 51–59.

use super::*;
use crate::model::{Endpoint, Hint, IpFamily, ObjectName, SlicePort, Trigger};

/// Conditions of an endpoint by one letter, capitals are on this node: `r` ready; `t` serving and terminating; `b`
/// ready although terminating; `d` terminating and no longer serving; `n` not ready, serving; `x` nothing at all.
fn candidates(letters: &str) -> Vec<Candidate> {
    let candidate = |(i, letter): (usize, char)| {
        let kind = letter.to_ascii_lowercase();
        Candidate {
            addr: [10, 0, 0, i as u8 + 1].into(),
            port: 80,
            ready: matches!(kind, 'r' | 'b'),
            serving: matches!(kind, 'r' | 't' | 'b' | 'n'),
            terminating: matches!(kind, 't' | 'b' | 'd'),
            local: letter.is_ascii_uppercase(),
            for_node: Hint::None,
            for_zone: Hint::None,
        }
    };
    letters.chars().enumerate().map(candidate).collect()
}

/// The last octets of the addresses.
fn numbers(list: &[Candidate]) -> Vec<u8> {
    let last = |c: &Candidate| match c.addr {
        IpAddr::V4(addr) => addr.octets()[3],
        IpAddr::V6(_) => 0,
    };
    list.iter().map(last).collect()
}

/// What it shows, the endpoints, numbers of those in the cluster list and in the local list, any usable.
type Row = (&'static str, &'static str, &'static [u8], &'static [u8], bool);

#[test]
fn endpoints_fall_into_the_lists_that_kube_proxy_has() {
    let table: &[Row] = &[
        ("no endpoint at all", "", &[], &[], false),
        ("all ready, all elsewhere", "rr", &[1, 2], &[], true),
        ("all ready, all here", "RR", &[1, 2], &[1, 2], true),
        ("all ready, some here", "rR", &[1, 2], &[2], true),
        ("none ready, none serving while it terminates", "nn", &[], &[], false),
        ("some ready", "rn", &[1], &[], true),
        ("all terminating, elsewhere: the fallback", "tt", &[1, 2], &[], true),
        ("all terminating, here: the fallback of both", "TT", &[1, 2], &[1, 2], true),
        ("rule 52: one ready endpoint bars every terminating one", "rtT", &[1], &[3], true),
        ("rule 51: ready elsewhere, terminating here: the lists fall back independently", "rT", &[1], &[2], true),
        ("ready here, terminating elsewhere", "Rt", &[1], &[1], true),
        ("local list: a ready one bars the terminating", "RTr", &[1, 3], &[1], true),
        ("terminating elsewhere only", "tn", &[1], &[], true),
        ("rule 53: ready although terminating counts as ready", "bT", &[1], &[2], true),
        ("rule 53: not ready, serving and not terminating is never used", "N", &[], &[], false),
        ("terminating and no longer serving is not used", "Dd", &[], &[], false),
        ("neither ready nor serving", "X", &[], &[], false),
        ("one dead, one draining here", "DT", &[2], &[2], true),
    ];
    for (name, letters, cluster, local, any) in table {
        let categories = categorize(&candidates(letters));
        assert_eq!(numbers(&categories.cluster), *cluster, "{name}: cluster");
        assert_eq!(numbers(&categories.local), *local, "{name}: local");
        assert_eq!(categories.any, *any, "{name}: any");
    }
}

/// Hints of an endpoint, one word each: `-` none, else zones and, behind a slash, nodes, of which `Z` and `N` are here.
fn hinted(letters: &str, hints: &str) -> Vec<Candidate> {
    let names =
        |text: &str, here: &str| Hint::of(text.split(',').filter(|name| !matches!(*name, "" | "-")), Some(here));
    let mut found = candidates(letters);
    for (candidate, hints) in found.iter_mut().zip(hints.split(' ')) {
        let (zones, nodes) = hints.split_once('/').unwrap_or((hints, ""));
        (candidate.for_zone, candidate.for_node) = (names(zones, "Z"), names(nodes, "N"));
    }
    found
}

/// What it shows, the endpoints, their hints, numbers of those in the cluster list and in the local list.
type HintedRow = (&'static str, &'static str, &'static str, &'static [u8], &'static [u8]);

#[test]
fn rule_56_hints_count_where_every_ready_endpoint_has_them_and_one_is_for_here() {
    let table: &[HintedRow] = &[
        ("every one has a zone, two have ours", "rrrr", "Z b Z b", &[1, 3], &[]),
        ("rule 55: the local list does not ask for zones", "RRrr", "Z b Z b", &[1, 3], &[1, 2]),
        ("none is for this zone", "rr", "a b", &[1, 2], &[]),
        ("one that is not ready is left out", "rrrn", "Z b Z Z", &[1, 3], &[]),
        ("only one that is not ready is for this zone", "rrn", "a b Z", &[1, 2], &[]),
        ("a ready one without a hint turns it off", "rrr", "Z - Z", &[1, 2, 3], &[]),
        ("one that is not ready needs no hint", "rrn", "Z b -", &[1], &[]),
        ("several zones for one endpoint", "rrr", "a,Z b,Z c", &[1, 2], &[]),
        ("this node before this zone", "rrrr", "Z/N b/m Z/o b/p", &[1], &[]),
        ("several nodes for one endpoint", "rrr", "Z/m,N b/N Z/o", &[1, 2], &[]),
        ("one without a node's hint: the zone decides", "rrrr", "Z/N b/m Z b/p", &[1, 3], &[]),
        ("none is for this node: the zone decides", "rrrr", "Z/l b/m Z/o b/p", &[1, 3], &[]),
        ("hints for nodes alone", "rrr", "/N /m /N", &[1, 3], &[]),
        ("hints for nodes alone, none is ours", "rr", "/l /m", &[1, 2], &[]),
        ("the lists need not contain each other", "RR", "b Z", &[2], &[1, 2]),
        ("an endpoint here that is for another zone", "Rr", "b Z", &[2], &[1]),
        ("the fallback does not ask for zones", "tt", "Z b", &[1, 2], &[]),
        ("rule 52: a ready one elsewhere bars a draining one in this zone", "rt", "a Z", &[1], &[]),
    ];
    for (name, letters, hints, cluster, local) in table {
        let categories = categorize(&hinted(letters, hints));
        assert_eq!(numbers(&categories.cluster), *cluster, "{name}: cluster");
        assert_eq!(numbers(&categories.local), *local, "{name}: local");
        assert!(categories.any, "{name}: any");
    }
}

#[test]
fn rule_57_a_node_without_a_zone_follows_no_hint() {
    let mut slice = slice("a", &[("", TCP, 80)], &[(1, true, true, false), (2, true, true, false)]);
    slice.zone_hints = vec![["a".into()].into(), ["b".into()].into()];
    (slice.endpoints[0].zones, slice.endpoints[1].zones) = (1, 2);
    let cluster = |zone| numbers(&categorize(&gather(&[&slice], "", TCP, zone)).cluster);
    assert_eq!(cluster(None), [1, 2]);
    assert_eq!(cluster(Some("b")), [2]);
    assert_eq!(cluster(Some("c")), [1, 2]);
}

fn slice(name: &str, ports: &[(&str, Protocol, u16)], endpoints: &[(u8, bool, bool, bool)]) -> EndpointSlice {
    let port = |(name, protocol, port): &(&str, Protocol, u16)| SlicePort {
        name: (*name).into(),
        protocol: *protocol,
        port: *port,
    };
    let endpoint = |(last, ready, serving, terminating): &(u8, bool, bool, bool)| Endpoint {
        addr: [10, 0, 0, *last].into(),
        ready: *ready,
        serving: *serving,
        terminating: *terminating,
        local: false,
        for_node: Hint::None,
        zones: 0,
    };
    EndpointSlice {
        name: ObjectName::new("ns", name),
        service: ObjectName::new("ns", "svc"),
        family: IpFamily::V4,
        legacy: false,
        ports: ports.iter().map(port).collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        zone_hints: Vec::new(),
        trigger: Trigger::default(),
    }
}

const TCP: Protocol = Protocol::Tcp;

fn addresses(slices: &[&EndpointSlice], name: &str, protocol: Protocol) -> Vec<String> {
    gather(slices, name, protocol, None).iter().map(|c| format!("{}:{}", c.addr, c.port)).collect()
}

#[test]
fn rule_40_ports_match_by_name_and_protocol() {
    let a = slice("a", &[("http", TCP, 80), ("dns", Protocol::Udp, 53), ("dns", TCP, 5353)], &[(1, true, true, false)]);
    assert_eq!(addresses(&[&a], "http", TCP), ["10.0.0.1:80"]);
    assert_eq!(addresses(&[&a], "dns", TCP), ["10.0.0.1:5353"]);
    assert_eq!(addresses(&[&a], "dns", Protocol::Udp), ["10.0.0.1:53"]);
    assert_eq!(addresses(&[&a], "http", Protocol::Udp), Vec::<String>::new());
    assert_eq!(addresses(&[&a], "", TCP), Vec::<String>::new());
}

#[test]
fn rule_45_slices_are_united_and_duplicates_count_once() {
    let a = slice("a", &[("", TCP, 80)], &[(1, true, true, false), (2, true, true, false)]);
    let b = slice("b", &[("", TCP, 80)], &[(2, true, true, false), (3, true, true, false)]);
    for order in [[&a, &b], [&b, &a]] {
        assert_eq!(addresses(&order, "", TCP), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
    }
}

#[test]
fn rule_45_one_address_with_several_ports_is_several_endpoints() {
    let a = slice("a", &[("", TCP, 80)], &[(1, true, true, false)]);
    let b = slice("b", &[("", TCP, 81)], &[(1, true, true, false)]);
    assert_eq!(addresses(&[&a, &b], "", TCP), ["10.0.0.1:80", "10.0.0.1:81"]);
}

#[test]
fn rule_45_of_duplicates_one_that_does_not_terminate_counts() {
    let terminating = slice("a", &[("", TCP, 80)], &[(1, false, true, true)]);
    let ready = slice("b", &[("", TCP, 80)], &[(1, true, true, false)]);
    let unready = slice("c", &[("", TCP, 80)], &[(1, false, true, false)]);
    for order in [[&terminating, &ready], [&ready, &terminating]] {
        assert!(!gather(&order, "", TCP, None)[0].terminating && gather(&order, "", TCP, None)[0].ready);
    }
    // Even one that is not ready: the endpoint is then not used at all.
    for order in [[&terminating, &unready], [&unready, &terminating]] {
        assert_eq!(categorize(&gather(&order, "", TCP, None)), Categories::default());
    }
}
