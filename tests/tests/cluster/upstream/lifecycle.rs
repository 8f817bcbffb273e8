//! Services come, go and come again; so does the agent.

use std::net::SocketAddr;

use fairlead_lab::{Load, LoadPlan, Proto, server::wait_until};
use fairlead_tests::counters;
use k8s_openapi::api::{core::v1::Service, networking::v1::ServiceCIDR};
use kube::api::PostParams;
use serde_json::json;

use super::{SOON, World, try_create, world, world::FURTHER, world_for_one};
use crate::fixture::Vips;

/// A Service with one Pod, served.
fn up(world: &World, name: &str, server: &str) -> Vips {
    let vips = world.vips(name, json!({}));
    world.run_pod(name, server);
    world.answered(&vips, &[server]);
    vips
}

#[test]
fn e2e_6_services_go_up_and_down_without_the_others() {
    let world = world();
    let first = up(&world, "up-1", "pod-a");
    let second = up(&world, "up-2", "pod-b");
    world.api.delete::<Service>("default", "up-1").expect("the end of a Service");
    world.gone(&first, SOON);
    world.answered(&second, &["pod-b"]);
    let third = up(&world, "up-3", "pod-c");
    world.answered(&second, &["pod-b"]);
    world.gone(&first, SOON);
    world.answered(&third, &["pod-c"]);
}

#[test]
fn e2e_7_a_service_that_is_made_again_with_its_addresses_is_served_again() {
    let world = world();
    let vips = up(&world, "again", "pod-a");
    for _ in 0..3 {
        world.api.delete::<Service>("default", "again").expect("the end of a Service");
        world.gone(&vips, SOON);
        let ips = json!([vips.v4.ip(), vips.v6.ip()]);
        let made = world.vips("again", json!({"clusterIP": vips.v4.ip(), "clusterIPs": ips}));
        assert_eq!(made.all(), vips.all());
        world.answered(&vips, &["pod-a"]);
    }
    // And at once, so that the agent may hear of both together.
    let ips = json!([vips.v4.ip(), vips.v6.ip()]);
    world.api.delete::<Service>("default", "again").expect("the end of a Service");
    world.vips("again", json!({"clusterIP": vips.v4.ip(), "clusterIPs": ips}));
    world.answered(&vips, &["pod-a"]);
}

/// e2e 8. Upstream allows an interruption; here there is none.
#[test]
fn e2e_8_services_are_served_before_while_and_after_the_agent_is_restarted() {
    let mut world = world_for_one();
    let first = up(&world, "steady-1", "pod-a");
    let second = up(&world, "steady-2", "remote-a");
    let loads = [(Proto::Tcp, first.v4), (Proto::Udp, second.v6)].map(|(proto, to)| {
        let plan = LoadPlan { workers: 1, ..LoadPlan::new(proto, to) };
        Load::start(&world.lab.client.ns, plan).expect("a load")
    });
    for polite in [true, false] {
        if polite {
            assert!(world.cluster.agent.stop(), "the agent did not end after SIGTERM");
        } else {
            world.cluster.agent.crash();
        }
        // What it misses while it is away.
        let name = format!("missed-{polite}");
        let missed = world.vips(&name, json!({}));
        world.run_pod(&name, "pod-c");
        world.cluster.agent.launch();
        world.cluster.agent.wait_synced(SOON);
        world.answered(&missed, &["pod-c"]);
        world.answered(&first, &["pod-a"]);
        world.answered(&second, &["remote-a"]);
    }
    for load in loads {
        let report = load.stop();
        let told = [&world.lab, &world.other.lab].map(counters::of);
        assert!(report.failures().is_empty(), "{report}; outcomes of both nodes: {told:?}");
    }
}

/// e2e 103: and what no Service has of the new network is dropped, as of the old one (rule 67).
#[test]
fn e2e_103_services_of_a_new_service_cidr_are_served() {
    let world = world();
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "further"},
        "spec": {"cidrs": FURTHER},
    });
    let object: ServiceCIDR = serde_json::from_value(object).expect("a ServiceCIDR");
    world
        .api
        .call(async move |client| kube::Api::<ServiceCIDR>::all(client).create(&PostParams::default(), &object).await)
        .expect("the API server takes it");
    // Low addresses are given to who asks for them only.
    let ips = FURTHER.map(|cidr| cidr.replace("0/16", "7").replace("/108", "7"));
    let mut made = None;
    // The controllers say when it may be used.
    let ready = wait_until(SOON, || {
        let spec = json!({"type": "NodePort", "clusterIP": ips[0], "clusterIPs": ips});
        made = try_create(&world.api, "further", spec).ok();
        made.is_some()
    });
    assert!(ready, "no Service can be created in a new ServiceCIDR");
    let vips = Vips::of(&made.expect("a Service"));
    assert_eq!([vips.v4.ip(), vips.v6.ip()].map(|ip| ip.to_string()), ips);
    world.run_pod("further", "pod-a");
    for host in &world.everywhere()[..4] {
        world.answered_from(*host, &vips.all(), &["pod-a"]);
    }
    let nobodys = vips.all().map(|(proto, vip)| {
        let next = if vip.is_ipv6() { "fd00:10:97::8" } else { "10.97.0.8" };
        (proto, SocketAddr::new(next.parse().expect("an address"), 80))
    });
    world.silent_from(&world.lab.client.ns, &[nobodys[0], nobodys[3]]);
}
