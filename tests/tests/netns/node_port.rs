//! NodePorts with `externalTrafficPolicy: Local`.

use std::{cell::Cell, collections::BTreeSet, net::SocketAddr};

use anyhow::{Result, ensure};
use fairlead_lab::{Ask, Lab, Outcome};

use crate::cell::{Cluster, Combo, answered, eventually};

matrix! {
    a_local_node_port_keeps_the_clients_address,
    rule_54_a_local_node_port_without_local_endpoint_is_silent,
}

fn a_local_node_port_keeps_the_clients_address(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
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
fn rule_54_a_local_node_port_without_local_endpoint_is_silent(
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
