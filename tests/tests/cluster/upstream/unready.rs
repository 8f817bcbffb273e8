//! Pods that are not ready, terminate or have failed.

use serde_json::json;

use super::world;

#[test]
fn e2e_20_unready_and_terminating_pods_serve_where_the_service_publishes_them() {
    let world = world();
    let vips = world.vips("tolerant", json!({"publishNotReadyAddresses": true}));
    let pod = world.pod("tolerant", "pod-a");
    pod.create(&world.api);
    pod.report(&world.api, "Running", false);
    world.answered(&vips, &["pod-a"]);
    pod.terminate(&world.api);
    world.edit("tolerant", &json!({"publishNotReadyAddresses": false}));
    world.answered(&vips, &[]);
    world.edit("tolerant", &json!({"publishNotReadyAddresses": true}));
    world.answered(&vips, &["pod-a"]);
    pod.remove(&world.api);
    world.answered(&vips, &[]);
}

/// e2e 21 and 22: one field is all that differs.
#[test]
fn e2e_21_22_a_terminating_pod_that_is_not_ready_serves_only_where_it_is_published() {
    let world = world();
    for publish in [true, false] {
        let name = format!("ending-{publish}");
        let service = world.service(&name, json!({"type": "NodePort", "publishNotReadyAddresses": publish}));
        let vips = super::Vips::of(&service);
        let pod = world.run_pod(&name, "pod-a");
        world.answered(&vips, &["pod-a"]);
        pod.terminate(&world.api);
        pod.report(&world.api, "Running", false);
        let servers: &[&str] = if publish { &["pod-a"] } else { &[] };
        for host in world.everywhere() {
            world.answered_from(host, &vips.all(), servers);
            world.answered_from(host, &world.every_node_port(&service), servers);
        }
    }
}

/// e2e 29, from everywhere. kube-proxy answers TCP by ICMP, Fairlead by a reset; the client is refused by both.
#[test]
fn e2e_29_a_service_without_endpoints_refuses() {
    let world = world();
    let vips = world.vips("deserted", json!({}));
    for host in world.hosts() {
        world.answered_from(&host.ns, &vips.all(), &[]);
    }
}

#[test]
fn e2e_30_an_evicted_pod_is_no_endpoint_even_of_a_tolerant_service() {
    let world = world();
    let vips = world.vips("evicted", json!({"publishNotReadyAddresses": true}));
    let pod = world.run_pod("evicted", "pod-a");
    world.answered(&vips, &["pod-a"]);
    pod.report(&world.api, "Failed", false);
    for host in world.hosts() {
        world.answered_from(&host.ns, &vips.all(), &[]);
    }
}

/// e2e 36: both sides of the fallback, the node's own Pod and one elsewhere.
#[test]
fn e2e_36_terminating_pods_serve_as_long_as_none_is_ready() {
    let world = world();
    let vips = world.vips("draining", json!({}));
    let ending = ["pod-a", "remote-a"].map(|server| world.run_pod("draining", server));
    world.answered(&vips, &["pod-a", "remote-a"]);
    for pod in &ending {
        pod.terminate(&world.api);
    }
    for host in world.inside() {
        world.answered_from(&host.ns, &vips.all(), &["pod-a", "remote-a"]);
    }
    let fresh = world.run_pod("draining", "pod-b");
    world.answered(&vips, &["pod-b"]);
    fresh.remove(&world.api);
    world.answered(&vips, &["pod-a", "remote-a"]);
    ending[0].report(&world.api, "Running", false);
    world.answered(&vips, &["remote-a"]);
}

#[test]
fn e2e_37_with_an_internal_policy_of_local_only_the_nodes_own_terminating_pod_serves() {
    let world = world();
    let vips = world.vips("draining-internal", json!({"internalTrafficPolicy": "Local"}));
    let [here, there] = ["pod-a", "remote-a"].map(|server| world.run_pod("draining-internal", server));
    here.terminate(&world.api);
    for host in world.hosts() {
        world.answered_from(&host.ns, &vips.all(), &["pod-a"]);
    }
    here.remove(&world.api);
    there.terminate(&world.api);
    for host in world.hosts() {
        world.silent_from(&host.ns, &vips.all());
    }
}

#[test]
fn e2e_39_a_local_node_port_is_served_by_the_nodes_own_terminating_pod_only() {
    let world = world();
    let service = world.service("draining-external", json!({"type": "NodePort", "externalTrafficPolicy": "Local"}));
    let ports = world.node_ports(&service);
    let outside = &world.lab.ext.ns;
    let [here, there] = ["pod-a", "remote-a"].map(|server| world.run_pod("draining-external", server));
    here.terminate(&world.api);
    world.answered_from(outside, &ports, &["pod-a"]);
    here.remove(&world.api);
    there.terminate(&world.api);
    world.silent_from(outside, &ports);
    // The same at its ClusterIP, which is not of Local policy.
    world.answered(&super::Vips::of(&service), &["remote-a"]);
}

#[test]
fn e2e_35_the_health_check_fails_while_a_terminating_pod_still_serves() {
    let world = world();
    let service = world.service("leaving", json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}));
    let status = |wanted| world.health(&service, "node", wanted);
    let pod = world.run_pod("leaving", "pod-a");
    status(200);
    pod.terminate(&world.api);
    status(503);
    world.answered_from(&world.lab.ext, &world.node_ports(&service), &["pod-a"]);
    // e2e 44: without the policy there is nothing to ask.
    world.edit("leaving", &json!({"externalTrafficPolicy": "Cluster"}));
    status(0);
}
