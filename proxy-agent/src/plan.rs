//! What each Service should look like in the maps: a pure function of the index, without ids.
//!
//! [`desired`] follows kube-proxy's rules; [`crate::diff`] gives ids to the result and turns it into writes.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::{Class, Policy, RunVerdict};

use crate::dataplane::{Slot, Tuple};
use crate::index::{Claim, Index};
use crate::model::{EndpointSlice, IpFamily, ObjectName, PortKey, Service, ServicePort};

pub mod addresses;
pub mod endpoints;
pub mod health;
pub mod ids;
pub mod node_ports;
pub mod source_ranges;

/// An endpoint of a run, as its slot will hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chosen {
    /// Endpoint address.
    pub addr: IpAddr,
    /// Endpoint port.
    pub port: u16,
    /// Bits of a slot.
    pub flags: u16,
}

/// The endpoints of one policy, or what to do without any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunPlan {
    /// In order of address and port.
    pub endpoints: Vec<Chosen>,
    /// What happens to a packet if there is none.
    pub verdict: RunVerdict,
}

/// One Service port of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    /// Which.
    pub key: PortKey,
    /// Addresses that lead to it.
    pub addresses: Vec<(Tuple, Class)>,
    /// `INTERNAL_LOCAL` and `EXTERNAL_LOCAL` of `abi::Policy`.
    pub policy: u32,
    /// Timeout of `sessionAffinity: ClientIP`; 0 without (rule 22).
    pub affinity_secs: u32,
    /// Who may use its load balancer's addresses (rule 21); everybody, if there is none. Sorted, each once.
    pub source_ranges: Vec<IpNet>,
    /// The endpoints of a Cluster policy.
    pub cluster: RunPlan,
    /// The endpoints of a Local policy.
    pub local: RunPlan,
    /// Every endpoint that serves, whether or not a run holds it: its UDP flows stay (rule 105). Sorted.
    pub serving: Vec<(IpAddr, u16)>,
}

/// One Service as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// Which.
    pub service: ObjectName,
    /// Its ports, by family.
    pub ports: Vec<PortPlan>,
    /// Its ClusterIPs: unknown ports of them are rejected.
    pub cluster_ips: Vec<IpAddr>,
    /// What it asks for and does not get.
    pub unserved: Vec<Unserved>,
}

impl Desired {
    /// A Service of which nothing should be left.
    pub const fn nothing(service: ObjectName) -> Self {
        Self { service, ports: Vec::new(), cluster_ips: Vec::new(), unserved: Vec::new() }
    }
}

/// Something that a Service asks for and does not get.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unserved {
    /// The ClusterIP is another Service's too, which came first.
    SharedClusterIp(IpAddr, ObjectName),
    /// Address, port and protocol are another Service's, which came first (rule 32).
    Taken(Tuple, ObjectName),
}

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SharedClusterIp(addr, owner) => {
                write!(
                    f,
                    "ClusterIP {addr} is also that of the older Service {owner}: give one of them another address"
                )
            }
            Self::Taken(tuple, owner) => {
                write!(f, "{tuple} belongs to the older Service {owner}: remove it from one of the two")
            }
        }
    }
}

/// What the maps should hold for a Service; nothing if the index has no such Service.
pub fn desired(index: &Index, name: &ObjectName, ipv6: bool) -> Desired {
    let mut plan = Desired::nothing(name.clone());
    let Some(service) = index.service(name) else { return plan };
    let mut unserved = BTreeSet::new();
    for family in IpFamily::ALL.into_iter().filter(|family| ipv6 || *family == IpFamily::V4 || mutant!("rule-97")) {
        let Some(cluster_ip) = service.cluster_ip(family) else { continue };
        plan.cluster_ips.push(cluster_ip);
        if let Some(owner) = other_owner(index, &Claim::ClusterIp(cluster_ip), name) {
            unserved.insert(Unserved::SharedClusterIp(cluster_ip, owner.clone()));
        }
        let here = Here {
            slices: index.slices(name, family),
            zone: index.node().and_then(|node| node.zone.as_deref()),
            source_ranges: source_ranges::of(index, service, family),
        };
        for port in &service.ports {
            let (mine, taken) = addresses::of(service, port, family)
                .into_iter()
                .partition::<Vec<_>, _>(|(tuple, _)| other_owner(index, &Claim::Tuple(*tuple), name).is_none());
            unserved.extend(taken.into_iter().filter_map(|(tuple, _)| {
                Some(Unserved::Taken(tuple, other_owner(index, &Claim::Tuple(tuple), name)?.clone()))
            }));
            if !mine.is_empty() {
                plan.ports.push(plan_port(service, port, family, mine, &here));
            }
        }
    }
    plan.unserved = unserved.into_iter().collect();
    plan
}

fn other_owner<'a>(index: &'a Index, claim: &Claim, name: &ObjectName) -> Option<&'a ObjectName> {
    index.owner(claim).filter(|owner| *owner != name)
}

/// What all ports of a Service have in common in one family.
struct Here<'a> {
    slices: Vec<&'a EndpointSlice>,
    zone: Option<&'a str>,
    source_ranges: Vec<IpNet>,
}

fn plan_port(
    service: &Service,
    port: &ServicePort,
    family: IpFamily,
    addresses: Vec<(Tuple, Class)>,
    here: &Here<'_>,
) -> PortPlan {
    let candidates = endpoints::gather(&here.slices, &port.name, port.protocol, here.zone);
    let categories = endpoints::categorize(&candidates);
    let mut policy = 0;
    if service.internal_local && !mutant!("rule-24") {
        policy |= Policy::INTERNAL_LOCAL;
    }
    if service.external_local() {
        policy |= Policy::EXTERNAL_LOCAL;
    }
    let key = PortKey { service: service.name.clone(), port: port.name.clone(), protocol: port.protocol, family };
    let without_local = if categories.any && !mutant!("rule-54") { RunVerdict::Drop } else { RunVerdict::Reject };
    let guarded = addresses.iter().any(|(_, class)| *class == Class::LoadBalancer);
    PortPlan {
        key,
        addresses,
        policy,
        affinity_secs: service.affinity_secs.filter(|_| !mutant!("rule-22-off")).unwrap_or(0),
        source_ranges: if guarded { here.source_ranges.clone() } else { Vec::new() },
        cluster: RunPlan {
            endpoints: chosen(&categories.cluster),
            verdict: if mutant!("rule-54-silent") { RunVerdict::Drop } else { RunVerdict::Reject },
        },
        local: RunPlan {
            endpoints: if mutant!("rule-25") { Vec::new() } else { chosen(&categories.local) },
            verdict: without_local,
        },
        serving: candidates
            .iter()
            .filter(|c| if mutant!("rule-105") { c.ready } else { c.serving })
            .map(|c| (c.addr, c.port))
            .collect(),
    }
}

fn chosen(candidates: &[endpoints::Candidate]) -> Vec<Chosen> {
    let flags = |c: &endpoints::Candidate| {
        (if c.local { Slot::LOCAL } else { 0 }) | (if c.ready { 0 } else { Slot::TERMINATING })
    };
    candidates.iter().map(|c| Chosen { addr: c.addr, port: c.port, flags: flags(c) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Event;
    use crate::k8s::manifest;

    /// The endpoints of each family, of Services and slices as manifests.
    fn endpoints(yaml: &str) -> Vec<(IpFamily, Vec<String>)> {
        let mut index = Index::default();
        for object in manifest::parse(yaml, "node-a").objects {
            index.apply(Event::Apply(object));
        }
        let plan = desired(&index, &ObjectName::new("default", "web"), true);
        let shown = |port: &PortPlan| port.cluster.endpoints.iter().map(|chosen| chosen.addr.to_string()).collect();
        plan.ports.iter().map(|port| (port.key.family, shown(port))).collect()
    }

    #[test]
    fn rule_96_each_family_has_the_endpoints_of_its_own_slices() {
        let slice = |family: &str, addr: &str| {
            format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, namespace: default, \
                 labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports: [{{port: 80}}]\n\
                 endpoints: [{{addresses: ['{addr}']}}]\n",
                family.to_lowercase()
            )
        };
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\nspec:\n  clusterIPs: \
                       [10.96.0.1, 'fd00::1']\n  ports: [{port: 80}]\n";
        let (v4, v6) = (slice("IPv4", "10.0.0.1"), slice("IPv6", "fd00:1::1"));
        let (first, second) =
            ((IpFamily::V4, vec!["10.0.0.1".to_owned()]), (IpFamily::V6, vec!["fd00:1::1".to_owned()]));
        assert_eq!(endpoints(&format!("{service}{v4}{v6}")), [first.clone(), second.clone()]);
        assert_eq!(endpoints(&format!("{service}{v4}")), [first, (IpFamily::V6, Vec::new())]);
        assert_eq!(endpoints(&format!("{service}{v6}")), [(IpFamily::V4, Vec::new()), second]);
    }
}
