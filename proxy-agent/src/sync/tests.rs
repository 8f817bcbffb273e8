//! The control plane against maps in memory: whatever happens on the way, the maps end as they should.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proxy_common::abi::{self, NodeAddr, Policy, filter};

use super::*;
use crate::dataplane::memory::MemoryDataplane;
use crate::dataplane::render::{self, filter_bucket};
use crate::dataplane::{Capacities, MapName, Snapshot};
use crate::diff::QUIET;
use crate::index::{Kind, Object};
use crate::model::{
    Endpoint, EndpointSlice, Hint, IpFamily, Node, ObjectName, Protocol, Service, ServicePort, ServiceType, SlicePort,
    Trigger,
};

mod addresses;
mod histories;
mod told;

fn service(name: &str, ip: u8, ports: &[(&str, u16)]) -> Service {
    let port = |(name, port): &(&str, u16)| ServicePort {
        name: (*name).into(),
        protocol: Protocol::Tcp,
        port: *port,
        node_port: 0,
    };
    Service {
        name: ObjectName::new("ns", name),
        created_secs: 0,
        kind: ServiceType::ClusterIp,
        cluster_ip_v4: Some([10, 96, 0, ip].into()),
        cluster_ip_v6: None,
        ports: ports.iter().map(port).collect(),
        internal_local: false,
        external_local_asked: false,
        affinity_secs: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges_asked: Vec::new(),
        health_check_node_port: 0,
    }
}

fn endpoint(last: u8) -> Endpoint {
    let addr = [10, 244, 0, last].into();
    Endpoint {
        addr,
        ready: true,
        serving: true,
        terminating: false,
        local: last.is_multiple_of(2),
        for_node: Hint::None,
        zones: 0,
    }
}

fn slice(name: &str, service: &str, port: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new("ns", name),
        service: ObjectName::new("ns", service),
        family: IpFamily::V4,
        legacy: false,
        ports: vec![SlicePort { name: port.into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints,
        zone_hints: Vec::new(),
        trigger: Trigger::default(),
    }
}

fn apply_service(service: Service) -> Event {
    Event::Apply(Object::Service(service))
}

fn apply_slice(slice: EndpointSlice) -> Event {
    Event::Apply(Object::Slice(slice))
}

fn delete(kind: Kind, name: &str) -> Event {
    Event::Delete(kind, ObjectName::new("ns", name))
}

fn empty_lists() -> Vec<Event> {
    let addrs = BTreeMap::from([([192, 0, 2, 1].into(), NodeAddr::LOCAL | NodeAddr::NODE_PORTS)]);
    let kinds = [Kind::Service, Kind::EndpointSlice];
    let lists = kinds.into_iter().flat_map(|kind| [Event::Init(kind), Event::InitDone(kind)]);
    lists.chain([Event::NodeAddrs(addrs)]).collect()
}

/// The same object in a full list of this kind.
fn listed(event: &Event, kind: Kind) -> Option<Event> {
    match event {
        Event::Apply(object) if object.kind() == kind => Some(Event::InitApply(object.clone())),
        _ => None,
    }
}

struct Rig {
    maps: MemoryDataplane,
    sync: Sync<MemoryDataplane>,
    now: Duration,
}

impl Rig {
    fn over(maps: MemoryDataplane) -> Self {
        let sync = Sync::new(maps.clone(), Duration::ZERO).unwrap();
        Self { maps, sync, now: Duration::ZERO }
    }

    fn new(capacities: Capacities) -> Self {
        Self::over(MemoryDataplane::new(capacities))
    }

    fn synced() -> Self {
        let mut rig = Self::new(Capacities::default());
        rig.events(empty_lists());
        rig
    }

    /// Another agent takes over the maps, to whom the sources name these objects.
    fn restarted(self, objects: impl IntoIterator<Item = Event>) -> Self {
        let mut rig = Self::over(self.maps);
        let objects: Vec<_> = objects.into_iter().collect();
        let mut events = empty_lists();
        events.splice(1..1, objects.iter().filter_map(|event| listed(event, Kind::Service)));
        let end = events.iter().rposition(|event| matches!(event, Event::InitDone(_))).expect("there is a list");
        events.splice(end..end, objects.iter().filter_map(|event| listed(event, Kind::EndpointSlice)));
        rig.events(events);
        rig.rest();
        rig
    }

    fn events(&mut self, events: impl IntoIterator<Item = Event>) {
        events.into_iter().for_each(|event| self.sync.take(event));
        self.sync.step(self.now);
        self.grace();
    }

    fn grace(&mut self) {
        while let Some(grace) = self.sync.begin_grace() {
            self.sync.grace_over(grace());
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.sync.step(self.now);
        self.grace();
    }

    /// Long enough for retries and for runs to come to rest.
    fn rest(&mut self) {
        for _ in 0..8 {
            self.pass(QUIET);
        }
    }

    fn snapshot(&self) -> Snapshot {
        assert_eq!(self.maps.violations(), Vec::<String>::new());
        self.maps.snapshot()
    }

    fn text(&self) -> String {
        render::render(&self.snapshot(), render::Options::default())
    }

    fn port(&self, name: &str) -> (u32, abi::Port) {
        let maps = self.snapshot();
        let (id, _) = maps.names.iter().find(|(_, key)| key.to_string().starts_with(name)).expect("no such port");
        (*id, maps.ports.get(id).copied().unwrap_or(abi::Port::UNUSED))
    }

    fn live_of(&self, last: u8) -> u32 {
        let maps = self.snapshot();
        let slot = maps.slots_v4.values().find(|slot| slot.addr == IpAddr::from([10, 244, 0, last])).unwrap();
        maps.live[&slot.endpoint_id]
    }
}

#[test]
fn nothing_is_written_before_every_source_has_delivered_its_first_list() {
    let mut rig = Rig::new(Capacities::default());
    let mut lists = empty_lists();
    let addrs = lists.pop().unwrap();
    for event in lists {
        rig.events([event]);
        rig.events([apply_service(service("a", 1, &[("", 80)]))]);
        assert_eq!(rig.maps.writes(), 0);
    }
    rig.events([addrs]);
    assert!(rig.maps.writes() > 0);
}

#[test]
fn rule_47_slices_may_come_before_their_service() {
    let events = [
        apply_slice(slice("a-1", "a", "http", vec![endpoint(1)])),
        apply_slice(slice("a-2", "a", "http", vec![endpoint(2)])),
        apply_service(service("a", 1, &[("http", 80)])),
    ];
    let texts: Vec<_> = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
        .map(|order| {
            let mut rig = Rig::synced();
            order.into_iter().for_each(|i| rig.events([events[i].clone()]));
            rig.rest();
            rig.text()
        })
        .into();
    assert!(texts[0].contains("10.244.0.1:8080") && texts[0].contains("10.244.0.2:8080 local"), "{}", texts[0]);
    assert!(texts.iter().all(|text| *text == texts[0]));
}

#[test]
fn an_unchanged_object_costs_no_write() {
    let mut rig = Rig::synced();
    let objects = [
        apply_service(service("a", 1, &[("http", 80)])),
        apply_slice(slice("a-1", "a", "http", vec![endpoint(1), endpoint(2)])),
    ];
    rig.events(objects.clone());
    let writes = rig.maps.writes();
    rig.events(objects.clone());
    rig.events([Event::Init(Kind::Service), Event::Init(Kind::EndpointSlice)]);
    rig.events(objects.map(|event| match event {
        Event::Apply(object) => Event::InitApply(object),
        other => other,
    }));
    rig.events([Event::InitDone(Kind::Service), Event::InitDone(Kind::EndpointSlice)]);
    assert_eq!(rig.maps.writes(), writes);
}

#[test]
fn one_changed_slice_writes_to_its_own_service_only() {
    let mut rig = Rig::synced();
    for i in 1..=50 {
        let name = format!("s{i}");
        rig.events([apply_service(service(&name, i, &[("http", 80)]))]);
        rig.events([apply_slice(slice(&name, &name, "http", vec![endpoint(i)]))]);
    }
    rig.rest();
    let writes = rig.maps.writes();
    rig.events([apply_slice(slice("s7", "s7", "http", vec![endpoint(7), endpoint(77)]))]);
    // LIVE, two slots, FILTER, settled word, policy, run; two words because 77 is not local.
    assert!(rig.maps.writes() - writes <= 8, "{} writes", rig.maps.writes() - writes);
}

#[test]
fn what_runs_before_a_change_is_kept_for_its_half_open_flows() {
    let mut rig = Rig::synced();
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(3)]))]);
    rig.pass(QUIET);
    let before = rig.port("ns/a").1;
    assert_eq!((before.cluster_settled.word, before.policy.flags() & Policy::CLUSTER_MOVED), (0, 0));

    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1)]))]);
    let first = rig.port("ns/a").1;
    assert_eq!(first.cluster_settled, before.cluster);
    assert_ne!(first.policy.flags() & Policy::CLUSTER_MOVED, 0);
    assert_ne!(first.cluster, before.cluster);

    // Further changes of the same burst keep what was there before it.
    rig.pass(QUIET / 2);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(5)]))]);
    let second = rig.port("ns/a").1;
    assert_eq!(second.cluster_settled, before.cluster);

    // A half-open entry lives QUIET: after that nothing is left of the old run, but the new one is not quiet yet.
    rig.pass(QUIET / 2);
    let third = rig.port("ns/a").1;
    assert_eq!(third.cluster_settled.word, 0);
    assert_ne!(third.policy.flags() & Policy::CLUSTER_MOVED, 0);

    rig.pass(QUIET / 2);
    let last = rig.port("ns/a").1;
    assert_eq!((last.cluster_settled.word, last.policy.flags() & Policy::CLUSTER_MOVED), (0, 0));
    assert_eq!(rig.sync.next_wake(), None);
    assert_eq!(rig.snapshot().slots_v4.len(), 2, "old slots are cleared");
}

#[test]
fn the_first_endpoints_of_a_service_disturb_nobody() {
    let mut rig = Rig::synced();
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1)]))]);
    let port = rig.port("ns/a").1;
    assert_eq!((port.cluster_settled.word, port.policy.flags()), (0, 0));
}

#[test]
fn rule_105_a_generation_moves_when_an_endpoint_stops_serving_and_not_before() {
    let mut rig = Rig::synced();
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(3)]))]);
    let (id, before) = (
        rig.snapshot().slots_v4.values().find(|s| s.addr == IpAddr::from([10, 244, 0, 3])).unwrap().endpoint_id,
        rig.live_of(3),
    );

    // Draining: it leaves the run and still serves.
    let draining = Endpoint { ready: false, terminating: true, ..endpoint(3) };
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), draining]))]);
    assert_eq!(rig.snapshot().live[&id], before);
    // It comes back with the same id.
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(3)]))]);
    assert_eq!(rig.snapshot().live[&id], before);

    let finished = Endpoint { serving: false, ..draining };
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), finished]))]);
    assert_eq!(rig.snapshot().live[&id], before + 1);
}

#[test]
fn rule_105_a_restart_leaves_the_flows_of_an_endpoint_that_drains_alone() {
    let service = apply_service(service("a", 1, &[("http", 80)]));
    let draining = Endpoint { ready: false, terminating: true, ..endpoint(3) };
    let drains = apply_slice(slice("a", "a", "http", vec![endpoint(1), draining]));
    let mut rig = Rig::synced();
    rig.events([service.clone(), apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(3)]))]);
    let id = rig.snapshot().slots_v4.values().find(|s| s.addr == IpAddr::from([10, 244, 0, 3])).unwrap().endpoint_id;
    let before = rig.snapshot().live[&id];
    rig.events([drains.clone()]);
    rig.rest();
    for _ in 0..2 {
        rig = rig.restarted([service.clone(), drains.clone()]);
        assert_eq!(rig.snapshot().live[&id], before);
    }

    let finished = Endpoint { serving: false, ..draining };
    let gone = [service, apply_slice(slice("a", "a", "http", vec![endpoint(1), finished]))];
    let again = rig.restarted(gone.clone());
    assert_eq!(again.snapshot().live[&id], before + 1, "it stopped serving while no agent ran");
    assert_eq!(again.snapshot().slots_v4.len(), 1, "nothing is left of it");
}

#[test]
fn a_run_moves_before_the_generation_of_an_endpoint_that_left_it() {
    let mut rig = Rig::synced();
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(3)]))]);
    let gone = rig.snapshot().slots_v4.values().find(|s| s.addr == IpAddr::from([10, 244, 0, 3])).unwrap().endpoint_id;
    let order = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = order.clone();
    rig.maps.inject(move |op| {
        match op {
            MapOp::StorePort { word: crate::dataplane::PortWord::Cluster, .. } => seen.lock().unwrap().push("run"),
            MapOp::StoreLive { endpoint_id, .. } if *endpoint_id == gone => seen.lock().unwrap().push("generation"),
            _ => {}
        }
        false
    });
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1)]))]);
    assert_eq!(*order.lock().unwrap(), ["run", "generation"]);
}

#[test]
fn rule_32_the_older_of_two_claimants_wins_and_the_other_follows_when_it_goes() {
    let (mut old, mut young) = (service("b", 1, &[("http", 80)]), service("a", 1, &[("web", 80), ("more", 81)]));
    (old.created_secs, young.created_secs) = (10, 20);
    for order in [[0, 1], [1, 0]] {
        let events = [apply_service(old.clone()), apply_service(young.clone())];
        let mut rig = Rig::synced();
        order.into_iter().for_each(|i| rig.events([events[i].clone()]));
        let text = rig.text();
        assert!(text.contains("Service ns/b\n  port http TCP IPv4\n    address 10.96.0.1:80"), "{text}");
        assert!(text.contains("Service ns/a\n  port more TCP IPv4\n    address 10.96.0.1:81"), "{text}");
        let entries = rig.sync.board().entries();
        assert!(entries[0].subject.ends_with("ns/a") && entries.len() == 1, "{entries:?}");
        assert!(entries[0].unserved.iter().any(|u| u.contains("10.96.0.1:80/TCP belongs to the older Service ns/b")));

        rig.events([delete(Kind::Service, "b")]);
        let text = rig.text();
        assert!(text.contains("port web TCP IPv4\n    address 10.96.0.1:80"), "{text}");
        assert!(!text.contains("ns/b"), "{text}");
        assert_eq!(rig.sync.board().entries(), []);
    }
}

#[test]
fn an_address_is_handed_over_without_a_gap() {
    let mut rig = Rig::synced();
    rig.events([apply_service(service("old", 1, &[("http", 80)]))]);
    let gaps = std::sync::Arc::new(std::sync::Mutex::new(0));
    let seen = gaps.clone();
    rig.maps.inject(move |op| {
        *seen.lock().unwrap() += i32::from(matches!(op, MapOp::DeleteService { .. } | MapOp::DeleteClusterIp { .. }));
        false
    });
    // The same ClusterIP, created anew under another name: both events are there when the step begins.
    rig.events([delete(Kind::Service, "old"), apply_service(service("new", 1, &[("http", 80)]))]);
    assert_eq!(*gaps.lock().unwrap(), 0);
    assert!(rig.text().contains("Service ns/new\n  port http TCP IPv4\n    address 10.96.0.1:80"));
    assert_eq!(rig.snapshot().names.len(), 1);
}

#[test]
fn a_service_that_does_not_fit_is_refused_and_all_others_go_on() {
    let mut rig = Rig::new(Capacities { services: 3, ..Capacities::default() });
    rig.events(empty_lists());
    rig.events([apply_service(service("a", 1, &[("x", 80), ("y", 81)]))]);
    rig.events([apply_service(service("b", 2, &[("x", 80), ("y", 81)]))]);
    rig.events([apply_service(service("c", 3, &[("x", 80)]))]);
    let text = rig.text();
    assert!(text.contains("ns/a") && text.contains("ns/c") && !text.contains("ns/b"), "{text}");
    assert!(!text.contains("10.96.0.2"), "half served: {text}");
    let entries = rig.sync.board().entries();
    assert_eq!(entries.len(), 1);
    let error = entries[0].error.as_deref().unwrap();
    assert!(error.contains("SERVICES_V4: it is full (3 entries); give --max-services a larger number"), "{error}");

    // Room is made: it follows within the longest pause.
    rig.events([delete(Kind::Service, "a")]);
    rig.pass(Duration::from_secs(30));
    assert!(rig.text().contains("ns/b"));
    assert_eq!(rig.sync.board().entries(), []);
}

#[test]
fn slots_that_do_not_suffice_leave_the_service_as_it_was() {
    let mut rig = Rig::new(Capacities { slots: 8, ..Capacities::default() });
    rig.events(empty_lists());
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(3)]))]);
    rig.events([apply_slice(slice("a", "a", "http", (1..=20).map(endpoint).collect()))]);
    let text = rig.text();
    assert!(text.contains("10.244.0.3:8080") && !text.contains("10.244.0.20"), "{text}");
    assert!(rig.sync.board().entries()[0].error.as_deref().unwrap().contains("--max-slots"));
    // Nothing leaked while it was refused.
    rig.rest();
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(5)]))]);
    rig.rest();
    assert_eq!(rig.snapshot().slots_v4.len(), 1);
    assert_eq!(rig.sync.board().entries(), []);
}

#[test]
fn a_run_that_comes_to_rest_does_not_hide_a_plan_that_failed() {
    let mut rig = Rig::synced();
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(1)]))]);
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(3)]))]);
    // The next plan fails in the very step in which the last change comes to rest.
    rig.maps.inject(|op| matches!(op, MapOp::PutSlot { slot, .. } if slot.addr == IpAddr::from([10, 244, 0, 5])));
    rig.now += QUIET;
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(5)]))]);
    assert!(rig.sync.board().entries()[0].error.is_some());
    rig.maps.heal();
    rig.rest();
    assert!(rig.text().contains("10.244.0.5:8080"), "{}", rig.text());
}

#[test]
fn slots_that_a_half_done_change_left_settled_are_freed_once() {
    let mut rig = Rig::synced();
    let empty = rig.sync.ledger().room();
    // The Service half stands, and cannot be withdrawn.
    rig.maps.inject(|op| matches!(op, MapOp::PutClusterIp { .. } | MapOp::DeleteService { .. }));
    let first = apply_slice(slice("a", "a", "http", vec![endpoint(1)]));
    rig.events([first, apply_service(service("a", 1, &[("http", 80)]))]);
    // The next change gets as far as the settled word; then only its keys go.
    let policy = |op: &MapOp| matches!(op, MapOp::StorePort { word: crate::dataplane::PortWord::Policy, .. });
    rig.maps.inject(move |op| policy(op) || matches!(op, MapOp::DeleteClusterIp { .. }));
    rig.events([apply_slice(slice("a", "a", "http", vec![endpoint(3)]))]);
    let port = rig.port("ns/a").1;
    assert_eq!(port.cluster_settled, port.cluster, "what this test is about");
    rig.maps.heal();
    rig.rest();
    assert!(rig.text().contains("10.244.0.3:8080"), "{}", rig.text());
    rig.events([delete(Kind::Service, "a"), delete(Kind::EndpointSlice, "a")]);
    rig.rest();
    assert_eq!(rig.sync.ledger().room(), empty);
}

#[test]
fn a_restart_keeps_ids_and_writes_only_what_differs() {
    let mut rig = Rig::synced();
    let objects = [
        apply_service(service("a", 1, &[("http", 80)])),
        apply_slice(slice("a", "a", "http", vec![endpoint(1), endpoint(2)])),
        apply_service(service("gone", 2, &[("http", 80)])),
        apply_slice(slice("gone", "gone", "http", vec![endpoint(7)])),
    ];
    rig.events(objects.clone());
    rig.rest();
    let before = rig.snapshot();
    let writes = rig.maps.writes();

    let again = rig.restarted(objects[..2].iter().cloned());
    let after = again.snapshot();
    assert_eq!(after.names.keys().collect::<Vec<_>>(), [again.port("ns/a").0].iter().collect::<Vec<_>>());
    let (id, port) = again.port("ns/a");
    assert_eq!(Some(&port), before.ports.get(&id));
    assert!(!again.text().contains("gone") && !again.text().contains("10.96.0.2"), "{}", again.text());
    // The Service that is gone: key, ClusterIP, words, generation, slots, name. Nothing for the other one.
    assert!(again.maps.writes() - writes <= 10, "{} writes", again.maps.writes() - writes);

    let writes = again.maps.writes();
    let third = again.restarted(objects[..2].iter().cloned());
    // Only the freed endpoint id moves on once more.
    assert!(third.maps.writes() - writes <= 1, "{} writes", third.maps.writes() - writes);
}

#[test]
fn a_service_that_an_agent_died_over_is_withdrawn_if_it_does_not_fit() {
    let mut rig = Rig::new(Capacities { slots: 4, ..Capacities::default() });
    rig.events(empty_lists());
    let half = slice("a", "a", "http", vec![endpoint(1), endpoint(3)]);
    rig.maps.inject(|op| matches!(op, MapOp::StoreFilter { .. } | MapOp::DeleteName { .. }));
    rig.events([apply_service(service("a", 1, &[("http", 80)])), apply_slice(half.clone())]);
    rig.maps.heal();
    let whole = EndpointSlice { endpoints: (1..=9).map(endpoint).collect(), ..half };
    let again = rig.restarted([apply_service(service("a", 1, &[("http", 80)])), apply_slice(whole)]);
    assert!(again.sync.board().entries()[0].error.as_deref().unwrap().contains("--max-slots"));
    assert_eq!(again.snapshot().names.len(), 0, "{}", again.text());
}

#[test]
fn filter_bits_go_after_two_sweeps_without_a_need() {
    let mut rig = Rig::synced();
    let vip: IpAddr = [10, 96, 0, 1].into();
    let bit = |rig: &Rig| {
        let (word, shift) = filter_bucket(&vip);
        filter::bits(rig.snapshot().filter.get(&word).copied().unwrap_or(0), shift) & filter::SERVICE != 0
    };
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.sync.sweep_filter(std::iter::empty());
    rig.sync.sweep_filter(std::iter::empty());
    assert!(bit(&rig), "in use");
    rig.events([delete(Kind::Service, "a")]);
    rig.sync.sweep_filter(std::iter::once(vip));
    rig.sync.sweep_filter(std::iter::once(vip));
    assert!(bit(&rig), "a flow still uses it");
    rig.sync.sweep_filter(std::iter::empty());
    assert!(bit(&rig), "a flow may have begun while flows were read");
    rig.sync.sweep_filter(std::iter::empty());
    assert!(!bit(&rig));

    // Asked for again between two sweeps: it stays.
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([delete(Kind::Service, "a")]);
    rig.sync.sweep_filter(std::iter::empty());
    rig.events([apply_service(service("a", 1, &[("http", 80)]))]);
    rig.events([delete(Kind::Service, "a")]);
    rig.sync.sweep_filter(std::iter::empty());
    assert!(bit(&rig));
}

#[test]
fn a_node_port_has_its_bit_exactly_while_it_exists() {
    let mut rig = Rig::synced();
    let mut tcp = service("a", 1, &[("http", 80)]);
    (tcp.kind, tcp.external_local_asked, tcp.ports[0].node_port) = (ServiceType::NodePort, true, 30_080);
    let mut both = tcp.clone();
    both.ports.push(ServicePort { name: "udp".into(), protocol: Protocol::Udp, port: 80, node_port: 30_080 });
    let bits = |rig: &Rig| rig.snapshot().node_ports.clone();
    let expected = BTreeMap::from([(30_080 / 64, 1u64 << (30_080 % 64))]);
    rig.events([apply_service(tcp.clone())]);
    assert_eq!(bits(&rig), expected);
    rig.events([apply_service(both)]);
    assert_eq!(bits(&rig), expected);
    rig.events([apply_service(tcp.clone())]);
    assert_eq!(bits(&rig), expected, "TCP still has it");
    // Another number in the same word.
    tcp.ports[0].node_port = 30_081;
    rig.events([apply_service(tcp.clone())]);
    assert_eq!(bits(&rig), BTreeMap::from([(30_081 / 64, 1u64 << (30_081 % 64))]));
    tcp.external_local_asked = false;
    rig.events([apply_service(tcp.clone())]);
    assert_eq!(bits(&rig), BTreeMap::from([(30_081 / 64, 1u64 << (30_081 % 64))]), "either policy serves it");
    tcp.ports[0].node_port = 0;
    rig.events([apply_service(tcp)]);
    assert_eq!(bits(&rig), BTreeMap::new());
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Addresses of a node with two of IPv4, of which the route prefers the first.
fn own_addresses() -> Event {
    let first = NodeAddr::LOCAL | NodeAddr::NODE_PORTS;
    let addrs = [("192.0.2.1", first), ("192.0.2.2", NodeAddr::LOCAL), ("2001:db8::1", NodeAddr::LOCAL)];
    Event::NodeAddrs(addrs.map(|(addr, flags)| (ip(addr), flags)).into())
}

fn own_node(addresses: &[&str]) -> Event {
    let addresses = addresses.iter().map(|addr| ip(addr)).collect();
    Event::Apply(Object::Node(Node {
        name: ObjectName::new("", "node-a"),
        addresses,
        zone: None,
        pod_cidrs: Vec::new(),
        leaving: false,
    }))
}

/// The addresses that answer NodePorts.
fn answering(rig: &Rig) -> Vec<String> {
    let answers = |(_, flags): &(&IpAddr, &u32)| *flags & NodeAddr::NODE_PORTS != 0;
    rig.snapshot().node_addrs.iter().filter(answers).map(|(addr, _)| addr.to_string()).collect()
}

#[test]
fn rule_85_the_ips_of_the_node_answer_node_ports() {
    let mut rig = Rig::synced();
    rig.events([own_addresses()]);
    assert_eq!(answering(&rig), ["192.0.2.1"], "there is no Node: as the devices have it");
    rig.events([own_node(&["192.0.2.2", "2001:db8::1"])]);
    assert_eq!(answering(&rig), ["192.0.2.2", "2001:db8::1"]);
    // The addresses may change in place, and a family without one answers everywhere (rule 86).
    rig.events([own_node(&["2001:db8::1"])]);
    assert_eq!(answering(&rig), ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    rig.events([own_node(&["192.0.2.2"])]);
    assert_eq!(answering(&rig), ["192.0.2.2", "2001:db8::1"]);
    // Rule 118: a Node that was deleted stays known, also if a new list does not name it.
    rig.events([delete(Kind::Node, "node-a"), Event::Init(Kind::Node), Event::InitDone(Kind::Node)]);
    assert_eq!(answering(&rig), ["192.0.2.2", "2001:db8::1"]);
    assert!(rig.snapshot().node_addrs.values().all(|flags| flags & NodeAddr::LOCAL != 0));

    let mut given = Rig::new(Capacities::default());
    given.sync = given.sync.with_node_ports(NodePorts::Given);
    given.events(empty_lists());
    given.events([own_addresses(), own_node(&["192.0.2.2"])]);
    assert_eq!(answering(&given), ["192.0.2.1"], "networks of --nodeport-addresses ask no Node");
}

#[test]
fn rule_146_the_first_writes_wait_for_the_nodes_addresses_but_not_for_ever() {
    let waiting = || {
        let mut rig = Rig::new(Capacities::default());
        rig.sync = rig.sync.with_node_ports(NodePorts::OfNode);
        assert_eq!(rig.sync.next_wake(), None, "the lists are waited for without a limit");
        rig.events(empty_lists());
        rig.events([own_addresses(), own_node(&[])]);
        assert_eq!((rig.maps.writes(), rig.sync.next_wake()), (0, Some(Duration::from_secs(30))));
        rig
    };
    let mut rig = waiting();
    rig.events([own_node(&["192.0.2.2"])]);
    assert_eq!(answering(&rig), ["192.0.2.2", "2001:db8::1"]);

    let mut rig = waiting();
    rig.pass(Duration::from_secs(29));
    assert_eq!(rig.maps.writes(), 0);
    rig.pass(Duration::from_secs(1));
    assert_eq!(answering(&rig), ["192.0.2.1", "192.0.2.2", "2001:db8::1"], "none is known, so all answer");
    rig.events([own_node(&["192.0.2.1"])]);
    assert_eq!(answering(&rig), ["192.0.2.1", "2001:db8::1"], "it is never too late");
}

#[test]
fn changes_are_counted_and_wait_until_there_is_a_list_of_everything() {
    let mut rig = Rig::new(Capacities::default());
    let counts = |rig: &Rig| {
        let figures = rig.sync.figures();
        [figures.seen.services, figures.pending.services, figures.seen.slices, figures.pending.slices]
    };
    let [begin, slices] = [Event::Init(Kind::Service), Event::Init(Kind::EndpointSlice)];
    let web = Event::InitApply(Object::Service(service("web", 1, &[("", 80)])));
    rig.events([begin, web, Event::InitDone(Kind::Service)]);
    assert_eq!(counts(&rig), [1, 1, 0, 0], "no list of slices yet");
    rig.events([slices, Event::InitDone(Kind::EndpointSlice), own_addresses()]);
    assert_eq!(counts(&rig), [1, 0, 0, 0]);
    rig.events([apply_service(service("web", 1, &[("", 80)]))]);
    assert_eq!(counts(&rig), [1, 0, 0, 0], "it is the same");
    rig.events([delete(Kind::Service, "web")]);
    assert_eq!(counts(&rig), [2, 0, 0, 0]);
}
