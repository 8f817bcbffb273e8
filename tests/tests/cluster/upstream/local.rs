//! Policies of Local.

use std::net::SocketAddr;

use fairlead_lab::{Ask, Lab};
use serde_json::json;

use super::{Vips, world};

/// e2e 31 to 33: clients in Pods, on the node and outside; endpoints in a Pod and on the node's own network.
#[test]
fn e2e_31_to_33_an_internal_policy_of_local_keeps_to_the_node() {
    let world = world();
    for (name, here) in [("internal", "pod-a"), ("internal-host", "node")] {
        let vips = world.vips(name, json!({"internalTrafficPolicy": "Local"}));
        let there = world.run_pod(name, "remote-a");
        for host in world.hosts() {
            world.silent_from(&host.ns, &vips.all());
        }
        let own = world.run_pod(name, here);
        for host in world.hosts() {
            world.answered_from(&host.ns, &vips.all(), &[here]);
        }
        own.remove(&world.api);
        world.silent_from(&world.lab.client.ns, &vips.all());
        there.remove(&world.api);
        world.answered(&vips, &[]);
        there.run(&world.api);
        world.edit(name, &json!({"internalTrafficPolicy": "Cluster"}));
        world.answered(&vips, &["remote-a"]);
    }
}

/// e2e 34: a client outside is seen with its own address by the node's own Pods,
/// and a node without one is silent.
#[test]
fn e2e_34_a_local_node_port_keeps_the_clients_address() {
    let world = world();
    let service = world.service("visible", json!({"type": "NodePort", "externalTrafficPolicy": "Local"}));
    let ports = world.node_ports(&service);
    let outside = &world.lab.ext.ns;
    world.answered_from(outside, &ports, &[]);
    world.run_pod("visible", "remote-a");
    world.silent_from(outside, &ports);
    world.run_pod("visible", "pod-a");
    world.answered_from(outside, &ports, &["pod-a"]);
    for &(proto, to) in &ports {
        for client in Lab::external_clients(to.is_ipv6()) {
            let ask = Ask::new(proto, to).from(SocketAddr::new(client, 0));
            let outcome = ask.once(outside).expect("the namespace").outcome;
            let answer = outcome.answer().unwrap_or_else(|| panic!("{client} → {to}/{proto}: {outcome}"));
            assert_eq!((&*answer.server, answer.peer.ip()), ("pod-a", client));
        }
    }
    // Inside, the policy is the other one.
    world.answered(&Vips::of(&service), &["pod-a", "remote-a"]);
}
