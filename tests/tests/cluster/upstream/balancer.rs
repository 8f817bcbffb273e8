//! Addresses that the cluster does not give itself: a load balancer's, and `externalIPs`. The cases say what a balancer would
//! report, and the external host routes it to a node, as a balancer that leaves the address in the packet does.

use std::{net::IpAddr, time::Duration};

use fairlead_lab::{Load, LoadPlan, Proto};
use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use super::world::{at_ports, balancer_ips};
use super::{SOON, Vips, World, port, world};
use crate::pods::PodSpec;

/// `NodePorts` that the API server gives to nobody who does not ask for them: it takes those above 30,085 first.
const CHOSEN: [i32; 2] = [30_077, 30_078];
/// What another case could be given, once it is free, would go on answering.
const LEFT: [i32; 2] = [30_075, 30_076];

/// e2e 11, in the spelling that upstream gives to the address.
#[test]
fn e2e_11_an_external_ip_that_no_node_has_is_served() {
    let world = world();
    let ips = ["203.0.113.250", "2001:DB8::cb00:71fa"];
    let service = world.service("foreign", json!({"externalIPs": ips}));
    world.run_pod("foreign", "pod-a");
    world.run_pod("foreign", "remote-a");
    let at = at_ports(&service, &ips.map(|ip| ip.parse::<IpAddr>().expect("an address")));
    for host in &world.everywhere()[..4] {
        world.answered_from(*host, &at, &["pod-a", "remote-a"]);
    }
    // From outside, where such an address is routed to a node.
    let service = world.edit("foreign", &json!({"externalIPs": balancer_ips(11)}));
    for client in world.outside() {
        world.answered_from(client, &at_ports(&service, &balancer_ips(11)), &["pod-a", "remote-a"]);
    }
    for &(proto, to) in &at {
        world.ask_until(SOON, proto, to, "gone", |outcome| outcome.answer().is_none());
    }
}

/// e2e 77, over both transports.
#[test]
fn e2e_77_a_service_is_served_through_every_change_of_type_and_ports() {
    let world = world();
    let service = world.service("mutable", json!({}));
    let pod = world.run_pod("mutable", "pod-a");
    let mut vips = Vips::of(&service).all();
    let [by_here, by_there] = world.outside();
    let served = |at: &[_], servers: &[&str]| {
        world.answered_from(&world.other.lab.client.ns, at, servers);
        world.answered_from(by_here, at, servers);
    };
    served(&vips, &["pod-a"]);
    let ports = |number: u16, node_ports: [i32; 2]| {
        let both = [(Proto::Tcp, node_ports[0]), (Proto::Udp, node_ports[1])].map(|(proto, node_port)| {
            let mut port = port(&proto.name().to_lowercase(), number, proto, 8080);
            port["nodePort"] = json!(node_port);
            port
        });
        json!(both)
    };
    let service = world.edit("mutable", &json!({"type": "NodePort", "ports": ports(80, LEFT)}));
    served(&world.every_node_port(&service), &["pod-a"]);
    let service = world.edit("mutable", &json!({"type": "LoadBalancer"}));
    let balancer = world.balance(&service, 77);
    let old = world.every_node_port(&service);
    for at in [&vips[..], &old, &balancer] {
        served(at, &["pod-a"]);
    }
    world.answered_from(by_there, &balancer, &["pod-a"]);

    let service = world.edit("mutable", &json!({"ports": ports(80, CHOSEN)}));
    let new = world.every_node_port(&service);
    for at in [&vips[..], &new, &balancer] {
        served(at, &["pod-a"]);
    }
    served(&old, &[]);

    let service = world.edit("mutable", &json!({"ports": ports(81, CHOSEN)}));
    let before = vips;
    vips = vips.map(|(proto, mut vip)| {
        vip.set_port(81);
        (proto, vip)
    });
    let balancer = at_ports(&service, &balancer_ips(77));
    for at in [&vips[..], &new, &balancer] {
        served(at, &["pod-a"]);
    }
    served(&before, &[]);

    pod.remove(&world.api);
    for at in [&vips[..], &new, &balancer] {
        served(at, &[]);
    }
    pod.run(&world.api);
    for at in [&vips[..], &new, &balancer] {
        served(at, &["pod-a"]);
    }

    world.edit("mutable", &json!({"type": "ClusterIP"}));
    served(&new, &[]);
    for &(proto, to) in &balancer {
        world.ask_from_until(by_here, SOON, proto, to, "gone", |outcome| outcome.answer().is_none());
    }
    served(&vips, &["pod-a"]);
}

#[test]
fn e2e_81_a_balancer_may_do_without_node_ports_and_get_them_later() {
    let world = world();
    let spec = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false});
    let service = world.service("portless", spec);
    let numbers = |service: &Service| {
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.clone()).unwrap_or_default();
        ports.iter().filter_map(|port| port.node_port).count()
    };
    assert_eq!(numbers(&service), 0);
    let balancer = world.balance(&service, 81);
    world.run_pod("portless", "pod-a");
    let served = || world.outside().into_iter().for_each(|client| world.answered_from(client, &balancer, &["pod-a"]));
    served();
    let service = world.edit("portless", &json!({"allocateLoadBalancerNodePorts": true}));
    assert_eq!(numbers(&service), 2);
    for client in world.everywhere() {
        world.answered_from(client, &world.every_node_port(&service), &["pod-a"]);
    }
    served();
}

/// e2e 83. Upstream allows one failure in twenty; here there is none.
#[test]
fn e2e_83_pods_are_replaced_without_a_failed_request() {
    let world = world();
    for (policy, n) in [("Cluster", 83), ("Local", 84)] {
        let name = format!("rolling-{}", policy.to_lowercase());
        let service = world.service(&name, json!({"type": "LoadBalancer", "externalTrafficPolicy": policy}));
        let balancer = world.balance(&service, n);
        let [by_here, by_there] = world.outside();
        let mut running = ["pod-a", "remote-a"].map(|server| world.run_pod(&name, server));
        let up = |here: &str, there: &str| {
            let both: &[&str] = &[here, there];
            let (of_here, of_there) = if policy == "Local" { (&both[..1], &both[1..]) } else { (both, both) };
            world.answered_from(by_here, &balancer, of_here);
            world.answered_from(by_there, &balancer, of_there);
        };
        up("pod-a", "remote-a");
        let loads: Vec<_> = balancer
            .iter()
            .flat_map(|&(proto, to)| world.outside().map(|client| (proto, to, client)))
            .map(|(proto, to, client)| {
                let from = client.at.map(|ips| ips[usize::from(to.is_ipv6())]);
                let plan = LoadPlan { workers: 1, pause: Duration::from_millis(2), from, ..LoadPlan::new(proto, to) };
                Load::start(client.ns, plan).expect("a load")
            })
            .collect();
        for [here, there] in [["pod-b", "remote-b"], ["pod-c", "remote-a"], ["pod-a", "remote-b"]] {
            let next = [here, there].map(|server| world.run_pod(&name, server));
            end(&world, &running);
            up(here, there);
            running = next;
        }
        for load in loads {
            let report = load.stop();
            assert!(report.failures().is_empty(), "{policy}: {report}");
            assert!(report.by_server().len() >= 2, "{policy}: {report}");
        }
    }
}

/// Its grace period begins and ends.
fn end(world: &World, pods: &[PodSpec]) {
    for pod in pods {
        pod.terminate(&world.api);
        pod.report(&world.api, "Running", false);
        pod.remove(&world.api);
    }
}

/// e2e 84 to 87: where endpoints are, the health check says so and clients keep their addresses; Pods keep theirs wherever
/// they are, by the short way.
#[test]
fn e2e_84_to_87_a_local_balancer_leads_to_nodes_with_endpoints() {
    let world = world();
    let service = world.service("balanced", json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}));
    let balancer = world.balance(&service, 87);
    let outside = world.outside();
    let own = |by: usize| outside[by].at.expect("addresses of its own");
    let health = |here: u16, there: u16| {
        world.health(&service, "node", here);
        world.health(&service, "other-node", there);
    };
    let pods_keep_their_addresses = |server: &str| {
        for pod in [&world.lab.client.host, &world.other.lab.client.host] {
            world.sees(pod, &balancer, server, [false, true].map(|v6| pod.ip(v6)));
            world.sees(pod, &Vips::of(&service).all(), server, [false, true].map(|v6| pod.ip(v6)));
        }
    };
    health(503, 503);
    let here = world.run_pod("balanced", "pod-a");
    health(200, 503);
    world.sees(outside[0], &balancer, "pod-a", own(0));
    world.silent_from(outside[1], &balancer[..2]);
    pods_keep_their_addresses("pod-a");
    world.run_pod("balanced", "remote-a");
    health(200, 200);
    for (by, server) in [(0, "pod-a"), (1, "remote-a")] {
        world.answered_from(outside[by], &balancer, &[server]);
        world.sees(outside[by], &balancer, server, own(by));
    }
    here.remove(&world.api);
    health(503, 200);
    world.silent_from(outside[0], &balancer[..2]);
    world.answered_from(outside[1], &balancer, &["remote-a"]);
    pods_keep_their_addresses("remote-a");
}
