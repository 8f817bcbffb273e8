//! What each event changes.

use std::time::Duration;

use super::*;
use crate::model::{Endpoint, Hint, Protocol, ServicePort, ServiceType, SlicePort, Trigger};

fn name(name: &str) -> ObjectName {
    ObjectName::new("ns", name)
}

fn service(of: &str, ip: u8) -> Object {
    let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 };
    Object::Service(Service {
        name: name(of),
        created_secs: 0,
        kind: ServiceType::ClusterIp,
        cluster_ip_v4: Some([10, 96, 0, ip].into()),
        cluster_ip_v6: None,
        ports: vec![port],
        internal_local: false,
        external_local_asked: false,
        affinity_secs: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges_asked: Vec::new(),
        health_check_node_port: 0,
    })
}

fn slice(of: &str, service: &str, last: u8) -> Object {
    let addr = [10, 0, 0, last].into();
    let endpoint =
        Endpoint { addr, ready: true, serving: true, terminating: false, local: false, for_node: Hint::None, zones: 0 };
    Object::Slice(EndpointSlice {
        name: name(of),
        service: name(service),
        family: IpFamily::V4,
        legacy: false,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 80 }],
        endpoints: vec![endpoint],
        zone_hints: Vec::new(),
        trigger: Trigger::default(),
    })
}

fn changed(names: &[&str]) -> BTreeSet<ObjectName> {
    names.iter().map(|n| name(n)).collect()
}

fn services(index: &mut Index, event: Event) -> BTreeSet<ObjectName> {
    let changed = index.apply(event);
    assert!(!changed.node);
    changed.services
}

fn slice_names(index: &Index, service: &str) -> Vec<String> {
    index.slices(&name(service), IpFamily::V4).iter().map(|slice| slice.name.name().to_owned()).collect()
}

#[test]
fn an_event_changes_the_service_it_is_about_and_no_other() {
    let mut index = Index::default();
    assert_eq!(services(&mut index, Event::Apply(service("a", 1))), changed(&["a"]));
    assert_eq!(services(&mut index, Event::Apply(service("b", 2))), changed(&["b"]));
    assert_eq!(services(&mut index, Event::Apply(slice("a-1", "a", 1))), changed(&["a"]));
    assert_eq!(services(&mut index, Event::Delete(Kind::EndpointSlice, name("a-1"))), changed(&["a"]));
    assert_eq!(services(&mut index, Event::Delete(Kind::Service, name("b"))), changed(&["b"]));
}

#[test]
fn rule_33_what_does_not_change_is_no_change() {
    let mut index = Index::default();
    index.apply(Event::Apply(service("a", 1)));
    index.apply(Event::Apply(slice("a-1", "a", 1)));
    assert!(index.apply(Event::Apply(service("a", 1))).is_empty());
    assert!(index.apply(Event::Apply(slice("a-1", "a", 1))).is_empty());
    assert!(index.apply(Event::Delete(Kind::Service, name("b"))).is_empty());
    assert!(index.apply(Event::Delete(Kind::EndpointSlice, name("b"))).is_empty());
}

#[test]
fn rule_49_a_slice_that_changes_its_service_leaves_the_old_one() {
    let mut index = Index::default();
    index.apply(Event::Apply(slice("x", "a", 1)));
    assert_eq!(services(&mut index, Event::Apply(slice("x", "b", 1))), changed(&["a", "b"]));
    assert_eq!(slice_names(&index, "a"), Vec::<String>::new());
    assert_eq!(slice_names(&index, "b"), ["x"]);
}

#[test]
fn a_relist_changes_only_what_differs_and_only_when_it_is_complete() {
    let mut index = Index::default();
    for (of, ip) in [("a", 1), ("b", 2), ("c", 3), ("d", 4)] {
        index.apply(Event::Apply(service(of, ip)));
    }
    let list = [
        Event::Init(Kind::Service),
        Event::InitApply(service("a", 1)),
        Event::InitApply(service("b", 9)),
        Event::InitKeep(Kind::Service, name("d")),
        Event::InitApply(service("e", 5)),
    ];
    for event in list {
        assert!(index.apply(event).is_empty());
    }
    assert!(!index.is_synced());
    assert_eq!(services(&mut index, Event::InitDone(Kind::Service)), changed(&["b", "c", "e"]));
    assert!(index.service(&name("c")).is_none());
    assert!(index.service(&name("d")).is_some(), "it could not be read: what was known stays");
}

#[test]
fn a_relist_that_begins_again_forgets_its_first_attempt() {
    let mut index = Index::default();
    index.apply(Event::Init(Kind::Service));
    index.apply(Event::InitApply(service("a", 1)));
    index.apply(Event::Init(Kind::Service));
    index.apply(Event::InitApply(service("b", 2)));
    assert_eq!(services(&mut index, Event::InitDone(Kind::Service)), changed(&["b"]));
}

#[test]
fn a_relist_of_one_kind_leaves_the_other_alone() {
    let mut index = Index::default();
    index.apply(Event::Apply(slice("a-1", "a", 1)));
    index.apply(Event::Init(Kind::Service));
    assert!(index.apply(Event::InitDone(Kind::Service)).is_empty());
    assert_eq!(slice_names(&index, "a"), ["a-1"]);
}

#[test]
fn rule_5_endpoints_count_only_where_there_is_no_slice() {
    let mut index = Index::default();
    let Object::Slice(mut legacy) = slice("a:endpoints", "a", 1) else { unreachable!() };
    legacy.legacy = true;
    index.apply(Event::Apply(Object::Slice(legacy)));
    assert_eq!(slice_names(&index, "a"), ["a:endpoints"]);
    index.apply(Event::Apply(slice("a-1", "a", 2)));
    assert_eq!(slice_names(&index, "a"), ["a-1"]);
    index.apply(Event::Delete(Kind::EndpointSlice, name("a-1")));
    assert_eq!(slice_names(&index, "a"), ["a:endpoints"]);
}

#[test]
fn whoever_asks_for_the_same_address_is_changed_too() {
    let mut index = Index::default();
    let claim = Claim::ClusterIp([10, 96, 0, 1].into());
    index.apply(Event::Apply(service("b", 1)));
    assert_eq!(index.owner(&claim), Some(&name("b")));
    // The same age: the first by name has it.
    assert_eq!(services(&mut index, Event::Apply(service("a", 1))), changed(&["a", "b"]));
    assert_eq!(index.owner(&claim), Some(&name("a")));
    assert_eq!(services(&mut index, Event::Apply(service("a", 2))), changed(&["a", "b"]));
    assert_eq!(index.owner(&claim), Some(&name("b")));
    assert_eq!(services(&mut index, Event::Delete(Kind::Service, name("b"))), changed(&["b"]));
    assert_eq!(index.owner(&claim), None);
}

#[test]
fn synced_means_every_list_and_the_nodes_addresses() {
    let mut index = Index::default();
    let addrs = BTreeMap::from([([192, 0, 2, 1].into(), 1)]);
    for event in [Event::InitDone(Kind::EndpointSlice), Event::InitDone(Kind::Service)] {
        index.apply(event);
        assert!(!index.is_synced());
    }
    assert!(index.apply(Event::NodeAddrs(addrs.clone())).node);
    assert!(index.is_synced());
    assert!(index.apply(Event::NodeAddrs(addrs)).is_empty());
}

fn triggered(of: &str, service: &str, last: u8, secs: u64) -> Event {
    let Object::Slice(mut made) = slice(of, service, last) else { unreachable!("a slice is a slice") };
    made.trigger = Trigger((secs != 0).then(|| Duration::from_secs(secs)));
    Event::Apply(Object::Slice(made))
}

/// Seconds of what is to be measured of each Service after these events.
fn heard(events: Vec<Event>) -> Vec<(&'static str, Vec<u64>)> {
    let (mut index, mut all) = (Index::default(), Changed::default());
    for event in events {
        all.merge(index.apply(event));
    }
    let secs = |(family, time): (IpFamily, Duration)| {
        assert_eq!(family, IpFamily::V4);
        time.as_secs()
    };
    let of = |service| (service, all.triggers.take(&name(service)).map(secs).collect::<Vec<_>>());
    ["a", "b"].map(of).into_iter().filter(|(_, secs)| !secs.is_empty()).collect()
}

#[test]
fn rule_135_one_time_for_each_event_that_changes_something() {
    let delete = |of: &str| Event::Delete(Kind::EndpointSlice, name(of));
    assert_eq!(heard(vec![triggered("x", "a", 1, 5)]), [("a", vec![5])]);
    assert_eq!(heard(vec![triggered("x", "a", 1, 5), triggered("x", "a", 2, 6)]), [("a", vec![5, 6])]);
    let two = vec![triggered("x", "a", 1, 5), triggered("y", "b", 1, 6), triggered("y", "b", 2, 7)];
    assert_eq!(heard(two), [("a", vec![5]), ("b", vec![6, 7])]);
    assert_eq!(heard(vec![triggered("x", "a", 1, 0)]), []);
    assert_eq!(heard(vec![triggered("x", "a", 1, 5), triggered("x", "a", 1, 6)]), [("a", vec![5])], "nothing changed");
    assert_eq!(heard(vec![triggered("x", "a", 1, 5), delete("x")]), []);
    let again = vec![triggered("x", "a", 1, 5), delete("x"), triggered("x", "a", 1, 7)];
    assert_eq!(heard(again), [("a", vec![7])]);
    assert_eq!(heard(vec![delete("x")]), []);
}

#[test]
fn rule_135_a_new_list_counts_where_it_changes_something() {
    let list = |events: Vec<Event>| {
        let applied = events.into_iter().map(|event| match event {
            Event::Apply(object) => Event::InitApply(object),
            other => other,
        });
        [Event::Init(Kind::EndpointSlice)].into_iter().chain(applied).chain([Event::InitDone(Kind::EndpointSlice)])
    };
    let first = list(vec![triggered("x", "a", 1, 5), triggered("y", "b", 1, 6)]);
    let second = list(vec![triggered("x", "a", 1, 8), triggered("y", "b", 2, 9)]);
    assert_eq!(heard(first.chain(second).collect()), [("a", vec![5]), ("b", vec![6, 9])]);
}

#[test]
fn rule_116_a_slice_concerns_its_family_and_a_service_both() {
    let mut index = Index::default();
    let (v4, both) = (Families::one(IpFamily::V4), Families::BOTH);
    assert_eq!(index.apply(Event::Apply(service("a", 1))).families, both);
    assert_eq!(index.apply(Event::Apply(slice("x", "a", 1))).families, v4);
    assert_eq!(index.apply(Event::Apply(slice("x", "a", 1))).families, Families::NONE, "nothing changed");
    assert_eq!(index.apply(Event::Delete(Kind::EndpointSlice, name("x"))).families, v4);
    assert_eq!(index.apply(Event::Delete(Kind::Service, name("a"))).families, both);
    assert_eq!(index.apply(Event::NodeAddrs(BTreeMap::new())).families, both);
    assert_eq!(index.apply(Event::NodeAddrs(BTreeMap::new())).families, Families::NONE);
}

fn node(zone: Option<&str>, ip: u8) -> Object {
    Object::Node(Node {
        name: ObjectName::new("", "node-a"),
        addresses: vec![[192, 0, 2, ip].into()],
        zone: zone.map(Into::into),
        pod_cidrs: Vec::new(),
        leaving: false,
    })
}

#[test]
fn rule_60_another_zone_concerns_the_services_with_hints() {
    let mut index = Index::default();
    let Object::Slice(mut hinted) = slice("a-1", "a", 1) else { panic!("a slice") };
    hinted.zone_hints = vec![["z".into()].into()];
    index.apply(Event::Apply(Object::Slice(hinted)));
    index.apply(Event::Apply(slice("b-1", "b", 2)));
    let change = index.apply(Event::Apply(node(Some("z"), 1)));
    assert_eq!((change.services, change.node), (changed(&["a"]), true));
    assert_eq!(index.apply(Event::Apply(node(Some("z"), 2))).services, changed(&[]), "only its address changed");
    assert_eq!(index.apply(Event::Apply(node(None, 2))).services, changed(&["a"]));
    assert!(index.apply(Event::Apply(node(None, 2))).is_empty());
}

#[test]
fn rule_21_an_own_address_concerns_the_services_with_source_ranges() {
    let mut index = Index::default();
    let Object::Service(mut guarded) = service("a", 1) else { panic!("a Service") };
    guarded.source_ranges_asked = vec!["192.0.2.0/24".parse().unwrap()];
    index.apply(Event::Apply(Object::Service(guarded)));
    index.apply(Event::Apply(service("b", 2)));
    let addrs = BTreeMap::from([([192, 0, 2, 1].into(), 0)]);
    assert_eq!(index.apply(Event::NodeAddrs(addrs.clone())).services, changed(&["a"]));
    assert!(index.apply(Event::NodeAddrs(addrs)).is_empty());
    assert_eq!(index.apply(Event::Apply(node(None, 1))).services, changed(&["a"]));
}

fn cidr(of: &str, networks: &[&str]) -> Object {
    let cidrs = networks.iter().map(|network| network.parse().unwrap()).collect();
    Object::ServiceCidr(ServiceCidr { name: ObjectName::new("", of), cidrs })
}

#[test]
fn rule_67_service_cidrs_are_known_each_once_and_plan_no_service_again() {
    let mut index = Index::default();
    let known = |index: &Index| index.service_cidrs().iter().map(ToString::to_string).collect::<Vec<_>>();
    let both = cidr("kubernetes", &["10.96.0.0/16", "fd00:10:96::/108"]);
    index.apply(Event::Init(Kind::ServiceCidr));
    index.apply(Event::InitApply(both.clone()));
    let changed = index.apply(Event::InitDone(Kind::ServiceCidr));
    assert!(changed.service_cidrs && changed.services.is_empty() && changed.families == Families::NONE);
    assert!(!index.is_synced(), "nothing waits for them (rule 148)");
    assert!(index.apply(Event::Apply(cidr("more", &["10.97.0.0/16", "10.96.0.0/16"]))).service_cidrs);
    assert_eq!(known(&index), ["10.96.0.0/16", "10.97.0.0/16", "fd00:10:96::/108"]);
    assert!(index.apply(Event::Apply(both.clone())).is_empty(), "it is known");
    assert!(index.apply(Event::Delete(Kind::ServiceCidr, both.name().clone())).service_cidrs);
    assert_eq!(known(&index), ["10.96.0.0/16", "10.97.0.0/16"], "the other one still has the first");
    index.apply(Event::Init(Kind::ServiceCidr));
    assert!(index.apply(Event::InitDone(Kind::ServiceCidr)).service_cidrs);
    assert!(known(&index).is_empty());
}

#[test]
fn objects_that_differ_are_counted() {
    let mut index = Index::default();
    let count = |changed: Changed| (changed.objects.services, changed.objects.slices);
    for (event, expected) in [
        (Event::Apply(service("a", 1)), (1, 0)),
        (Event::Apply(service("a", 1)), (0, 0)),
        (Event::Apply(slice("a-1", "a", 1)), (0, 1)),
        (Event::Apply(slice("a-1", "b", 1)), (0, 1)),
        (Event::Init(Kind::EndpointSlice), (0, 0)),
        (Event::InitApply(slice("a-2", "a", 2)), (0, 0)),
        (Event::InitDone(Kind::EndpointSlice), (0, 2)),
        (Event::Delete(Kind::EndpointSlice, name("a-1")), (0, 0)),
        (Event::Delete(Kind::Service, name("a")), (1, 0)),
    ] {
        let shown = format!("{event:?}");
        assert_eq!(count(index.apply(event)), expected, "{shown}");
    }
}
