//! A Service, as far as the proxy reads it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::{IpFamily, ObjectName, Protocol};

/// `spec.type`. Only its effect on external policies counts (rules 11, 23, 26): addresses are served whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is the type of that name")]
pub enum ServiceType {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty for the only port without one.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the ClusterIP.
    pub port: u16,
    /// Port on the node's addresses; 0 for none (rule 17).
    pub node_port: u16,
}

/// A Service with a ClusterIP. Those that a proxy skips (rules 1, 10) never become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// `metadata.creationTimestamp`, seconds since 1970; decides between two that claim one address.
    pub created_secs: i64,
    /// `spec.type`.
    pub kind: ServiceType,
    /// The ClusterIP of IPv4 (rule 13).
    pub cluster_ip_v4: Option<Ipv4Addr>,
    /// The ClusterIP of IPv6 (rule 13).
    pub cluster_ip_v6: Option<Ipv6Addr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local` (rule 24).
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local` as written; see [`Self::external_local`].
    pub external_local_asked: bool,
    /// `sessionAffinity: ClientIP`: its timeout in seconds (rule 22).
    pub affinity_secs: Option<u32>,
    /// `spec.externalIPs` (rule 18).
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` unless its mode is Proxy (rule 19).
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges` of both families (rule 21); see [`Self::source_ranges`].
    pub source_ranges_asked: Vec<IpNet>,
    /// `spec.healthCheckNodePort`; 0 for none (rule 26).
    pub health_check_node_port: u16,
}

impl Service {
    /// The ClusterIP of a family.
    pub fn cluster_ip(&self, family: IpFamily) -> Option<IpAddr> {
        match family {
            IpFamily::V4 => self.cluster_ip_v4.map(IpAddr::V4),
            IpFamily::V6 => self.cluster_ip_v6.map(IpAddr::V6),
        }
    }

    /// The networks whose clients may use the addresses of the load balancer; none for everybody (rule 21): a range that
    /// holds every address makes all others of its family mean nothing.
    pub fn source_ranges(&self, family: IpFamily) -> Vec<IpNet> {
        let of_family = self.source_ranges_asked.iter().filter(|net| IpFamily::of(&net.addr()) == family);
        if of_family.clone().any(|net| net.prefix_len() == 0 && !mutant!("rule-21-all")) {
            Vec::new()
        } else {
            of_family.copied().collect()
        }
    }

    /// The effective `externalTrafficPolicy: Local`: only where the Service can have external addresses (rule 23).
    pub fn external_local(&self) -> bool {
        let external = match self.kind {
            ServiceType::NodePort | ServiceType::LoadBalancer => true,
            ServiceType::ClusterIp => !self.external_ips.is_empty() || mutant!("rule-23"),
        };
        self.external_local_asked && external
    }
}
