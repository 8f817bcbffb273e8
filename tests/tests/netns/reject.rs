//! Refusals: a Service without endpoints, a port that no Service has.

use std::net::SocketAddr;

use anyhow::Result;
use fairlead_lab::{Ask, Namespace, Outcome};

use crate::cell::{Cluster, Combo, answered, eventually, refused};

matrix! {
    rule_54_a_service_without_endpoints_is_refused_at_once,
    an_unknown_port_of_a_cluster_ip_is_refused_at_once,
}

/// Who asks: a pod, the node itself, a host outside.
fn askers(cluster: &Cluster) -> [&Namespace; 3] {
    [&cluster.lab.client.ns, &cluster.lab.node.ns, &cluster.lab.ext.ns]
}

/// No endpoint anywhere: refused, from wherever it is asked.
pub(crate) fn rule_54_a_service_without_endpoints_is_refused_at_once(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let service = cluster.service("empty");
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &cluster.lab.client.ns, ask)?;
    cluster.without_leak(|| {
        service.endpoints(&[])?;
        eventually("a refusal", &cluster.lab.client.ns, ask, |attempt| attempt.outcome == Outcome::Refused)?;
        for ns in askers(cluster) {
            refused(ns, ask)?;
        }
        service.endpoints(&service.pods(&[1]))?;
        let back = |attempt: &fairlead_lab::Attempt| attempt.outcome.server() == Some("pod-b");
        eventually("an answer of the new endpoint", &cluster.lab.client.ns, ask, back)?;
        Ok(())
    })
}

pub(crate) fn an_unknown_port_of_a_cluster_ip_is_refused_at_once(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let service = cluster.service("ports");
    let known = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &cluster.lab.client.ns, known)?;
    let unknown = Ask::new(proto, SocketAddr::new(service.vip(v6).ip(), 81));
    cluster.without_leak(|| {
        for ns in askers(cluster) {
            refused(ns, unknown)?;
        }
        answered(&cluster.lab.client.ns, known).map(drop)
    })
}
