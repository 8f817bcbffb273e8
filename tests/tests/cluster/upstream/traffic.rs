//! Who reaches whom, and what the server sees.

use std::{net::SocketAddr, time::Duration};

use fairlead_lab::{Ask, Namespace, Proto, http};
use serde_json::json;

use super::{TARGET, world};
use crate::agent::throughout;

/// Bytes of a large request: a datagram of as many comes in fragments.
const LARGE: usize = 2_000;

/// The client's address as the server saw it.
fn seen_as(from: &Namespace, proto: Proto, to: SocketAddr) -> (String, std::net::IpAddr) {
    let outcome = Ask::new(proto, to).once(from).expect("the namespace").outcome;
    let answer = outcome.answer().unwrap_or_else(|| panic!("{to}/{proto}: {outcome}"));
    (answer.server.clone(), answer.peer.ip())
}

/// e2e 4; and 106: nor is what is no Service's.
#[test]
fn e2e_4_106_a_pods_address_is_kept_through_a_cluster_ip_and_without_one() {
    let world = world();
    let vips = world.vips("seen", json!({}));
    let client = &world.lab.client;
    for server in ["pod-a", "remote-a"] {
        let pod = world.run_pod("seen", server);
        world.answered(&vips, &[server]);
        for (proto, to) in vips.all() {
            assert_eq!(seen_as(&client.ns, proto, to), (server.to_owned(), client.ip(to.is_ipv6())), "{to}/{proto}");
        }
        for (ip, proto) in world.ips(server).into_iter().flat_map(|ip| Proto::ALL.map(|proto| (ip, proto))) {
            let seen = seen_as(&client.ns, proto, SocketAddr::new(ip, TARGET));
            assert_eq!(seen, (server.to_owned(), client.ip(ip.is_ipv6())), "{ip}/{proto}");
        }
        pod.remove(&world.api);
        world.answered(&vips, &[]);
    }
    // From outside to a Pod, too.
    for (v6, proto) in [false, true].into_iter().flat_map(|v6| Proto::ALL.map(|proto| (v6, proto))) {
        let to = SocketAddr::new(world.ips("pod-a")[usize::from(v6)], TARGET);
        assert_eq!(seen_as(&world.lab.ext.ns, proto, to), ("pod-a".to_owned(), world.lab.ext.ip(v6)), "{to}/{proto}");
    }
}

#[test]
fn e2e_5_a_pod_reaches_itself_through_its_service() {
    let world = world();
    let vips = world.vips("mirror", json!({}));
    let pod = world.run_pod("mirror", "pod-a");
    world.answered_from(&world.lab.pods[0].ns, &vips.all(), &["pod-a"]);
    pod.remove(&world.api);
    world.answered_from(&world.lab.pods[0].ns, &vips.all(), &[]);
}

/// e2e 56 to 58 and 70 to 72, and 10 and 62 with them: Pods, nodes, a host outside and the endpoints themselves, at the
/// `ClusterIP` and the `NodePort` of every node, over both families and transports, each endpoint and no other. And 65 and
/// 76: the same where endpoints are on the networks of their nodes.
#[test]
fn e2e_10_56_to_58_62_65_70_to_72_76_every_client_reaches_every_endpoint() {
    let world = world();
    for (name, servers) in [("mesh", ["pod-a", "pod-b", "remote-a"]), ("mesh-host", ["node", "pod-b", "other-node"])] {
        let service = world.service(name, json!({"type": "NodePort"}));
        let at = [&super::Vips::of(&service).all()[..], &world.every_node_port(&service)].concat();
        for server in servers {
            world.run_pod(name, server);
        }
        let endpoints = [&world.lab.pods[0].host, &world.other.lab.pods[0].host];
        for client in world.everywhere().into_iter().chain(endpoints) {
            world.answered_from(client, &at, &servers);
        }
    }
}

/// e2e 65, longer: answers to a socket of the node arrive at the address of an endpoint, and go on to when UDP flows are
/// confirmed, after two seconds.
#[test]
fn e2e_65_a_socket_of_the_node_goes_on_hearing_where_the_node_is_an_endpoint() {
    let world = world();
    let host = world.vips("hosted", json!({}));
    world.run_pod("hosted", "node");
    world.answered(&host, &["node"]);
    let vips = world.vips("heard", json!({}));
    world.run_pod("heard", "pod-a");
    world.answered(&vips, &["pod-a"]);
    let open = |(proto, to)| Ask::new(proto, to).open(&world.lab.node.ns).expect("the namespace").expect("a socket");
    let mut sockets: Vec<_> = vips.all().into_iter().chain(host.all()).map(open).collect();
    throughout(Duration::from_millis(3_500), || {
        for socket in &mut sockets {
            let outcome = socket.ask().outcome;
            assert!(outcome.answer().is_some(), "{:?}: {outcome}", socket.local());
        }
    });
}

/// e2e 64 and 75: segments and fragments, to a Pod of the node and to one that is reached by the uplink, masqueraded and not.
/// A large datagram of the node's own to its own `NodePort` is lost still: docs/packet-path.md, section 8.
#[test]
fn e2e_64_75_large_requests_and_answers_arrive_whole() {
    let world = world();
    let service = world.service("large", json!({"type": "NodePort"}));
    let cluster_ips = super::Vips::of(&service).all();
    let at = [&cluster_ips[..], &world.node_ports(&service)].concat();
    world.run_pod("large", "pod-a");
    world.run_pod("large", "remote-a");
    for host in world.hosts() {
        let at = if host.name == world.lab.node.name { &cluster_ips[..] } else { &at };
        world.answered_from(host, at, &["pod-a", "remote-a"]);
        for &(proto, to) in at {
            for _ in 0..10 {
                let mut conversation =
                    Ask::new(proto, to).open(&host.ns).expect("the namespace").expect("a connection");
                let outcome = conversation.ask_bulk(LARGE, LARGE).outcome;
                assert!(outcome.answer().is_some(), "{LARGE} bytes from {} to {to}/{proto}: {outcome}", host.name);
            }
        }
    }
}

/// e2e 108: a terminating Pod is a client and a server like any other, directly and through Services.
#[test]
fn e2e_108_a_terminating_pod_reaches_others_and_is_reached() {
    let world = world();
    let vips = world.vips("living", json!({}));
    world.run_pod("living", "pod-b");
    let ending = world.run_pod("dying", "pod-a");
    world.answered(&vips, &["pod-b"]);
    ending.terminate(&world.api);
    world.answered_from(&world.lab.pods[0].ns, &vips.all(), &["pod-b"]);
    for (ip, proto) in world.ips("pod-a").into_iter().flat_map(|ip| Proto::ALL.map(|proto| (ip, proto))) {
        let to = SocketAddr::new(ip, TARGET);
        assert_eq!(seen_as(&world.lab.pods[1].ns, proto, to), ("pod-a".to_owned(), world.lab.pods[1].ip(ip.is_ipv6())));
    }
}

/// e2e 55.
#[test]
fn e2e_55_the_proxys_urls_answer() {
    let world = world();
    let get = |port: u16, path: &str| {
        http::get(&world.lab.node.ns, SocketAddr::from(([127, 0, 0, 1], port)), path).expect("an answer")
    };
    let health = get(10_256, "/healthz");
    assert_eq!(health.status, 200);
    assert!(health.body.contains("lastUpdated"), "{}", health.body);
    let mode = get(10_249, "/proxyMode");
    assert_eq!((mode.status, &*mode.body), (200, "ebpf"));
}
