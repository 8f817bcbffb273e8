//! NodePorts with `externalTrafficPolicy: Local`, and those of the node's own for its own processes.

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Result, ensure};
use fairlead_lab::{Ask, Lab, Outcome, Server, manifest::EndpointSpec};

use crate::cell::{Cluster, Combo, TARGET, answered, eventually, own_port};

/// Requests after which each of four endpoints has answered, but for one run in ten million.
const MANY: usize = 64;

matrix! {
    a_local_node_port_keeps_the_clients_address,
    rule_54_a_local_node_port_without_local_endpoint_is_silent,
    rule_92_a_process_of_the_node_reaches_its_own_node_port,
    rule_92_a_process_of_the_node_reaches_itself_by_its_node_port,
}

pub(crate) fn a_local_node_port_keeps_the_clients_address(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, ext) = (cluster.node_port_service("np"), &cluster.lab.ext);
    // Endpoints of other nodes take no part.
    let endpoints = [service.pods(&[0, 1]), service.remotes()].concat();
    let mut servers = BTreeSet::new();
    for outside in Lab::external_clients(v6).into_iter().chain([ext.ip(v6)]) {
        let ask = Ask::new(proto, service.node_port(v6)).from(SocketAddr::new(outside, 0));
        service.serve(&endpoints, &ext.ns, ask)?;
        for _ in 0..32 {
            let answer = answered(&ext.ns, ask)?;
            ensure!(answer.peer.ip() == outside, "{} saw {}, not {outside}", answer.server, answer.peer);
            servers.insert(answer.server);
        }
    }
    ensure!(servers.iter().eq(["pod-a", "pod-b"]), "answered by {servers:?}");
    Ok(())
}

/// A load balancer must find out by its health check, not by a refusal that ends the client's attempt.
pub(crate) fn rule_54_a_local_node_port_without_local_endpoint_is_silent(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, ext) = (cluster.node_port_service("np-none"), &cluster.lab.ext);
    let ask = Ask::new(proto, service.node_port(v6));
    service.serve(&service.pods(&[0]), &ext.ns, ask)?;
    service.endpoints(&service.remotes())?;
    // One question without an answer may be a late answer; three in a row are silence.
    let silent = Cell::new(0);
    eventually("silence", &ext.ns, ask, |attempt| {
        silent.set(if attempt.outcome == Outcome::Timeout { silent.get() + 1 } else { 0 });
        silent.get() == 3
    })?;
    // The ClusterIP of the same Service has its cluster endpoints still.
    let answer = answered(&cluster.lab.client.ns, Ask::new(proto, service.vip(v6)))?;
    ensure!(answer.server.starts_with("remote-"), "{answer:?}");
    Ok(())
}

pub(crate) fn rule_92_a_process_of_the_node_reaches_its_own_node_port(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let node = &cluster.lab.node;
    // Rule 69: the node may use any endpoint, whatever the policy.
    for service in [cluster.node_port_service("own-local"), cluster.masqueraded_service("own")] {
        let ask = Ask::new(proto, service.node_port(v6));
        service.serve(&[service.pods(&[0, 1]), service.remotes()].concat(), &node.ns, ask)?;
        let mut servers = BTreeSet::new();
        for _ in 0..MANY {
            servers.insert(answered(&node.ns, ask)?.server);
        }
        ensure!(servers.len() == 4, "answered by {servers:?}");
        service.endpoints(&[])?;
        eventually("a refusal", &node.ns, ask, |attempt| attempt.outcome == Outcome::Refused)?;
        // Loopback's own address is none of the node's (rule 89).
        let own: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let local = Ask::new(proto, SocketAddr::new(own, service.node_port(v6).port()));
        ensure!(local.once(&node.ns)?.outcome == Outcome::Refused, "somebody listens on {own}");
    }
    Ok(())
}

pub(crate) fn rule_92_a_process_of_the_node_reaches_itself_by_its_node_port(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let node = &cluster.lab.node;
    let service = cluster.masqueraded_service("own-self");
    let server = SocketAddr::new(node.ip(v6), TARGET);
    let _server = Server::start(&node.ns, "node", &[(proto, server)])?;
    // One port for both: without the Service the connection is another.
    let (port, ask) = (own_port(), Ask::new(proto, service.node_port(v6)));
    service.serve(&[EndpointSpec::here(node.ip(v6))], &node.ns, ask)?;
    for to in [server, service.node_port(v6), server] {
        let answer = answered(&node.ns, Ask::new(proto, to).port(port))?;
        ensure!(answer.server == "node" && answer.peer.ip() == node.ip(v6), "{to}: {answer:?}");
    }
    Ok(())
}
