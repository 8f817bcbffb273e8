//! Endpoints, the kind that came before EndpointSlices: read from manifests only, because a cluster's controllers
//! mirror them into slices (rule 5).

use k8s_openapi::api::core::v1 as core;

use super::endpoint_slice::{address, is_local, slice_port};
use super::{Decoded, Warning, labels};
use crate::model::{Endpoint, EndpointSlice, Hint, IpFamily, NameError, ObjectName, Trigger};

/// Why an Endpoints object cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointsError {
    /// Its own name, which is its Service's.
    #[error("metadata: {0}")]
    Name(#[from] NameError),
}

/// One slice per subset and family. They are named as no EndpointSlice can be, so that the two never meet.
pub fn decode(object: &core::Endpoints, node: &str) -> Result<Decoded<Vec<EndpointSlice>>, EndpointsError> {
    let meta = &object.metadata;
    let namespace = meta.namespace.as_deref().unwrap_or("default");
    let service = ObjectName::checked(namespace, meta.name.as_deref().unwrap_or_default(), ObjectName::MAX_LABEL)?;
    if meta.labels.as_ref().is_some_and(|labels| labels.contains_key(labels::HEADLESS)) {
        return Ok(Decoded::skipped());
    }
    let (mut slices, mut warnings) = (Vec::new(), Vec::new());
    for (i, subset) in object.subsets.iter().flatten().enumerate() {
        let ports = subset.ports.iter().flatten().enumerate();
        let ports: Vec<_> = ports
            .filter_map(|(j, port)| {
                let fields = (port.name.as_deref(), port.protocol.as_deref());
                slice_port(&format!("subsets[{i}].ports[{j}]"), fields, port.port, &mut warnings)
            })
            .collect();
        let mut endpoints = addresses(i, "addresses", subset.addresses.as_deref(), node, &mut warnings);
        endpoints.extend(addresses(i, "notReadyAddresses", subset.not_ready_addresses.as_deref(), node, &mut warnings));
        for family in IpFamily::ALL {
            let of_family = |endpoint: &&Endpoint| IpFamily::of(&endpoint.addr) == family;
            let endpoints: Vec<_> = endpoints.iter().filter(of_family).copied().collect();
            if !endpoints.is_empty() {
                let name = ObjectName::new(namespace, &format!("{}:endpoints:{i}:{}", service.name(), family.number()));
                let (service, ports) = (service.clone(), ports.clone());
                slices.push(EndpointSlice {
                    name,
                    service,
                    family,
                    legacy: true,
                    ports,
                    endpoints,
                    zone_hints: Vec::new(),
                    trigger: Trigger::default(),
                });
            }
        }
    }
    Ok(Decoded { object: Some(slices), warnings })
}

fn addresses(
    subset: usize,
    list: &str,
    addresses: Option<&[core::EndpointAddress]>,
    node: &str,
    warnings: &mut Vec<Warning>,
) -> Vec<Endpoint> {
    let ready = list == "addresses";
    let mut endpoints = Vec::new();
    for (i, entry) in addresses.into_iter().flatten().enumerate() {
        let field = format!("subsets[{subset}].{list}[{i}].ip");
        if let Some(addr) = address(field, &entry.ip, None, warnings) {
            let local = is_local(entry.node_name.as_deref(), node);
            // What the controller that mirrors Endpoints writes: it says nothing of serving, which then is true.
            endpoints.push(Endpoint {
                addr,
                ready,
                serving: true,
                terminating: false,
                local,
                for_node: Hint::None,
                zones: 0,
            });
        }
    }
    endpoints
}
