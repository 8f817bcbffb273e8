//! Hints: traffic stays near where there is an endpoint near. The hints are kube-controller-manager's, made of the field
//! and the annotation of the Service.
//!
//! The first node is alone in `zone-a`; the other one shares `zone-b` with the third, which only has an endpoint.

use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::{Vips, World, world};

/// From here on clients of the first node are answered by the first of these, those of the other one by the second.
fn near(world: &World, vips: &Vips, here: &[&str], there: &[&str]) {
    let other = &world.other.lab;
    for (hosts, servers) in [(world.inside(), here), ([&other.client.host, &other.node], there)] {
        for host in hosts {
            world.answered_from(host, &vips.all(), servers);
        }
    }
}

/// A Service with this field, and its Pods.
fn prefer(world: &World, name: &str, distribution: &str, servers: &[&str]) -> Vips {
    let vips = world.vips(name, json!({"trafficDistribution": distribution}));
    for server in servers {
        world.run_pod(name, server);
    }
    vips
}

/// Asks the controllers for hints, or for none any more.
fn annotate(world: &World, name: &str, mode: &Value) {
    let patch = json!({"metadata": {"annotations": {"service.kubernetes.io/topology-mode": mode}}});
    world.api.patch::<Service>("default", name, patch).expect("the annotation");
}

/// e2e 95. The controller divides endpoints by the processors of each zone: a third of them is in the first one.
#[test]
fn e2e_95_endpoints_that_are_divided_among_zones_serve_their_own() {
    let world = world();
    let vips = world.vips("divided", json!({}));
    for server in ["pod-a", "remote-a", "third"] {
        world.run_pod("divided", server);
    }
    near(&world, &vips, &["pod-a", "remote-a", "third"], &["pod-a", "remote-a", "third"]);
    annotate(&world, "divided", &json!("Auto"));
    near(&world, &vips, &["pod-a"], &["remote-a", "third"]);
    annotate(&world, "divided", &Value::Null);
    near(&world, &vips, &["pod-a", "remote-a", "third"], &["pod-a", "remote-a", "third"]);
}

/// e2e 96 and 97, and 98 for the field's newer name: an endpoint in each zone; one in a zone of several nodes; none in a
/// zone, whose clients go to all of them.
#[test]
fn e2e_96_to_98_clients_prefer_their_zone() {
    let world = world();
    for distribution in ["PreferClose", "PreferSameZone"] {
        let name = distribution.to_lowercase();
        let vips = prefer(&world, &format!("{name}-each"), distribution, &["pod-a", "remote-a"]);
        near(&world, &vips, &["pod-a"], &["remote-a"]);
        let vips = prefer(&world, &format!("{name}-neighbour"), distribution, &["pod-a", "pod-b", "third"]);
        near(&world, &vips, &["pod-a", "pod-b"], &["third"]);
        let vips = prefer(&world, &format!("{name}-none"), distribution, &["remote-a", "third"]);
        near(&world, &vips, &["remote-a", "third"], &["remote-a", "third"]);
    }
}

/// Its own node, else its zone, else all.
#[test]
fn e2e_99_clients_prefer_their_node_then_their_zone() {
    let world = world();
    let vips = prefer(&world, "same-node", "PreferSameNode", &["pod-a", "remote-a", "third"]);
    near(&world, &vips, &["pod-a"], &["remote-a"]);
    let vips = prefer(&world, "same-node-neighbour", "PreferSameNode", &["pod-a", "pod-b", "third"]);
    near(&world, &vips, &["pod-a", "pod-b"], &["third"]);
    let vips = prefer(&world, "same-node-none", "PreferSameNode", &["remote-a", "third"]);
    near(&world, &vips, &["remote-a", "third"], &["remote-a"]);
}

#[test]
fn e2e_100_clients_that_prefer_their_node_go_elsewhere_when_its_endpoint_is_gone() {
    let world = world();
    let vips = world.vips("vanishing", json!({"trafficDistribution": "PreferSameNode"}));
    let pods = ["pod-a", "remote-a"].map(|server| world.run_pod("vanishing", server));
    near(&world, &vips, &["pod-a"], &["remote-a"]);
    pods[1].remove(&world.api);
    near(&world, &vips, &["pod-a"], &["pod-a"]);
    world.run_pod("vanishing", "remote-a");
    near(&world, &vips, &["pod-a"], &["remote-a"]);
    pods[0].remove(&world.api);
    near(&world, &vips, &["remote-a"], &["remote-a"]);
}
