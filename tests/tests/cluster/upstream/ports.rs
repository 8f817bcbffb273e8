//! Ports of a Service: added, removed, of several protocols.

use std::{fs, net::SocketAddr};

use fairlead_lab::{Load, LoadPlan, Proto};
use serde_json::json;

use super::{Vips, port, world};

fn at(vips: &Vips, proto: Proto, number: u16) -> [(Proto, SocketAddr); 2] {
    [vips.v4, vips.v6].map(|vip| (proto, SocketAddr::new(vip.ip(), number)))
}

#[test]
fn e2e_3_ports_are_served_as_they_are_added_and_removed() {
    let world = world();
    let client = &world.lab.client.ns;
    let (first, second) = (port("first", 80, Proto::Tcp, 8080), port("second", 81, Proto::Tcp, 8081));
    let vips = world.vips("changing", json!({"ports": [first]}));
    world.run_pod("changing", "pod-a");
    let (old, new) = (at(&vips, Proto::Tcp, 80), at(&vips, Proto::Tcp, 81));
    world.answered_from(client, &old, &["pod-a"]);
    world.answered_from(client, &new, &[]);
    let load = Load::start(client, LoadPlan { workers: 1, ..LoadPlan::new(Proto::Tcp, vips.v4) }).expect("a load");
    for _ in 0..3 {
        world.edit("changing", &json!({"ports": [first, second]}));
        world.answered_from(client, &new, &["pod-a"]);
        world.edit("changing", &json!({"ports": [first]}));
        world.answered_from(client, &new, &[]);
    }
    world.edit("changing", &json!({"ports": [first, second]}));
    world.answered_from(client, &new, &["pod-a"]);
    let report = load.stop();
    assert!(report.failures().is_empty(), "the port that stayed was disturbed: {report}");
    world.edit("changing", &json!({"ports": [second]}));
    world.answered_from(client, &old, &[]);
    world.answered_from(client, &new, &["pod-a"]);
}

/// e2e 41; and 42, where the Service is of a type that asks for more than its ClusterIP.
#[test]
fn e2e_41_42_one_number_is_a_port_of_each_protocol() {
    let world = world();
    for (name, kind) in [("both", "ClusterIP"), ("both-balanced", "LoadBalancer")] {
        let client = &world.lab.client.ns;
        let vips = world.vips(name, json!({"type": kind}));
        world.run_pod(name, "pod-a");
        world.answered(&vips, &["pod-a"]);
        world.edit(name, &json!({"ports": [port("tcp", 80, Proto::Tcp, 8080)]}));
        world.answered_from(client, &at(&vips, Proto::Udp, 80), &[]);
        world.answered_from(client, &at(&vips, Proto::Tcp, 80), &["pod-a"]);
    }
}

/// e2e 43, and what else the Service has is served. That SCTP is, packets show: a socket would load the module.
#[test]
fn e2e_43_a_port_of_sctp_disturbs_no_other_and_loads_no_module() {
    let world = world();
    let loaded =
        || fs::read_to_string("/proc/modules").unwrap_or_default().lines().any(|line| line.starts_with("sctp "));
    let before = loaded();
    let sctp = json!({"name": "sctp", "port": 80, "protocol": "SCTP", "targetPort": 8080});
    let spec = json!({"ports": [sctp, port("tcp", 80, Proto::Tcp, 8080), port("udp", 80, Proto::Udp, 8080)]});
    let vips = world.vips("mixed", spec);
    world.run_pod("mixed", "pod-a");
    world.answered(&vips, &["pod-a"]);
    assert_eq!(loaded(), before, "the module sctp");
}
