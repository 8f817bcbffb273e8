//! What the control plane tells of itself: who waits, what is done since when, what load balancers may hear.

use super::*;
use crate::model::{Families, Trigger};
use crate::plan::health::HealthCheck;

const V4: Families = Families::one(IpFamily::V4);

fn triggered(last: u8, secs: u64) -> EndpointSlice {
    let trigger = Trigger(Some(Duration::from_secs(secs)));
    EndpointSlice { trigger, ..slice("web-1", "web", "http", vec![endpoint(last)]) }
}

fn programmed(rig: &mut Rig) -> Vec<u64> {
    rig.sync.take_programmed().into_iter().map(|(_, time)| time.as_secs()).collect()
}

#[test]
fn rule_116_nobody_waits_before_the_first_list_and_whoever_changed_afterwards() {
    let mut rig = Rig::new(Capacities::default());
    rig.sync.take(apply_service(service("web", 1, &[("http", 80)])));
    assert_eq!(rig.sync.waiting(), Families::NONE, "starting is no delay");
    rig.events(empty_lists());
    assert_eq!((rig.sync.waiting(), rig.sync.behind()), (Families::NONE, Families::NONE));
    rig.sync.take(apply_slice(triggered(1, 5)));
    assert_eq!(rig.sync.waiting(), V4);
    rig.events([]);
    assert_eq!((rig.sync.waiting(), rig.sync.behind()), (Families::NONE, Families::NONE));
}

#[test]
fn rule_116_a_write_that_fails_leaves_its_family_behind_until_it_succeeds() {
    let mut rig = Rig::synced();
    rig.maps.inject(|op| op.map() == MapName::SlotsV4);
    rig.events([apply_service(service("web", 1, &[("http", 80)])), apply_slice(triggered(1, 5))]);
    assert_eq!(rig.sync.behind(), V4);
    assert_eq!(programmed(&mut rig), [0; 0], "it is not in the kernel");
    rig.events([apply_slice(triggered(2, 6))]);
    rig.maps.heal();
    rig.now += Duration::from_secs(60);
    rig.events([]);
    assert_eq!(rig.sync.behind(), Families::NONE);
    assert_eq!(programmed(&mut rig), [5, 6], "rule 135: measured to the sync that succeeded");
    assert_eq!(programmed(&mut rig), [0; 0], "once each");
}

#[test]
fn a_service_that_does_not_fit_holds_nobody_back() {
    let small = Capacities { services: 1, ..Capacities::default() };
    let mut rig = Rig::new(small);
    rig.events(empty_lists());
    rig.events([1, 2].map(|i| apply_service(service(&format!("s{i}"), i, &[("http", 80)]))));
    assert_eq!(rig.sync.board().counts().1, 1, "one did not fit");
    assert_eq!(rig.sync.behind(), Families::NONE);
    let figures = rig.sync.figures();
    assert_eq!((figures.served, figures.partly_served, figures.failed), (1, 0, 1));
    assert_eq!((figures.changes_failed, figures.objects), (1, [2, 0]));
    let services = figures.maps.iter().find(|of| of.map == "SERVICES_V4").unwrap();
    assert_eq!((services.entries, services.capacity), (1, 1));
}

#[test]
fn rule_127_load_balancers_hear_of_what_the_kernel_has() {
    let balanced = || Service {
        kind: ServiceType::LoadBalancer,
        external_local_asked: true,
        health_check_node_port: 31_000,
        ..service("web", 1, &[("http", 80)])
    };
    let name = ObjectName::new("ns", "web");
    let check = |local| HealthCheck { port: 31_000, local: [Some(local), None] };
    let mut rig = Rig::synced();
    rig.maps.inject(|op| op.map() == MapName::SlotsV4);
    // Even last octets are on this node.
    rig.events([apply_service(balanced()), apply_slice(triggered(2, 5))]);
    assert_eq!(rig.sync.take_checks(), None, "it is not in the kernel");
    rig.maps.heal();
    rig.now += Duration::from_secs(60);
    rig.events([]);
    assert_eq!(rig.sync.take_checks().unwrap()[&name], check(1));
    rig.events([apply_slice(triggered(2, 6)), apply_service(balanced())]);
    assert_eq!(rig.sync.take_checks(), None, "nothing changed");
    rig.events([apply_slice(triggered(3, 7))]);
    assert_eq!(rig.sync.take_checks().unwrap()[&name], check(0));
    rig.events([apply_service(Service { external_local_asked: false, ..balanced() })]);
    assert_eq!(rig.sync.take_checks().unwrap().len(), 0);
}

#[test]
fn figures_follow_what_the_kernel_holds() {
    let mut rig = Rig::synced();
    let used = |rig: &Rig, map: &str| rig.sync.figures().maps.iter().find(|of| of.map == map).unwrap().entries;
    let before = (used(&rig, "SLOTS_V4"), used(&rig, "PORTS"), used(&rig, "LIVE"));
    assert_eq!((used(&rig, "SERVICES_V4"), used(&rig, "CLUSTER_IPS_V4"), used(&rig, "NODE_ADDRS_V4")), (0, 0, 1));
    let endpoints = vec![endpoint(1), endpoint(3), endpoint(5)];
    rig.events([
        apply_service(service("web", 1, &[("http", 80), ("dns", 53)])),
        apply_slice(slice("web-1", "web", "http", endpoints)),
    ]);
    assert_eq!((used(&rig, "SERVICES_V4"), used(&rig, "CLUSTER_IPS_V4"), used(&rig, "SERVICES_V6")), (2, 1, 0));
    assert_eq!(used(&rig, "PORTS"), before.1 + 2);
    assert_eq!(used(&rig, "LIVE"), before.2 + 3);
    assert_eq!(used(&rig, "SLOTS_V4"), before.0 + 3);
    let figures = rig.sync.figures();
    assert!(figures.writes >= 8 && figures.changes_done >= 2, "{figures:?}");
}
