//! Devices that come and go.

use std::time::{Duration, Instant};

use fairlead_lab::{AgentOptions, Ask, Lab, Proto, probe};

use crate::cell::{Cell, Cluster, answered};

/// A new pod's first question to a Service is asked before its device is wired, and then every millisecond.
fn a_new_pod_is_served(cell: &str) {
    let mut cluster = Cluster::own(Cell::named(cell), AgentOptions::default());
    let vip = {
        let service = cluster.service("new-veth");
        let client = &cluster.lab.client.ns;
        service.serve(&service.pods(&[0]), client, Ask::new(Proto::Udp, service.vip(false))).unwrap();
        // Kept: the handle would take it away again.
        let vip = service.vip(false);
        std::mem::forget(service);
        vip
    };
    let mut worst = Duration::ZERO;
    for n in 0..5u8 {
        let (name, limit) = (format!("new-{n}"), Duration::from_secs(2));
        let pod = cluster.lab.add_pod(&name, 30 + n).unwrap().clone();
        let begun = Instant::now();
        let found = probe::until_answer(&pod.ns, vip, true, limit, |server| server == "pod-a").unwrap();
        worst = worst.max(found.asked.duration_since(begun));
    }
    println!("[{cell}] a new veth was served {worst:?} after it was wired, at worst of five");
    assert!(worst < Duration::from_millis(50), "[{cell}] a new veth was served after {worst:?}");
    remove_and_recreate(&mut cluster, vip);
}

/// The same name, another device: what was known of the old one must not linger.
fn remove_and_recreate(cluster: &mut Cluster, vip: std::net::SocketAddr) {
    let lab: &mut Lab = &mut cluster.lab;
    let old = lab.pods.pop().unwrap();
    lab.node.ns.output("ip", &["link", "del", &old.node_device]).unwrap();
    old.ns.delete();
    let new = lab.add_pod(&old.name, 40).unwrap().clone();
    probe::until_answer(&new.ns, vip, true, Duration::from_secs(1), |server| server == "pod-a").unwrap();
    answered(&lab.client.ns, Ask::new(Proto::Tcp, vip)).unwrap();
}

#[test]
fn a_new_routed_veth_is_served_within_50_ms() {
    a_new_pod_is_served("routed_conntrack");
}

#[test]
fn a_new_bridge_port_is_served_within_50_ms() {
    a_new_pod_is_served("bridge_conntrack");
}
