//! `NodePorts` that every node serves, with whatever endpoints: the policy is `Cluster` where nothing else is said.

use fairlead_lab::{Proto, Server};
use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use super::{Vips, port, world};

/// Ports that the API server gives to nobody who does not ask for them: it takes those above 30,085 first.
const SAME: i32 = 30_012;
const FREED: i32 = 30_019;
const HEALTH: i32 = 30_023;

/// e2e 12; and with one number for both `NodePorts`.
#[test]
fn e2e_12_a_service_becomes_a_node_port_with_the_same_port_of_both_protocols() {
    let world = world();
    let ports = |number: Option<i32>| {
        Proto::ALL
            .map(|proto| {
                let mut port = port(&proto.name().to_lowercase(), 80, proto, 8080);
                port["nodePort"] = json!(number);
                port
            })
            .to_vec()
    };
    let vips = world.vips("update", json!({"ports": ports(None)[..1]}));
    world.run_pod("update", "pod-a");
    world.run_pod("update", "remote-a");
    world.answered_from(&world.lab.client.ns, &[(Proto::Tcp, vips.v4), (Proto::Tcp, vips.v6)], &["pod-a", "remote-a"]);
    for number in [None, Some(SAME)] {
        let service = world.edit("update", &json!({"type": "NodePort", "ports": ports(number)}));
        for client in world.everywhere() {
            world.answered_from(client, &world.every_node_port(&service), &["pod-a", "remote-a"]);
        }
        world.answered(&vips, &["pod-a", "remote-a"]);
    }
}

/// e2e 19: a process of the node can have the port, and so can another Service. And 61.
#[test]
fn e2e_19_61_a_node_port_ends_with_its_service_and_is_free_again() {
    let world = world();
    let ports = Proto::ALL.map(|proto| {
        let mut port = port(&proto.name().to_lowercase(), 80, proto, 8080);
        port["nodePort"] = json!(FREED);
        port
    });
    let spec = json!({"type": "NodePort", "ports": ports});
    let service = world.service("let-go", spec.clone());
    let at = world.every_node_port(&service);
    world.run_pod("let-go", "pod-a");
    for client in world.everywhere() {
        world.answered_from(client, &at, &["pod-a"]);
    }
    world.api.delete::<Service>("default", "let-go").expect("the end of a Service");
    for client in world.everywhere() {
        world.answered_from(client, &at, &[]);
    }
    let own = world.node_ports(&service);
    let process = Server::start(&world.lab.node.ns, "process", &own).expect("a socket at that port");
    for client in world.everywhere() {
        world.answered_from(client, &own, &["process"]);
    }
    drop(process);
    world.service("let-go", spec);
    for client in world.everywhere() {
        world.answered_from(client, &at, &["pod-a"]);
    }
}

#[test]
fn e2e_38_every_node_port_falls_back_to_a_terminating_pod_wherever_it_is() {
    let world = world();
    for server in ["pod-a", "remote-a"] {
        let name = format!("last-{server}");
        let service = world.service(&name, json!({"type": "NodePort"}));
        let pod = world.run_pod(&name, server);
        world.answered(&Vips::of(&service), &[server]);
        pod.terminate(&world.api);
        for client in world.everywhere() {
            world.answered_from(client, &world.every_node_port(&service), &[server]);
        }
        // Not as long as another one is ready.
        let ready = world.run_pod(&name, "pod-b");
        for client in world.everywhere() {
            world.answered_from(client, &world.every_node_port(&service), &["pod-b"]);
        }
        ready.remove(&world.api);
        world.answered_from(&world.lab.ext, &world.every_node_port(&service), &[server]);
    }
}

/// e2e 44: there and back. The Pod is on the first node; the other one has none.
#[test]
fn e2e_44_node_ports_and_health_checks_follow_the_policy() {
    let world = world();
    // Of its own: another one would be somebody else's as soon as it is free.
    let health = json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": HEALTH});
    let mut spec = health.clone();
    spec["type"] = json!("LoadBalancer");
    let service = world.service("changing-policy", spec);
    world.run_pod("changing-policy", "pod-a");
    let [here, there] = ["node", "other-node"].map(|node| world.node_ports_at(&service, node));
    let [outside, _] = world.outside();
    let local = |service: &Service| {
        world.health(service, "node", 200);
        world.health(service, "other-node", 503);
        world.answered_from(outside, &here, &["pod-a"]);
        world.sees(outside, &here, "pod-a", outside.at.expect("addresses of its own"));
        world.silent_from(outside, &there);
        // Whoever is on the node that it asks takes the short way to all endpoints; others are outside.
        for host in [&world.other.lab.client.host, &world.other.lab.node] {
            world.answered_from(host, &there, &["pod-a"]);
            world.answered_from(host, &here, &["pod-a"]);
        }
        for host in world.inside() {
            world.answered_from(host, &here, &["pod-a"]);
            world.silent_from(host, &there[..1]);
        }
    };
    local(&service);
    let open = world.edit("changing-policy", &json!({"externalTrafficPolicy": "Cluster"}));
    for (at, node) in [(&here, "node"), (&there, "other-node")] {
        for client in world.everywhere() {
            world.answered_from(client, at, &["pod-a"]);
        }
        world.sees(outside, at, "pod-a", world.ips(node));
        world.health(&service, node, 0);
    }
    assert_eq!(open.spec.and_then(|spec| spec.health_check_node_port).unwrap_or_default(), 0);
    let closed = world.edit("changing-policy", &health);
    local(&closed);
}
