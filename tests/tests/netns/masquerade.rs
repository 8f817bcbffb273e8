//! NodePorts with `externalTrafficPolicy: Cluster`: the endpoint sees the node, the client the NodePort, and netfilter in
//! between one plain connection (rules 68–76).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Ask, Host, Proto, Shape};
use proxy_common::Outcome;

use crate::cell::{Cluster, Combo, Service, answered};

matrix! {
    rule_68_a_client_outside_is_masqueraded_to_every_endpoint,
    rule_68_a_pod_is_masqueraded_to_every_endpoint,
    rule_74_a_pod_reaches_itself_by_a_node_port,
    many_connections_share_the_nodes_address,
    a_datagram_in_fragments_arrives_both_ways,
    pitfall_p1_4_a_narrow_link_to_the_endpoint_is_told_to_the_client,
}

/// Every address of the node.
fn node_addresses(cluster: &Cluster) -> Result<BTreeSet<IpAddr>> {
    let listing = cluster.lab.node.ns.output("ip", &["-json", "address"])?;
    let links: serde_json::Value = serde_json::from_str(&listing)?;
    let addresses = links.as_array().into_iter().flatten().flat_map(|link| link["addr_info"].as_array());
    addresses.flatten().map(|info| Ok(info["local"].as_str().context("an address")?.parse()?)).collect()
}

/// Asks until every endpoint has answered; each has seen an address of the node.
fn is_masqueraded(cluster: &Cluster, service: &Service<'_>, combo: Combo, from: &Host) -> Result<()> {
    let ask = Ask::new(combo.proto, service.node_port(combo.v6));
    let endpoints = [service.pods(&[0, 1]), service.remotes()].concat();
    service.serve(&endpoints, &from.ns, ask)?;
    let own = node_addresses(cluster)?;
    let before = cluster.lab.invalid_packets()?;
    let mut servers = BTreeSet::new();
    for _ in 0..64 {
        let answer = answered(&from.ns, ask)?;
        ensure!(
            own.contains(&answer.peer.ip()),
            "{} saw {}, which is no address of the node",
            answer.server,
            answer.peer
        );
        servers.insert(answer.server);
    }
    ensure!(servers.iter().eq(["pod-a", "pod-b", "remote-0", "remote-1"]), "answered by {servers:?}");
    let after = cluster.lab.invalid_packets()?;
    ensure!(after == before, "netfilter saw {} INVALID packets", after - before);
    Ok(())
}

pub(crate) fn rule_68_a_client_outside_is_masqueraded_to_every_endpoint(cluster: &Cluster, combo: Combo) -> Result<()> {
    is_masqueraded(cluster, &cluster.masqueraded_service("outside"), combo, &cluster.lab.ext)
}

pub(crate) fn rule_68_a_pod_is_masqueraded_to_every_endpoint(cluster: &Cluster, combo: Combo) -> Result<()> {
    is_masqueraded(cluster, &cluster.masqueraded_service("pod"), combo, &cluster.lab.client)
}

pub(crate) fn rule_74_a_pod_reaches_itself_by_a_node_port(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let service = cluster.masqueraded_service("itself");
    let ask = Ask::new(proto, service.node_port(v6));
    let pod = &cluster.lab.pods[0];
    let answer = service.serve(&service.pods(&[0]), &pod.ns, ask)?;
    ensure!(answer.server == pod.name && answer.peer.ip() != pod.ip(v6), "{answer:?}");
    Ok(())
}

/// Conversations of two clients stay open side by side, and each goes on with its own.
pub(crate) fn many_connections_share_the_nodes_address(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let service = cluster.masqueraded_service("many");
    let ask = Ask::new(proto, service.node_port(v6));
    service.serve(&service.pods(&[0]), &cluster.lab.ext.ns, ask)?;
    let mut open = Vec::new();
    for _ in 0..100 {
        for from in [&cluster.lab.ext, &cluster.lab.client.host] {
            let opened = ask.open(&from.ns)?;
            open.push(opened.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", from.name))?);
        }
    }
    let mut seen = BTreeSet::new();
    for round in 0..2 {
        for conversation in &mut open {
            let attempt = conversation.ask();
            let answer = attempt.outcome.answer().with_context(|| format!("round {round}: {attempt}"))?;
            seen.insert(answer.peer);
        }
    }
    ensure!(seen.len() == open.len(), "{} conversations were seen as {}", open.len(), seen.len());
    Ok(())
}

pub(crate) fn a_datagram_in_fragments_arrives_both_ways(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    const SIZE: usize = 4_000;
    if proto == Proto::Tcp {
        return Ok(());
    }
    let service = cluster.masqueraded_service("fragments");
    service.serve(&service.pods(&[0]), &cluster.lab.ext.ns, Ask::new(proto, service.node_port(v6)))?;
    let ways: [(&Host, SocketAddr); 4] = [
        (&cluster.lab.ext, service.node_port(v6)),
        (&cluster.lab.client, service.node_port(v6)),
        (&cluster.lab.client, service.vip(v6)),
        (&cluster.lab.node, service.vip(v6)),
    ];
    for (from, to) in ways {
        let opened = Ask::new(proto, to).open(&from.ns)?;
        let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", from.name))?;
        for (up, down) in [(SIZE, 0), (0, SIZE), (SIZE, SIZE)] {
            let attempt = conversation.ask_bulk(up, down);
            let whole = attempt.outcome.answer_at_last().is_some();
            ensure!(whole, "{} → {to}, {up} bytes up and {down} down: {attempt}", from.name);
        }
    }
    Ok(())
}

pub(crate) fn pitfall_p1_4_a_narrow_link_to_the_endpoint_is_told_to_the_client(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    const SIZE: usize = 1 << 18;
    if proto == Proto::Udp {
        return Ok(());
    }
    let service = cluster.masqueraded_service("narrow");
    let device = &cluster.lab.pods[0].node_device;
    service.serve(&service.pods(&[0]), &cluster.lab.ext.ns, Ask::new(proto, service.node_port(v6)))?;
    // Between neighbours on a bridge nobody tells of a narrow port: it drops what does not fit.
    let routed = cluster.cell.shape == Shape::Routed;
    let ways: [(&Host, SocketAddr, bool); 3] = [
        (&cluster.lab.ext, service.node_port(v6), true),
        (&cluster.lab.client, service.node_port(v6), routed),
        (&cluster.lab.client, service.vip(v6), routed),
    ];
    let errors = || cluster.outcomes().get(&Outcome::IcmpError).copied();
    let before = errors();
    cluster.lab.node.ns.output("ip", &["link", "set", device, "mtu", "1280"])?;
    let done = ways.into_iter().filter(|(_, _, told)| *told).try_for_each(|(from, to, _)| {
        let opened = Ask::new(proto, to).open(&from.ns)?;
        let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", from.name))?;
        let attempt = conversation.ask_bulk(SIZE, SIZE);
        ensure!(attempt.outcome.answer_at_last().is_some(), "{} → {to}: {attempt}", from.name);
        Ok(())
    });
    cluster.lab.node.ns.output("ip", &["link", "set", device, "mtu", "1500"])?;
    done?;
    let after = errors();
    ensure!(after > before, "nobody was told: {before:?} errors were translated before, {after:?} after");
    Ok(())
}
