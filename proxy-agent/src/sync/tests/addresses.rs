//! What belongs to addresses and policies: source ranges, affinity, topology, the networks of ClusterIPs.

use std::collections::BTreeSet;

use ipnet::IpNet;
use proxy_common::abi;

use super::*;
use crate::dataplane::Tuple;
use crate::model::ServiceCidr;

fn balanced(ranges: &[&str]) -> Service {
    let mut made = service("a", 1, &[("http", 80)]);
    made.load_balancer_ips = vec![[198, 51, 100, 1].into()];
    made.external_ips = vec![[203, 0, 113, 7].into()];
    made.source_ranges_asked = ranges.iter().map(|range| range.parse().unwrap()).collect();
    made
}

/// The source ranges in the maps, and the addresses that ask for them.
fn guards(rig: &Rig) -> (String, String) {
    let maps = rig.snapshot();
    let asks = |(_, service): &(&Tuple, &abi::Service)| service.flags & abi::Service::SOURCE_RANGES != 0;
    let join = |list: Vec<String>| list.join(" ");
    (
        join(maps.source_ranges.iter().map(|(_, net)| net.to_string()).collect()),
        join(maps.services.iter().filter(asks).map(|(tuple, _)| tuple.to_string()).collect()),
    )
}

#[test]
fn rule_21_source_ranges_guard_the_balancers_addresses_and_no_others() {
    let mut rig = Rig::synced();
    let guard = |ranges: &str, addrs: &str| (ranges.to_owned(), addrs.to_owned());
    rig.events([apply_service(balanced(&["203.0.113.0/25", "10.0.0.0/8"]))]);
    assert_eq!(guards(&rig), guard("10.0.0.0/8 203.0.113.0/25", "198.51.100.1:80/TCP"));
    rig.events([apply_service(balanced(&["203.0.113.0/25", "0.0.0.0/0"]))]);
    assert_eq!(guards(&rig), guard("", ""));
    rig.events([apply_service(balanced(&["203.0.113.0/25"]))]);
    // The node's own address is in the range, and its Node moves.
    rig.events([own_node(&["203.0.113.9"])]);
    assert_eq!(guards(&rig), guard("198.51.100.1/32 203.0.113.0/25", "198.51.100.1:80/TCP"));
    rig.events([own_node(&["192.0.2.1"])]);
    assert_eq!(guards(&rig), guard("203.0.113.0/25", "198.51.100.1:80/TCP"));
    // Without a balancer's address nobody asks for them.
    let Service { load_balancer_ips: _, ref external_ips, .. } = balanced(&[]);
    let plain =
        Service { load_balancer_ips: Vec::new(), external_ips: external_ips.clone(), ..balanced(&["10.0.0.0/8"]) };
    rig.events([apply_service(plain)]);
    assert_eq!(guards(&rig), guard("", ""));
    assert_eq!(rig.maps.violations(), Vec::<String>::new());
}

#[test]
fn rule_21_no_write_that_fails_lets_an_address_ask_for_ranges_that_are_not_there() {
    for failing in 0..12 {
        let mut rig = Rig::synced();
        rig.events([apply_service(balanced(&["203.0.113.0/25"]))]);
        let mut at = 0;
        rig.maps.inject(move |_| {
            at += 1;
            at == failing
        });
        rig.events([apply_service(balanced(&[]))]);
        rig.events([apply_service(balanced(&["10.0.0.0/8"]))]);
        rig.maps.heal();
        rig.rest();
        assert_eq!(guards(&rig), ("10.0.0.0/8".to_owned(), "198.51.100.1:80/TCP".to_owned()), "{failing}");
        assert_eq!(rig.maps.violations(), Vec::<String>::new(), "{failing}");
    }
}

#[test]
fn a_restart_takes_source_ranges_over_and_removes_those_of_nobody() {
    let mut rig = Rig::synced();
    let made = || apply_service(balanced(&["203.0.113.0/25", "10.0.0.0/8"]));
    rig.events([made()]);
    let foreign: IpNet = "192.0.2.0/24".parse().unwrap();
    rig.maps.write(&MapOp::PutSourceRange { port_id: 77, net: foreign }).unwrap();
    let before = rig.maps.writes();
    let mut rig = rig.restarted([made()]);
    assert_eq!(guards(&rig).0, "10.0.0.0/8 203.0.113.0/25");
    assert_eq!(rig.maps.writes(), before + 1, "the one that belongs to no port");
    let mut rig = {
        rig.events([]);
        rig.restarted([])
    };
    assert_eq!(guards(&rig), (String::new(), String::new()));
    assert_eq!(rig.snapshot().source_ranges.len(), 0);
    rig.events([made()]);
    assert_eq!(rig.maps.violations(), Vec::<String>::new());
}

#[test]
fn rule_22_the_affinity_timeout_is_one_store() {
    let mut rig = Rig::synced();
    let with = |secs| Service { affinity_secs: secs, ..service("a", 1, &[("http", 80)]) };
    let policy = |rig: &Rig| rig.snapshot().ports.values().next().map(|port| port.policy.affinity_secs());
    rig.events([apply_service(with(Some(10_800))), apply_slice(slice("a-1", "a", "http", vec![endpoint(1)]))]);
    assert_eq!(policy(&rig), Some(10_800));
    let before = rig.maps.writes();
    rig.events([apply_service(with(Some(60)))]);
    assert_eq!((policy(&rig), rig.maps.writes() - before), (Some(60), 1));
    let slices = || apply_slice(slice("a-1", "a", "http", vec![endpoint(1)]));
    let before = rig.maps.writes();
    let mut rig = rig.restarted([apply_service(with(Some(60))), slices()]);
    assert_eq!((policy(&rig), rig.maps.writes() - before), (Some(60), 0), "a restart changes nothing");
    rig.events([apply_service(with(None))]);
    assert_eq!(policy(&rig), Some(0), "rule 84");
}

#[test]
fn rules_57_and_60_the_cluster_run_follows_the_zone_of_the_node() {
    let mut rig = Rig::synced();
    let mut hinted = slice("a-1", "a", "http", vec![endpoint(1), endpoint(3)]);
    hinted.zone_hints = vec![["east".into()].into(), ["west".into()].into()];
    (hinted.endpoints[0].zones, hinted.endpoints[1].zones) = (1, 2);
    let in_zone = |zone: &str| {
        let Event::Apply(Object::Node(node)) = own_node(&["192.0.2.1"]) else { panic!("a Node") };
        Event::Apply(Object::Node(Node { zone: Some(zone.into()), ..node }))
    };
    let len = |rig: &Rig| rig.snapshot().ports.values().next().map(|port| port.cluster.len());
    rig.events([apply_service(service("a", 1, &[("http", 80)])), apply_slice(hinted), in_zone("north")]);
    assert_eq!(len(&rig), Some(2));
    rig.events([in_zone("west")]);
    assert_eq!(len(&rig), Some(1));
    let slots = rig.snapshot();
    let port = slots.ports.values().next().unwrap();
    assert_eq!(slots.slots_v4[&port.cluster.base()].addr, ip("10.244.0.3"));
    rig.events([own_node(&["192.0.2.1"])]);
    assert_eq!(len(&rig), Some(2), "the label is gone");
}

#[test]
fn rule_146_the_first_writes_wait_for_the_node_also_where_it_decides_no_nodeport() {
    let mut rig = Rig::new(Capacities::default());
    rig.sync = rig.sync.with_node_ports(NodePorts::GivenBesideNode);
    rig.events(empty_lists());
    assert_eq!((rig.maps.writes(), rig.sync.next_wake()), (0, Some(Duration::from_secs(30))));
    rig.events([own_node(&[])]);
    assert_ne!(rig.maps.writes(), 0, "it need not have an address");
}

#[test]
fn rule_67_service_cidrs_come_behind_the_clusterips_and_go_when_no_object_has_them() {
    let mut rig = Rig::new(Capacities::default());
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<BTreeSet<IpNet>>();
    let object = |name: &str, list: &[&str]| {
        let (name, cidrs) = (ObjectName::new("", name), nets(list).into_iter().collect());
        Object::ServiceCidr(ServiceCidr { name, cidrs })
    };
    // An earlier agent's.
    rig.maps.write(&MapOp::PutServiceCidr { net: "172.30.0.0/16".parse().unwrap() }).unwrap();
    let mut rig = Rig::over(rig.maps);
    let mut events = empty_lists();
    events.insert(0, Event::Apply(Object::Service(service("a", 1, &[("http", 80)]))));
    rig.events(events);
    assert_eq!(rig.snapshot().service_cidrs, nets(&["172.30.0.0/16"]), "nobody has told of any yet");
    assert!(rig.sync.take_service_networks().is_none());
    let listed = Event::InitApply(object("kubernetes", &["10.96.0.0/16", "fd00:10:96::/112"]));
    rig.events([Event::Init(Kind::ServiceCidr), listed, Event::InitDone(Kind::ServiceCidr)]);
    assert_eq!(rig.snapshot().service_cidrs, nets(&["10.96.0.0/16", "fd00:10:96::/112"]));
    rig.events([Event::Apply(object("more", &["10.97.0.0/20"]))]);
    let around = rig.sync.take_service_networks().unwrap();
    assert_eq!(around.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.96.0.0/15", "fd00:10:96::/112"]);
    rig.events([Event::Delete(Kind::ServiceCidr, ObjectName::new("", "more"))]);
    assert_eq!(rig.snapshot().service_cidrs.len(), 2);

    // A Service and its network in one step: the ClusterIP first.
    rig.maps.inject(|op| matches!(op, MapOp::PutClusterIp { .. }));
    let late = service("late", 9, &[("http", 80)]);
    let late = Service { cluster_ip_v4: Some([10, 99, 0, 9].into()), ..late };
    let before = rig.maps.writes();
    rig.events([Event::Apply(object("late", &["10.99.0.0/16"])), apply_service(late)]);
    assert_ne!(rig.maps.writes(), before);
    rig.maps.heal();
    rig.maps.inject(|op| op.map() == MapName::SvcCidrsV4);
    rig.events([Event::Delete(Kind::ServiceCidr, ObjectName::new("", "late"))]);
    assert!(rig.sync.board().due(rig.now + Duration::from_secs(60)).contains(&Subject::ServiceCidrs));
    rig.maps.heal();
    rig.rest();
    assert_eq!(rig.snapshot().service_cidrs, nets(&["10.96.0.0/16", "fd00:10:96::/112"]), "tried again");
}
