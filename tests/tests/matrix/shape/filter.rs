//! A network policy as CNIs write it for netfilter: who may speak with whom is told by the addresses of pods and hosts. What
//! is forwarded to or from a Service's address has not been translated in time, or too early.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Result, ensure};
use fairlead_lab::{Ask, Lab, Outcome, Proto, ServiceSpec, client::SILENCE};
use fairlead_tests::{
    nodes::Nodes,
    rules::{Address, Client, Endpoint, Node},
};

use super::{overlay, second};

/// Who may speak with whom, in both directions: clients with endpoints, and nodes, by which others come, with both.
fn pairs(nodes: &Nodes, v6: bool) -> BTreeSet<(IpAddr, IpAddr)> {
    let clients = Client::ALL.into_iter().map(|client| nodes.client(client, v6));
    // The node is seen by the address of the device by which it sends.
    let gateways = nodes.labs.iter().map(|lab| lab.gateway(v6));
    let overlay = nodes.labs.iter().map(|lab| overlay::own(lab, v6));
    let uplinks = nodes.labs.iter().map(|lab| second(lab, v6));
    let askers: Vec<_> = clients.chain(gateways).chain(overlay).chain(uplinks).collect();
    let hosts = [Node::A, Node::B].map(|node| nodes.lab(node).node.ip(v6));
    let served: Vec<_> = Endpoint::ALL.into_iter().map(|endpoint| nodes.endpoint(endpoint, v6)).chain(hosts).collect();
    let asked = askers.iter().flat_map(|from| served.iter().map(move |to| (*from, *to)));
    asked.flat_map(|(from, to)| [(from, to), (to, from)]).collect()
}

/// Loads the policy into both nodes.
pub(super) fn police(nodes: &Nodes) -> Result<()> {
    let elements = |v6| {
        let pairs = pairs(nodes, v6).into_iter().map(|(from, to)| format!("{from} . {to}"));
        pairs.collect::<Vec<_>>().join(", ")
    };
    let rules = format!(
        "table inet network_policy {{\n counter services {{}}\n counter denied {{}}\n\
         set v4 {{ type ipv4_addr . ipv4_addr; elements = {{ {} }}; }}\n\
         set v6 {{ type ipv6_addr . ipv6_addr; elements = {{ {} }}; }}\n\
         chain forward {{ type filter hook forward priority 10;\n\
          ip saddr {{ 10.96.0.0/16, 198.51.100.0/24 }} counter name services drop\n\
          ip daddr {{ 10.96.0.0/16, 198.51.100.0/24 }} counter name services drop\n\
          ip6 saddr {{ fd00:10:96::/108, 2001:db8:198::/48 }} counter name services drop\n\
          ip6 daddr {{ fd00:10:96::/108, 2001:db8:198::/48 }} counter name services drop\n\
          meta l4proto {{ icmp, icmpv6 }} accept\n\
          ip saddr . ip daddr @v4 accept\n ip6 saddr . ip6 daddr @v6 accept\n counter name denied drop\n }}\n}}\n",
        elements(false),
        elements(true)
    );
    nodes.labs.iter().try_for_each(|lab| lab.node.ns.nft(&rules))
}

fn counter(lab: &Lab, name: &str) -> Result<u64> {
    lab.node.ns.nft_counter("network_policy", name)
}

/// After the cells: nobody whom the policy allows was denied, and it saw no Service's address.
pub(crate) fn policed(nodes: &Nodes) -> Result<()> {
    for lab in &nodes.labs {
        let (services, denied) = (counter(lab, "services")?, counter(lab, "denied")?);
        let name = lab.node_name();
        ensure!(services == 0, "{name} was to forward {services} packets from or to Service addresses");
        ensure!(denied == 0, "the policy of {name} has denied {denied} packets between parties that it allows");
    }
    Ok(())
}

/// Then: a pod that the policy allows nothing does not get by it through a Service.
pub(crate) fn refused_by_policy(nodes: &Nodes, service: &ServiceSpec) -> Result<()> {
    let bystander = &nodes.lab(Node::A).pods[1];
    for v6 in [false, true] {
        for proto in Proto::ALL {
            let before = counter(nodes.lab(Node::A), "denied")?;
            let ask = Ask::new(proto, nodes.address(service, Address::ClusterIp, v6)).timeout(SILENCE);
            let attempt = ask.once(&bystander.ns)?;
            ensure!(attempt.outcome == Outcome::Timeout, "a pod that the policy denies everything: {attempt}");
            let denied = counter(nodes.lab(Node::A), "denied")? - before;
            ensure!(denied > 0, "the policy has not seen what the pod sent to {}/{proto}", ask.to);
        }
    }
    Ok(())
}
