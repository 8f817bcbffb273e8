//! ClusterIPs: from pods, from the node's own processes, from outside through the node as a router.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Ask, Capture, Lab, Server, capture, manifest::EndpointSpec, packet::Packet};

use crate::cell::{Cluster, Combo, TARGET, answered, own_port};

matrix! {
    a_pod_reaches_the_endpoints_on_its_node,
    a_pod_reaches_remote_endpoints,
    pitfall_p1_17_a_pod_reaches_itself_and_sees_the_node,
    a_node_process_reaches_local_endpoints,
    pitfall_p1_3_a_node_process_reaches_remote_endpoints,
    a_node_process_hears_its_answers_where_the_node_is_an_endpoint,
    an_external_host_reaches_a_cluster_ip_through_the_node,
}

/// Enough questions that a fair choice between two leaves one of them out once in 2^63 runs.
const MANY: usize = 64;

pub(crate) fn a_pod_reaches_the_endpoints_on_its_node(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, client) = (cluster.service("local"), &cluster.lab.client);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0, 1]), &client.ns, ask)?;
    cluster.without_leak(|| {
        let mut servers = BTreeSet::new();
        for _ in 0..MANY {
            let answer = answered(&client.ns, ask)?;
            ensure!(
                answer.peer.ip() == client.ip(v6),
                "{} saw {} in place of the client's address",
                answer.server,
                answer.peer
            );
            servers.insert(answer.server);
        }
        ensure!(servers.iter().eq(["pod-a", "pod-b"]), "{MANY} requests were answered by {servers:?}");
        Ok(())
    })
}

pub(crate) fn a_pod_reaches_remote_endpoints(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, client) = (cluster.service("remote"), &cluster.lab.client);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.remotes(), &client.ns, ask)?;
    cluster.without_leak(|| {
        let mut servers = BTreeSet::new();
        for _ in 0..MANY {
            let answer = answered(&client.ns, ask)?;
            ensure!(
                answer.peer.ip() == client.ip(v6),
                "{} saw {} in place of the client's address",
                answer.server,
                answer.peer
            );
            servers.insert(answer.server);
        }
        ensure!(servers.iter().eq(["remote-0", "remote-1"]), "{MANY} requests were answered by {servers:?}");
        Ok(())
    })
}

/// A pod that is its own endpoint must not see its own address as the client's, because it would answer past the
/// proxy. It sees the address that the node itself has towards it, as after kube-proxy's masquerade.
pub(crate) fn pitfall_p1_17_a_pod_reaches_itself_and_sees_the_node(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, pod) = (cluster.service("hairpin"), &cluster.lab.pods[0]);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &pod.ns, ask)?;
    let direct = Ask::new(proto, SocketAddr::new(pod.ip(v6), TARGET)).port(own_port());
    let node = answered(&cluster.lab.node.ns, direct)?.peer.ip();
    let capture = Capture::start(&pod.ns, "eth0")?;
    for _ in 0..3 {
        let answer = answered(&pod.ns, ask)?;
        ensure!(answer.server == "pod-a" && answer.peer.ip() == node, "pod-a saw {}, not {node}", answer.peer);
    }
    // To the kernel it is a way about: out of the device that it came in by.
    let redirects: Vec<_> = capture.stop().into_iter().filter(Packet::is_redirect).collect();
    ensure!(redirects.is_empty(), "pod-a was told a shorter way:\n{}", capture::show(&redirects));
    Ok(())
}

pub(crate) fn a_node_process_reaches_local_endpoints(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, node) = (cluster.service("node-local"), &cluster.lab.node);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &node.ns, ask)?;
    cluster.without_leak(|| {
        let direct = Ask::new(proto, SocketAddr::new(cluster.pod_ip(0, v6), TARGET)).port(own_port());
        let direct = answered(&node.ns, direct)?;
        for _ in 0..MANY {
            let answer = answered(&node.ns, ask)?;
            ensure!(
                answer.server == "pod-a" && answer.peer.ip() == direct.peer.ip(),
                "{} saw {}; of a direct request it sees {}",
                answer.server,
                answer.peer,
                direct.peer.ip()
            );
        }
        Ok(())
    })
}

pub(crate) fn pitfall_p1_3_a_node_process_reaches_remote_endpoints(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, node) = (cluster.service("node-remote"), &cluster.lab.node);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.remotes(), &node.ns, ask)?;
    let own = cluster.lab.ip_towards_remote_pods(v6);
    cluster.without_leak(|| {
        let mut servers = BTreeSet::new();
        for _ in 0..MANY {
            let answer = answered(&node.ns, ask)?;
            ensure!(answer.peer.ip() == own, "{} saw {}", answer.server, answer.peer);
            servers.insert(answer.server);
        }
        ensure!(servers.len() == 2, "{MANY} requests were answered by {servers:?}");
        Ok(())
    })
}

/// As on every node with a server on the host's own network: the answer arrives at an endpoint's address, on a tuple that
/// the request's own entry holds.
pub(crate) fn a_node_process_hears_its_answers_where_the_node_is_an_endpoint(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (node, client) = (&cluster.lab.node, &cluster.lab.client);
    let (host, service) = (cluster.service("host"), cluster.service("node-hears"));
    let _server = Server::start(&node.ns, "node", &[(proto, SocketAddr::new(node.ip(v6), TARGET))])?;
    host.serve(&[EndpointSpec::here(node.ip(v6))], &client.ns, Ask::new(proto, host.vip(v6)))?;
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&[service.pods(&[0]), service.remotes()].concat(), &client.ns, ask)?;
    for _ in 0..MANY {
        answered(&node.ns, ask)?;
    }
    Ok(())
}

pub(crate) fn an_external_host_reaches_a_cluster_ip_through_the_node(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, ext, node) = (cluster.service("routed"), &cluster.lab.ext, &cluster.lab.node);
    for outside in Lab::external_clients(v6).into_iter().chain([ext.ip(v6)]) {
        let ask = Ask::new(proto, service.vip(v6)).from(SocketAddr::new(outside, 0));
        service.serve(&service.pods(&[0, 1]), &ext.ns, ask)?;
        let (mut servers, mut own) = (BTreeSet::new(), BTreeMap::new());
        for _ in 0..MANY {
            let answer = answered(&ext.ns, ask)?;
            // Rule 68: it is no pod, so it comes with the address that the node itself has towards this one.
            let pod = cluster.lab.pods.iter().find(|pod| pod.name == answer.server).context("a pod answered")?;
            let direct = Ask::new(proto, SocketAddr::new(pod.ip(v6), TARGET));
            let own = match own.get(&answer.server) {
                Some(own) => *own,
                None => *own.entry(answer.server.clone()).or_insert(answered(&node.ns, direct)?.peer.ip()),
            };
            ensure!(answer.peer.ip() == own, "{} saw {}, not the node at {own}", answer.server, answer.peer);
            servers.insert(answer.server);
        }
        ensure!(servers.len() == 2, "{MANY} requests were answered by {servers:?}");
    }
    Ok(())
}
