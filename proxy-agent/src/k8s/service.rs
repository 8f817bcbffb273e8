//! Services: kube-proxy's rules 1, 10–26 as far as one object alone decides them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{AddressError, Decoded, Warning, check_port_name, labels, parse_network, parse_port, parse_usable_address};
use crate::model::{NameError, ObjectName, Protocol, Service, ServicePort, ServiceType};

/// What the API server fills in for `timeoutSeconds` (rule 22).
const DEFAULT_AFFINITY_SECS: u32 = 10_800;

/// Why a Service cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// Its own name.
    #[error("metadata: {0}")]
    Name(#[from] NameError),
    /// A ClusterIP.
    #[error("{field}: {source}")]
    ClusterIp {
        /// Path of the field.
        field: String,
        /// What is wrong.
        source: AddressError,
    },
    /// A number that is no port.
    #[error("{field}: {value} is no port; give a number from 1 to 65535")]
    Port {
        /// Path of the field.
        field: String,
        /// What stands there.
        value: i32,
    },
    /// A port's name.
    #[error("{field}: {problem}")]
    PortName {
        /// Path of the field.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// A protocol that Services do not have.
    #[error("{field}: {value:?} is no protocol of a Service; give TCP, UDP or SCTP")]
    Protocol {
        /// Path of the field.
        field: String,
        /// What stands there.
        value: String,
    },
    /// Two ports that nothing tells apart.
    #[error(
        "spec.ports[{index}]: another port has the same name {name:?} and protocol {protocol}; give it another name"
    )]
    DuplicatePort {
        /// Place of the second one.
        index: usize,
        /// Name of both.
        name: String,
        /// Protocol of both.
        protocol: Protocol,
    },
}

/// Decodes a Service. One that proxies skip comes out as none.
pub fn decode(object: &core::Service) -> Result<Decoded<Service>, ServiceError> {
    let meta = &object.metadata;
    let namespace = meta.namespace.as_deref().unwrap_or("default");
    let name = ObjectName::checked(namespace, meta.name.as_deref().unwrap_or_default(), ObjectName::MAX_LABEL)?;
    let Some(spec) = object.spec.as_ref().filter(|_| !has_label(meta.labels.as_ref()) || mutant!("rule-1")) else {
        return Ok(Decoded::skipped());
    };
    let kind = match spec.type_.as_deref() {
        Some("ExternalName") if !mutant!("rule-10") => return Ok(Decoded::skipped()),
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        _ => ServiceType::ClusterIp,
    };
    if matches!(spec.cluster_ip.as_deref(), Some("None")) || cluster_ip_fields(spec).is_empty() {
        return Ok(Decoded::skipped());
    }
    let (cluster_ip_v4, cluster_ip_v6) = cluster_ips(spec)?;
    let mut warnings = Vec::new();
    let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
    let local_balancer = kind == ServiceType::LoadBalancer && local(&spec.external_traffic_policy);
    let service = Service {
        name,
        // Without a date (a manifest) it is taken for the youngest.
        created_secs: meta.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second()),
        kind,
        cluster_ip_v4,
        cluster_ip_v6,
        ports: ports(spec)?,
        internal_local: local(&spec.internal_traffic_policy),
        external_local_asked: local(&spec.external_traffic_policy),
        affinity_secs: affinity(spec),
        external_ips: external_ips(spec, &mut warnings),
        load_balancer_ips: load_balancer_ips(object.status.as_ref(), &mut warnings),
        source_ranges_asked: source_ranges(spec, &mut warnings),
        health_check_node_port: spec
            .health_check_node_port
            .filter(|_| local_balancer)
            .and_then(parse_port)
            .unwrap_or(0),
    };
    Ok(Decoded { object: Some(service), warnings })
}

/// The label's value does not matter, not even an empty one (rule 1).
fn has_label(labels: Option<&std::collections::BTreeMap<String, String>>) -> bool {
    labels.is_some_and(|labels| labels.contains_key(labels::SERVICE_PROXY_NAME))
}

/// `clusterIPs` with `ipFamilies`; where one of them is missing, `clusterIP` (rule 13).
fn cluster_ip_fields(spec: &core::ServiceSpec) -> Vec<(String, &str)> {
    let listed = spec.cluster_ips.iter().flatten().enumerate();
    let listed: Vec<_> = listed.map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), ip.as_str())).collect();
    let single = spec.cluster_ip.as_deref().map(|ip| ("spec.clusterIP".to_owned(), ip));
    let fields = if listed.is_empty() { single.into_iter().collect() } else { listed };
    fields.into_iter().filter(|(_, ip)| !ip.is_empty() && *ip != "None").collect()
}

type ClusterIps = (Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>);

fn cluster_ips(spec: &core::ServiceSpec) -> Result<ClusterIps, ServiceError> {
    let families = spec.ip_families.iter().flatten().map(String::as_str);
    let families: Vec<_> = families.collect();
    let (mut v4, mut v6) = (None, None);
    for (field, text) in cluster_ip_fields(spec) {
        let addr = parse_usable_address(text).map_err(|source| ServiceError::ClusterIp { field, source })?;
        match addr {
            // An address whose family the Service does not have is none of its own.
            IpAddr::V4(addr) if families.is_empty() || families.contains(&"IPv4") || mutant!("rule-13") => {
                v4 = v4.or(Some(addr));
            }
            IpAddr::V6(addr) if families.is_empty() || families.contains(&"IPv6") => v6 = v6.or(Some(addr)),
            _ => {}
        }
    }
    Ok((v4, v6))
}

fn ports(spec: &core::ServiceSpec) -> Result<Vec<ServicePort>, ServiceError> {
    let mut seen = BTreeSet::new();
    let mut ports = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let name = port.name.as_deref().unwrap_or_default();
        check_port_name(name).map_err(|problem| ServiceError::PortName { field: field("name"), problem })?;
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let protocol = Protocol::from_name(protocol)
            .ok_or_else(|| ServiceError::Protocol { field: field("protocol"), value: protocol.to_owned() })?;
        let number =
            |value: i32, name: &str| parse_port(value).ok_or_else(|| ServiceError::Port { field: field(name), value });
        let node_port = port.node_port.filter(|port| *port != 0).map(|port| number(port, "nodePort")).transpose()?;
        if !seen.insert((name, if mutant!("rule-12") { Protocol::Tcp } else { protocol })) {
            return Err(ServiceError::DuplicatePort { index, name: name.to_owned(), protocol });
        }
        let port = number(port.port, "port")?;
        ports.push(ServicePort { name: name.into(), protocol, port, node_port: node_port.unwrap_or(0) });
    }
    Ok(ports)
}

fn affinity(spec: &core::ServiceSpec) -> Option<u32> {
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    // Zero would mean no affinity; the API server takes none below 1.
    let secs = config.and_then(|client| client.timeout_seconds).and_then(|secs| u32::try_from(secs).ok());
    let asked = spec.session_affinity.as_deref() == Some("ClientIP");
    asked.then(|| secs.filter(|secs| *secs != 0).unwrap_or(if mutant!("rule-22") { 60 } else { DEFAULT_AFFINITY_SECS }))
}

fn external_ips(spec: &core::ServiceSpec, warnings: &mut Vec<Warning>) -> Vec<IpAddr> {
    let fields = spec.external_ips.iter().flatten().enumerate();
    fields.filter_map(|(i, ip)| optional_address(&format!("spec.externalIPs[{i}]"), ip, warnings)).collect()
}

fn load_balancer_ips(status: Option<&core::ServiceStatus>, warnings: &mut Vec<Warning>) -> Vec<IpAddr> {
    let ingress = status.and_then(|status| status.load_balancer.as_ref()).and_then(|lb| lb.ingress.as_ref());
    let mut addrs = Vec::new();
    for (i, ingress) in ingress.into_iter().flatten().enumerate() {
        // `ipMode: Proxy`: the load balancer wants the traffic itself (rule 19).
        if let Some(ip) = ingress
            .ip
            .as_deref()
            .filter(|_| matches!(ingress.ip_mode.as_deref(), None | Some("VIP")) || mutant!("rule-19-proxy"))
        {
            addrs.extend(optional_address(&format!("status.loadBalancer.ingress[{i}].ip"), ip, warnings));
        }
    }
    addrs
}

/// Bad ranges are left out (rule 41). Whitespace around one does not count.
fn source_ranges(spec: &core::ServiceSpec, warnings: &mut Vec<Warning>) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for (i, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match parse_network(text.trim()) {
            Ok(net) => ranges.push(net),
            Err(_) if text.trim().is_empty() || mutant!("rule-41-range") => {}
            Err(problem) => warnings
                .push(Warning { field: format!("spec.loadBalancerSourceRanges[{i}]"), problem: problem.to_string() }),
        }
    }
    ranges
}

/// Bad addresses are left out and the rest is used; empty ones without a word (rule 41).
fn optional_address(field: &str, text: &str, warnings: &mut Vec<Warning>) -> Option<IpAddr> {
    if text.is_empty() {
        return None;
    }
    let parsed = parse_usable_address(text);
    if let Err(problem) = &parsed
        && !mutant!("rule-41-bad")
    {
        warnings.push(Warning { field: field.to_owned(), problem: problem.to_string() });
    }
    parsed.ok()
}
