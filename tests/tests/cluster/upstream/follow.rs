//! Endpoints follow the Pods that a Service selects.

use std::time::Duration;

use fairlead_lab::{Load, LoadPlan, Proto};
use serde_json::json;

use super::{port, world};

/// e2e 1, 60 and 73.
#[test]
fn e2e_1_a_service_is_served_by_its_pods_as_they_come_and_go() {
    let world = world();
    let vips = world.vips("basic", json!({}));
    world.answered(&vips, &[]);
    let here = world.run_pod("basic", "pod-a");
    world.answered(&vips, &["pod-a"]);
    let there = world.run_pod("basic", "remote-a");
    world.answered(&vips, &["pod-a", "remote-a"]);
    here.terminate(&world.api);
    here.remove(&world.api);
    world.answered(&vips, &["remote-a"]);
    there.terminate(&world.api);
    there.remove(&world.api);
    world.answered(&vips, &[]);
}

#[test]
fn e2e_2_each_port_has_the_endpoints_whose_pods_name_its_target() {
    let world = world();
    let ports = json!([port("first", 80, Proto::Tcp, "one"), port("second", 81, Proto::Tcp, "two")]);
    let vips = world.vips("multiport", json!({"ports": ports}));
    let one = world.pod("multiport", "pod-a").ports(&[("one", 8080, Proto::Tcp)]);
    let two = world.pod("multiport", "pod-b").ports(&[("two", 8081, Proto::Tcp)]);
    for vip in [vips.v4, vips.v6] {
        let mut second = vip;
        second.set_port(81);
        let client = &world.lab.client.ns;
        let served = |at, servers: &[&str]| world.answered_from(client, &[(Proto::Tcp, at)], servers);
        one.run(&world.api);
        served(vip, &["pod-a"]);
        served(second, &[]);
        two.run(&world.api);
        served(second, &["pod-b"]);
        served(vip, &["pod-a"]);
        one.remove(&world.api);
        served(vip, &[]);
        served(second, &["pod-b"]);
        two.remove(&world.api);
        served(second, &[]);
    }
}

/// e2e 46. The controller writes a slice for each set of numbers.
#[test]
fn e2e_46_one_name_of_a_port_is_another_number_in_each_pod() {
    let world = world();
    let ports = json!([port("tcp", 80, Proto::Tcp, "web"), port("udp", 80, Proto::Udp, "dns")]);
    let vips = world.vips("named", json!({"ports": ports}));
    for (server, number) in [("pod-a", 8080), ("pod-b", 8081), ("remote-a", 8082)] {
        let ports = [("web", number, Proto::Tcp), ("dns", number, Proto::Udp)];
        world.pod("named", server).ports(&ports).run(&world.api);
    }
    world.answered(&vips, &["pod-a", "pod-b", "remote-a"]);
    for (proto, to) in vips.all() {
        for _ in 0..20 {
            let answer = world.ask(proto, to).answer().cloned().expect("an answer");
            let number = match &*answer.server {
                "pod-a" => 8080,
                "pod-b" => 8081,
                _ => 8082,
            };
            assert_eq!(answer.local.port(), number, "{answer:?}");
        }
    }
}

#[test]
fn e2e_45_a_port_of_a_restartable_init_container_is_one_of_the_pod() {
    let world = world();
    let by_number = world.vips("sidecar", json!({}));
    let ports = json!([port("tcp", 80, Proto::Tcp, "tcp"), port("udp", 80, Proto::Udp, "udp")]);
    let by_name = world.vips("sidecar-named", json!({"selector": {"app": "sidecar"}, "ports": ports}));
    world.pod("sidecar", "pod-a").sidecar().run(&world.api);
    world.answered(&by_number, &["pod-a"]);
    world.answered(&by_name, &["pod-a"]);
}

#[test]
fn e2e_59_services_of_one_selector_have_the_same_endpoints() {
    let world = world();
    let services = ["twin-1", "twin-2"].map(|name| world.vips(name, json!({"selector": {"app": "twin"}})));
    world.run_pod("twin", "pod-a");
    let second = world.run_pod("twin", "pod-b");
    for vips in &services {
        world.answered(vips, &["pod-a", "pod-b"]);
    }
    second.remove(&world.api);
    for vips in &services {
        world.answered(vips, &["pod-a"]);
    }
}

/// e2e 108, the last of its three: the Service's selector goes from one set of Pods to the other and back, and Pods that
/// are not selected any more end.
#[test]
fn e2e_108_blue_and_green_take_turns_without_a_failed_request() {
    let world = world();
    let vips = world.vips("colour", json!({"selector": {"app": "blue"}}));
    let mut running = ["pod-a", "remote-a"].map(|server| world.run_pod("blue", server));
    world.answered(&vips, &["pod-a", "remote-a"]);
    let loads = vips.all().map(|(proto, to)| {
        let plan = LoadPlan { workers: 1, pause: Duration::from_millis(1), ..LoadPlan::new(proto, to) };
        Load::start(&world.lab.client.ns, plan).expect("a load")
    });
    for (app, servers) in
        [("green", ["pod-b", "remote-b"]), ("blue", ["pod-a", "remote-a"]), ("green", ["pod-c", "pod-b"])]
    {
        let next = servers.map(|server| world.pod(app, server));
        for pod in &next {
            pod.create(&world.api);
            pod.report(&world.api, "Running", false);
            pod.report(&world.api, "Running", true);
        }
        world.edit("colour", &json!({"selector": {"app": app}}));
        world.answered(&vips, &servers);
        for pod in &running {
            pod.terminate(&world.api);
            pod.report(&world.api, "Running", false);
            pod.remove(&world.api);
        }
        world.answered(&vips, &servers);
        running = next;
    }
    for load in loads {
        let report = load.stop();
        assert!(report.failures().is_empty(), "{report}");
        assert!(report.by_server().len() == 5, "each had its part: {report}");
    }
}
