//! EndpointSlices: kube-proxy's rules 2, 37–44.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::{Decoded, LAST_CHANGE_TRIGGER_TIME, Warning, check_port_name, labels, parse_port, parse_usable_address};
use crate::model::{Endpoint, EndpointSlice, Hint, IpFamily, NameError, ObjectName, Protocol, SlicePort, Trigger};

/// Longest name of an EndpointSlice, a DNS subdomain.
const MAX_NAME: usize = 253;

/// Why an EndpointSlice cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// Its own name.
    #[error("metadata: {0}")]
    Name(#[from] NameError),
    /// It does not say whose endpoints it has (rule 37).
    #[error("metadata.labels: no {label:?}; set it to the name of the Service", label = labels::SERVICE_NAME)]
    NoService,
    /// The name of its Service.
    #[error("metadata.labels[{label:?}]: {0}", label = labels::SERVICE_NAME)]
    ServiceName(NameError),
}

/// Decodes a slice. One of a headless Service or of another address type comes out as none.
pub fn decode(object: &discovery::EndpointSlice, node: &str) -> Result<Decoded<EndpointSlice>, SliceError> {
    let meta = &object.metadata;
    let namespace = meta.namespace.as_deref().unwrap_or("default");
    let name = ObjectName::checked(namespace, meta.name.as_deref().unwrap_or_default(), MAX_NAME)?;
    let label = |label: &str| meta.labels.as_ref().and_then(|labels| labels.get(label));
    let family = match &*object.address_type {
        _ if label(labels::HEADLESS).is_some() && !mutant!("rule-2") => return Ok(Decoded::skipped()),
        _ if label(labels::SERVICE_PROXY_NAME).is_some() && mutant!("rule-2-label") => return Ok(Decoded::skipped()),
        "FQDN" if mutant!("rule-38") => IpFamily::V4,
        "IPv4" => IpFamily::V4,
        "IPv6" => IpFamily::V6,
        _ => return Ok(Decoded::skipped()),
    };
    let service = label(labels::SERVICE_NAME).filter(|name| !name.is_empty() && !mutant!("rule-37"));
    let service = service.map(String::as_str).or(mutant!("rule-37-missing").then_some("web"));
    let service = service.ok_or(SliceError::NoService)?;
    let service = ObjectName::checked(namespace, service, ObjectName::MAX_LABEL).map_err(SliceError::ServiceName)?;
    let mut warnings = Vec::new();
    let ports = ports(object, &mut warnings);
    let mut zone_hints = Vec::new();
    let endpoints = object.endpoints.iter().enumerate();
    let endpoints =
        endpoints.filter_map(|(i, e)| endpoint(i, e, family, node, &mut zone_hints, &mut warnings)).collect();
    zone_hints.shrink_to_fit();
    let trigger = trigger(meta);
    let slice = EndpointSlice { name, service, family, legacy: false, ports, endpoints, zone_hints, trigger };
    Ok(Decoded { object: Some(slice), warnings })
}

/// Missing or unreadable, it only leaves a measurement out (rule 135).
fn trigger(meta: &ObjectMeta) -> Trigger {
    let text = meta.annotations.as_ref().and_then(|annotations| annotations.get(LAST_CHANGE_TRIGGER_TIME));
    Trigger(text.and_then(|text| Duration::try_from(text.parse::<Timestamp>().ok()?.as_duration()).ok()))
}

/// Without a number a port means nothing here (rule 39).
fn ports(object: &discovery::EndpointSlice, warnings: &mut Vec<Warning>) -> Vec<SlicePort> {
    let mut ports = Vec::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        let fields = (port.name.as_deref(), port.protocol.as_deref());
        if let Some(number) = port.port.or(mutant!("rule-39").then_some(80)) {
            ports.extend(slice_port(&format!("ports[{i}]"), fields, number, warnings));
        }
    }
    ports
}

/// Name and protocol default as the API server has it: none, and TCP.
pub(super) fn slice_port(
    field: &str,
    (name, protocol): (Option<&str>, Option<&str>),
    port: i32,
    warnings: &mut Vec<Warning>,
) -> Option<SlicePort> {
    let (name, protocol) = (name.unwrap_or_default(), protocol.unwrap_or("TCP"));
    let mut warn = |part: &str, problem: String| warnings.push(Warning { field: format!("{field}.{part}"), problem });
    if let Err(problem) = check_port_name(name) {
        warn("name", problem);
        return None;
    }
    let Some(protocol) = Protocol::from_name(protocol) else {
        warn("protocol", format!("{protocol:?} is no protocol of a Service; give TCP, UDP or SCTP"));
        return None;
    };
    let Some(port) = parse_port(port) else {
        warn("port", format!("{port} is no port; give a number from 1 to 65535"));
        return None;
    };
    Some(SlicePort { name: name.into(), protocol, port })
}

fn endpoint(
    index: usize,
    endpoint: &discovery::Endpoint,
    family: IpFamily,
    node: &str,
    zone_hints: &mut Vec<Box<[Box<str>]>>,
    warnings: &mut Vec<Warning>,
) -> Option<Endpoint> {
    // Only the first address counts; none is no mistake (rule 41).
    let text = if mutant!("rule-41") { endpoint.addresses.last() } else { endpoint.addresses.first() }?;
    let field = format!("endpoints[{index}].addresses[0]");
    let addr = address(field, text, Some(family), warnings)?;
    let conditions = endpoint.conditions.as_ref();
    let nodes = endpoint.hints.iter().flat_map(|hints| hints.for_nodes.iter().flatten());
    let zones = endpoint.hints.iter().flat_map(|hints| hints.for_zones.iter().flatten());
    Some(Endpoint {
        addr,
        ready: conditions.and_then(|c| c.ready).unwrap_or(!mutant!("rule-42")),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        local: is_local(endpoint.node_name.as_deref(), node),
        for_node: Hint::of(nodes.map(|hint| &*hint.name), Some(node).filter(|node| !node.is_empty())),
        zones: zone_set(zones.map(|hint| &*hint.name).collect(), zone_hints),
    })
}

/// The place of a set of zones among those of the slice, plus one; 0 for the empty set, and for a set that there is no
/// number left for: such an endpoint counts as one without a hint.
fn zone_set(mut zones: Vec<&str>, sets: &mut Vec<Box<[Box<str>]>>) -> u16 {
    if zones.is_empty() {
        return 0;
    }
    zones.sort_unstable();
    zones.dedup();
    let same = |set: &[Box<str>]| set.iter().map(|name| &**name).eq(zones.iter().copied());
    let place = sets.iter().position(|set| same(set)).unwrap_or_else(|| {
        sets.push(zones.iter().map(|name| Box::from(*name)).collect());
        sets.len() - 1
    });
    u16::try_from(place + 1).unwrap_or(0)
}

/// On this node only if both names are known and equal (rule 43).
pub(super) fn is_local(of_endpoint: Option<&str>, own: &str) -> bool {
    of_endpoint.is_some_and(|name| !own.is_empty() && name == own && !mutant!("rule-43-nobody"))
        || own.is_empty() && mutant!("rule-43")
}

/// An endpoint's address; one of another family than its slice is left out.
pub(super) fn address(
    field: String,
    text: &str,
    family: Option<IpFamily>,
    warnings: &mut Vec<Warning>,
) -> Option<IpAddr> {
    let problem = match parse_usable_address(text) {
        Ok(addr) if family.is_none_or(|family| IpFamily::of(&addr) == family) => return Some(addr),
        Ok(addr) => format!("{addr} is no address of the slice's addressType {:?}", family.map(|f| f.to_string())),
        Err(error) => error.to_string(),
    };
    warnings.push(Warning { field, problem });
    None
}
