//! Devices that come and go.

use std::time::{Duration, Instant};

use fairlead_lab::{
    AgentOptions, Ask, Lab, Proto, probe,
    schedule::{self, Preferred},
};

use crate::cell::{Cell, Cluster, PATIENCE, answered};

/// How soon a new pod is served.
const BOUND: Duration = Duration::from_millis(50);
/// Measurements of which the worst counts.
const PODS: usize = 5;
/// A pause of the machine that spoils a measurement; it is taken again, with another pod, this many times.
const SPOILT: Duration = Duration::from_millis(8);
const AGAIN: usize = 40;

/// A new pod's first question to a Service is asked before its device is wired, and then every millisecond.
fn a_new_pod_is_served(cell: &str) {
    let _first = Preferred::new();
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
    let (mut taken, mut spoilt) = (Vec::new(), 0);
    while taken.len() < PODS {
        let n = taken.len() + spoilt;
        let last_byte = 50 + u8::try_from(n).unwrap();
        let pod = cluster.lab.add_pod(&format!("new-{n}"), last_byte).unwrap().clone();
        let begun = Instant::now();
        let found = probe::until_answer(&pod.ns, vip, true, PATIENCE, |server| server == "pod-a").unwrap();
        if schedule::longest_pause(begun, found.at) < SPOILT {
            taken.push(found.asked.duration_since(begun));
        } else {
            spoilt += 1;
            assert!(spoilt < AGAIN, "[{cell}] the machine paused in each of {AGAIN} measurements");
        }
    }
    let worst = taken.into_iter().max().unwrap_or_default();
    println!(
        "[{cell}] a new veth was served {worst:?} after it was wired, at worst of {PODS}; {spoilt} not counted, \
         because the machine paused meanwhile"
    );
    assert!(worst < BOUND, "[{cell}] a new veth was served after {worst:?}\n{}", cluster.agent_log_tail());
    remove_and_recreate(&mut cluster, vip);
}

/// The same name, another device: what was known of the old one must not linger.
fn remove_and_recreate(cluster: &mut Cluster, vip: std::net::SocketAddr) {
    let lab: &mut Lab = &mut cluster.lab;
    let old = lab.pods.pop().unwrap();
    lab.node.ns.output("ip", &["link", "del", &old.node_device]).unwrap();
    old.ns.delete();
    let new = lab.add_pod(&old.name, 40).unwrap().clone();
    probe::until_answer(&new.ns, vip, true, PATIENCE, |server| server == "pod-a").unwrap();
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
