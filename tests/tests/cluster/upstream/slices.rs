//! Slices that no selector made: by hand, and mirrored from legacy Endpoints by kube-controller-manager.

use fairlead_lab::Proto;
use k8s_openapi::api::{
    core::v1::{Endpoints, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::{Value, json};

use super::{SOON, World, port, world};
use crate::fixture::Vips;

fn without_selector(world: &World, name: &str, ports: &Value) -> Vips {
    world.vips(name, json!({"selector": null, "ports": ports}))
}

fn slice(world: &World, name: &str, service: &str, v6: bool, ports: &Value, servers: &[&str]) -> EndpointSlice {
    let endpoints: Vec<_> =
        servers.iter().map(|server| json!({"addresses": [world.ips(server)[usize::from(v6)]]})).collect();
    let family = if v6 { "IPv6" } else { "IPv4" };
    serde_json::from_value(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-{}", family.to_lowercase()), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family, "endpoints": endpoints, "ports": ports,
    }))
    .expect("a slice")
}

/// e2e 91: the ports of a Service stand in several slices, without the names of nodes.
#[test]
fn e2e_91_ports_may_stand_in_several_slices() {
    let world = world();
    let ports = [port("first", 80, Proto::Tcp, 8080), port("second", 81, Proto::Tcp, 8081)];
    let vips = without_selector(&world, "by-port", &json!(ports));
    for v6 in [false, true] {
        for (name, number, server) in [("first", 8080, "pod-a"), ("second", 8081, "pod-b")] {
            let ports = json!([{"name": name, "port": number, "protocol": "TCP"}]);
            let slice = slice(&world, &format!("by-port-{name}"), "by-port", v6, &ports, &[server]);
            world.api.create(&slice).expect("a slice");
        }
    }
    for mut vip in [vips.v4, vips.v6] {
        world.answered_from(&world.lab.client.ns, &[(Proto::Tcp, vip)], &["pod-a"]);
        vip.set_port(81);
        world.answered_from(&world.lab.client.ns, &[(Proto::Tcp, vip)], &["pod-b"]);
    }
}

#[test]
fn e2e_92_addresses_may_stand_in_several_slices() {
    let world = world();
    let ports = json!([port("tcp", 80, Proto::Tcp, 8080), port("udp", 80, Proto::Udp, 8080)]);
    let vips = without_selector(&world, "by-address", &ports);
    let ports = json!([
        {"name": "tcp", "port": 8080, "protocol": "TCP"}, {"name": "udp", "port": 8080, "protocol": "UDP"},
    ]);
    for v6 in [false, true] {
        for servers in [["pod-a", "pod-b"], ["pod-b", "remote-a"]] {
            let name = format!("by-address-{}", servers[0]);
            world.api.create(&slice(&world, &name, "by-address", v6, &ports, &servers)).expect("a slice");
        }
    }
    world.answered(&vips, &["pod-a", "pod-b", "remote-a"]);
    for v6 in [false, true] {
        let family = if v6 { "ipv6" } else { "ipv4" };
        world.api.delete::<EndpointSlice>("default", &format!("by-address-pod-a-{family}")).expect("its end");
    }
    world.answered(&vips, &["pod-b", "remote-a"]);
}

fn endpoints(world: &World, name: &str, subsets: &[(&[&str], u16)]) -> Endpoints {
    let subset = |(servers, number): &(&[&str], u16)| {
        let addresses: Vec<_> =
            servers.iter().flat_map(|server| world.ips(server)).map(|ip| json!({"ip": ip})).collect();
        let ports =
            ["TCP", "UDP"].map(|proto| json!({"name": proto.to_lowercase(), "port": number, "protocol": proto}));
        json!({"addresses": addresses, "ports": ports})
    };
    let subsets: Vec<_> = subsets.iter().map(subset).collect();
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name, "namespace": "default"}, "subsets": subsets,
    }))
    .expect("Endpoints")
}

/// e2e 93: the proxy never reads Endpoints (rule 5), it sees what the controller makes of them.
#[test]
fn e2e_93_legacy_endpoints_are_mirrored_and_served_updated_and_deleted() {
    let world = world();
    let ports = json!([port("tcp", 80, Proto::Tcp, 8080), port("udp", 80, Proto::Udp, 8080)]);
    let vips = without_selector(&world, "legacy", &ports);
    world.answered(&vips, &[]);
    world.api.create(&endpoints(&world, "legacy", &[(&["pod-a"], 8080)])).expect("Endpoints");
    world.answered(&vips, &["pod-a"]);
    world.api.replace(&endpoints(&world, "legacy", &[(&["pod-b", "remote-a"], 8081)])).expect("Endpoints");
    world.answered(&vips, &["pod-b", "remote-a"]);
    // Several subsets, one of them with an address of another one.
    let several: [(&[&str], u16); 2] = [(&["pod-b"], 8080), (&["pod-b", "pod-c"], 8082)];
    world.api.replace(&endpoints(&world, "legacy", &several)).expect("Endpoints");
    world.answered(&vips, &["pod-b", "pod-c"]);
    let mut seen = std::collections::BTreeSet::new();
    let reached = fairlead_lab::server::wait_until(SOON, || {
        let outcome = world.ask(Proto::Tcp, vips.v4);
        seen.extend(outcome.answer().map(|answer| (answer.server.clone(), answer.local.port())));
        seen.len() == 3
    });
    assert!(reached, "one address, two ports: {seen:?}");
    world.api.delete::<Endpoints>("default", "legacy").expect("the end of Endpoints");
    world.answered(&vips, &[]);
    world.api.create(&endpoints(&world, "legacy", &[(&["pod-c"], 8080)])).expect("Endpoints");
    world.answered(&vips, &["pod-c"]);
    world.api.delete::<Service>("default", "legacy").expect("the end of a Service");
    world.gone(&vips, SOON);
}
