//! Upstream's cases of conntrack: UDP clients that keep their port, as resolvers and tunnels do, and a segment that
//! connection tracking calls invalid.

use std::{net::SocketAddr, os::fd::AsFd as _};

use fairlead_lab::{
    Ask, Capture, Conversation, Outcome, Proto, capture, frame,
    packet::{ACK, L4, Mac, RST},
    server::wait_until,
    sys,
};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::{SOON, Vips, World, world};
use crate::client::Client;

/// `port` is the client's own, and no other case's: they run at the same time.
fn open(from: Client<'_>, port: u16, to: SocketAddr) -> Conversation {
    let ask = from.ask(Proto::Udp, to).from_port(port).timeout(std::time::Duration::from_secs(1));
    ask.open(from.ns).expect("the namespace").expect("a socket")
}

/// Goes on with the same socket until it hears what is wanted.
fn until(client: &mut Conversation, wanted: &str, is_wanted: impl Fn(&Outcome) -> bool) {
    let mut last = None;
    let heard = wait_until(SOON, || is_wanted(last.insert(client.ask().outcome)));
    assert!(heard, "a socket that is kept is not {wanted} within {SOON:?}: {last:?}");
}

fn until_by(client: &mut Conversation, server: &str) {
    until(client, &format!("answered by {server}"), |outcome| outcome.server() == Some(server));
}

/// A client starts before there is an endpoint, and each Pod is replaced by the next one. `at` is where it asks.
fn follows<'a>(
    world: &World,
    name: &str,
    spec: Value,
    (from, port): (impl Into<Client<'a>>, u16),
    servers: [&str; 4],
    at: impl Fn(&World, &Service) -> [SocketAddr; 2],
) {
    let service = world.service(name, spec);
    let from = from.into();
    let mut clients = at(world, &service).map(|to| open(from, port, to));
    for client in &mut clients {
        until(client, "refused", |outcome| *outcome == Outcome::Refused);
    }
    // e2e 51: not ready at first.
    let mut old = world.pod(name, servers[0]);
    old.create(&world.api);
    old.report(&world.api, "Running", false);
    for client in &mut clients {
        assert_eq!(client.ask().outcome, Outcome::Refused);
    }
    old.report(&world.api, "Running", true);
    for pair in servers.windows(2) {
        for client in &mut clients {
            until_by(client, pair[0]);
        }
        let new = world.pod(name, pair[1]).named(&format!("{name}-{}-next", pair[1]));
        new.run(&world.api);
        old.terminate(&world.api);
        old.report(&world.api, "Running", false);
        for client in &mut clients {
            until_by(client, pair[1]);
        }
        old.remove(&world.api);
        old = new;
    }
    // The last one goes without another to follow it; kube-proxy leaves such a client with a Pod that is gone (rule 108).
    old.remove(&world.api);
    for client in &mut clients {
        until(client, "refused", |outcome| *outcome == Outcome::Refused);
    }
}

/// On the node, and back to the first.
const HERE: [&str; 4] = ["pod-a", "pod-b", "pod-c", "pod-a"];
/// To the other node, on it, and back.
const ACROSS: [&str; 4] = ["pod-a", "remote-a", "remote-b", "pod-b"];

fn cluster_ips(_: &World, service: &Service) -> [SocketAddr; 2] {
    let vips = Vips::of(service);
    [vips.v4, vips.v6]
}

/// e2e 48 and 51.
#[test]
fn e2e_48_51_a_pods_udp_socket_follows_the_endpoints_of_a_cluster_ip() {
    let world = world();
    follows(&world, "cycle", json!({}), (&world.lab.client.ns, 12_345), HERE, cluster_ips);
}

#[test]
fn e2e_49_a_pods_udp_socket_follows_the_endpoints_of_an_internal_policy_of_local() {
    let world = world();
    let spec = json!({"internalTrafficPolicy": "Local"});
    follows(&world, "cycle-internal", spec, (&world.lab.client.ns, 12_346), HERE, cluster_ips);
}

#[test]
fn e2e_50_a_udp_socket_of_the_node_follows_the_endpoints_of_a_cluster_ip() {
    let world = world();
    follows(&world, "cycle-node", json!({}), (&world.lab.node.ns, 12_347), ACROSS, cluster_ips);
}

#[test]
fn e2e_47_a_udp_socket_outside_follows_the_endpoints_of_a_node_port() {
    let world = world();
    let spec = |policy| json!({"type": "NodePort", "externalTrafficPolicy": policy});
    let outside = &world.lab.ext.ns;
    follows(&world, "cycle-external", spec("Local"), (outside, 12_348), HERE, udp_node_ports);
    follows(&world, "cycle-masqueraded", spec("Cluster"), (outside, 12_350), ACROSS, udp_node_ports);
    // As upstream's client: a pod of another node.
    let pod = &world.other.lab.client.ns;
    follows(&world, "cycle-from-there", spec("Cluster"), (pod, 12_351), ACROSS, udp_node_ports);
}

/// e2e 82: to Pods of the same node, and of another one.
#[test]
fn e2e_82_a_udp_socket_outside_follows_the_endpoints_of_a_balancers_address() {
    let world = world();
    let spec = json!({"type": "LoadBalancer"});
    follows(&world, "cycle-balanced", spec, (world.outside()[0], 12_352), ACROSS, |world, service| {
        udp(&world.balance(service, 82))
    });
}

fn udp_node_ports(world: &World, service: &Service) -> [SocketAddr; 2] {
    udp(&world.node_ports(service))
}

fn udp(at: &[(Proto, SocketAddr)]) -> [SocketAddr; 2] {
    let udp: Vec<_> = at.iter().filter(|(proto, _)| *proto == Proto::Udp).map(|(_, to)| *to).collect();
    udp.try_into().expect("one of each family")
}

#[test]
fn e2e_53_a_udp_socket_follows_a_target_port_that_changes() {
    let world = world();
    for (policy, own) in [("Cluster", 12_349), ("Local", 12_353)] {
        let name = format!("retarget-{}", policy.to_lowercase());
        let service = world.service(&name, json!({"type": "NodePort", "externalTrafficPolicy": policy}));
        world.run_pod(&name, "pod-a");
        let at = [cluster_ips(&world, &service), udp_node_ports(&world, &service)];
        let mut clients: Vec<_> = at.iter().flatten().map(|&to| open((&world.lab.ext).into(), own, to)).collect();
        for target in [8080, 8081, 8082, 8080] {
            let ports = service.spec.as_ref().and_then(|spec| spec.ports.clone()).expect("ports");
            let ports: Vec<_> = ports
                .iter()
                .map(|port| {
                    let mut port = json!(port);
                    if port["protocol"] == "UDP" {
                        port["targetPort"] = json!(target);
                    }
                    port
                })
                .collect();
            world.edit(&name, &json!({"ports": ports}));
            for client in &mut clients {
                until(client, &format!("answered by port {target}"), |outcome| {
                    outcome.answer().is_some_and(|answer| answer.local.port() == target)
                });
            }
        }
    }
}

/// e2e 52: a segment far outside of the window is one of the connection all the same. Where it reaches the client with the
/// Pod's own address, the client answers it by a reset and the connection is lost.
#[test]
fn e2e_52_a_segment_out_of_the_window_does_not_end_a_connection() {
    let world = world();
    let vips = world.vips("window", json!({}));
    world.run_pod("window", "pod-a");
    world.answered(&vips, &["pod-a"]);
    let (pod, client) = (&world.lab.pods[0], &world.lab.client);
    let gateway: Mac = "ee:ee:ee:ee:ee:ee".parse().expect("a MAC address");
    let socket = pod.ns.run(|| sys::packet_socket("eth0", false)).expect("the namespace").expect("a packet socket");
    for vip in [vips.v4, vips.v6] {
        let mut connection = Ask::new(Proto::Tcp, vip).open(&client.ns).expect("the namespace").expect("a connection");
        assert_eq!(connection.ask().outcome.server(), Some("pod-a"));
        let to = SocketAddr::new(client.ip(vip.is_ipv6()), connection.local().expect("its address").port());
        let from = SocketAddr::new(pod.ip(vip.is_ipv6()), super::TARGET);
        let wire = Capture::start(&client.ns, "eth0").expect("a capture");
        let segment = |number: u32| frame::tcp((Mac([2; 6]), gateway), from, to, ACK, number * 0x1000_0000, 0x7777);
        sys::send_frames(socket.as_fd(), &(1..=10).map(segment).collect::<Vec<_>>()).expect("the segments");
        let arrived = wire.wait_for(|packet| !packet.outgoing && packet.sockets() == Some((vip, to)));
        assert!(arrived, "none of the segments came from the Service's address");
        let outcome = connection.ask().outcome;
        assert_eq!(outcome.server(), Some("pod-a"), "after the segments: {outcome}");
        let is_reset = |l4: &L4| matches!(l4, L4::Tcp { flags, .. } if flags & RST != 0);
        let wrong: Vec<_> =
            wire.stop().into_iter().filter(|packet| packet.src == from.ip() || is_reset(&packet.l4)).collect();
        assert!(wrong.is_empty(), "seen at the client:\n{}", capture::show(&wrong));
    }
}
