//! `loadBalancerSourceRanges`.

use std::net::IpAddr;

use fairlead_lab::Host;
use serde_json::{Value, json};

use super::{Vips, World, world};

fn only(ips: &[IpAddr]) -> Value {
    let ranges: Vec<_> = ips.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv6() { 128 } else { 32 })).collect();
    json!({"loadBalancerSourceRanges": ranges})
}

fn ips(host: &Host) -> [IpAddr; 2] {
    [host.ip(false), host.ip(true)]
}

/// e2e 78: Pods as clients; and clients outside, which is what the field is for.
#[test]
fn e2e_78_a_balancers_addresses_are_for_clients_in_the_source_ranges() {
    let world = world();
    let service = world.service("guarded", json!({"type": "LoadBalancer"}));
    let balancer = world.balance(&service, 78);
    world.run_pod("guarded", "pod-a");
    world.run_pod("guarded", "remote-a");
    let served = |world: &World, pods: &[&Host]| {
        for host in [&world.lab.client.host, &world.lab.pods[1].host, &world.other.lab.client.host] {
            if pods.iter().any(|pod| pod.name == host.name && std::ptr::eq(*pod, host)) {
                world.answered_from(host, &balancer, &["pod-a", "remote-a"]);
            } else {
                world.silent_from(host, &balancer[..2]);
            }
        }
    };
    let (client, pod, there) = (&world.lab.client.host, &world.lab.pods[1].host, &world.other.lab.client.host);
    let [by_here, by_there] = world.outside();
    served(&world, &[client, pod, there]);
    world.edit("guarded", &only(&ips(client)));
    served(&world, &[client]);
    world.silent_from(by_here, &balancer[..1]);
    world.edit("guarded", &only(&[ips(pod), ips(there), by_here.at.expect("addresses of its own")].concat()));
    served(&world, &[pod, there]);
    world.answered_from(by_here, &balancer, &["pod-a", "remote-a"]);
    world.silent_from(by_there, &balancer[..1]);
    // Other addresses are not guarded.
    world.answered(&Vips::of(&service), &["pod-a", "remote-a"]);
    world.answered_from(by_there, &world.every_node_port(&service), &["pod-a", "remote-a"]);
    world.edit("guarded", &json!({"loadBalancerSourceRanges": null}));
    served(&world, &[client, pod, there]);
    world.answered_from(by_there, &balancer, &["pod-a", "remote-a"]);
}
