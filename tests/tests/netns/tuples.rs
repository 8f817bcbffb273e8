//! One client port, several destinations that are the same endpoint: tuples are never shared.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Ask, Conversation};

use crate::cell::{Cluster, Combo, TARGET, own_port};

matrix! {
    pitfall_p1_2_one_client_port_reaches_one_endpoint_by_two_vips_and_directly,
    a_closed_service_connection_leaves_its_port_to_a_direct_one,
}

/// Linux gives one source port to several destinations, and resolvers send one socket's queries to several name
/// servers; behind both may be the same endpoint. A direct connection that was there before any Service flow is not
/// among the orders: nothing is stored of it, and only its end would tell.
fn pitfall_p1_2_one_client_port_reaches_one_endpoint_by_two_vips_and_directly(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let client = &cluster.lab.client.ns;
    let services = [cluster.service("first"), cluster.service("second")];
    for service in &services {
        service.serve(&service.pods(&[0]), client, Ask::new(proto, service.vip(v6)))?;
    }
    let direct = SocketAddr::new(cluster.pod_ip(0, v6), TARGET);
    let [one, two] = [services[0].vip(v6), services[1].vip(v6)];
    for order in [[one, two, direct], [one, direct, two]] {
        let port = own_port();
        let mut open: Vec<(SocketAddr, Conversation)> = Vec::new();
        for to in order {
            let opened = Ask::new(proto, to).port(port).open(client)?;
            let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("{outcome}")).with_context(|| {
                format!("port {port} to {to} after {:?}", open.iter().map(|(to, _)| to).collect::<Vec<_>>())
            })?;
            ensure!(conversation.ask().outcome.server() == Some("pod-a"), "port {port} to {to}: first request");
            open.push((to, conversation));
        }
        for round in 0..3 {
            for (to, conversation) in &mut open {
                let attempt = conversation.ask();
                ensure!(
                    attempt.outcome.server() == Some("pod-a"),
                    "port {port} to {to}, round {round}, order {order:?}: {attempt}"
                );
            }
        }
        for (_, conversation) in open {
            conversation.abort();
        }
    }
    Ok(())
}

/// What is left of a connection that has ended must not translate the answers of its successor.
fn a_closed_service_connection_leaves_its_port_to_a_direct_one(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, client) = (cluster.service("closed"), &cluster.lab.client.ns);
    service.serve(&service.pods(&[0]), client, Ask::new(proto, service.vip(v6)))?;
    let direct = SocketAddr::new(cluster.pod_ip(0, v6), TARGET);
    for aborted in [false, true] {
        let port = own_port();
        let opened = Ask::new(proto, service.vip(v6)).port(port).open(client)?;
        let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("port {port} to the Service: {outcome}"))?;
        ensure!(conversation.ask().outcome.server() == Some("pod-a"), "port {port} to the Service");
        if aborted {
            conversation.abort();
        } else {
            drop(conversation);
        }
        let attempt = Ask::new(proto, direct).port(port).once(client)?;
        ensure!(attempt.outcome.server() == Some("pod-a"), "port {port} to {direct}, aborted {aborted}: {attempt}");
    }
    Ok(())
}
