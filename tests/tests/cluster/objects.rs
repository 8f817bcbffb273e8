//! The Services and EndpointSlices that the cases write.

use std::net::IpAddr;

use fairlead_lab::manifest::NODE_NAME;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde_json::json;

use crate::fixture::TARGET;

/// The port of every Service.
pub(crate) const PORT: u16 = 80;

/// A dual-stack Service without a selector: its slices are the case's own.
pub(crate) fn service(name: &str) -> Service {
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "tcp", "port": PORT, "protocol": "TCP", "targetPort": TARGET},
                {"name": "udp", "port": PORT, "protocol": "UDP", "targetPort": TARGET},
            ],
        },
    }))
    .unwrap()
}

/// The name of the Service's slice of one family.
pub(crate) fn slice_name(service: &str, v6: bool) -> String {
    format!("{service}-{}", if v6 { "v6" } else { "v4" })
}

/// The Service's slice of one family, all of its endpoints ready and on the node.
pub(crate) fn slice(service: &str, v6: bool, endpoints: &[IpAddr]) -> EndpointSlice {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}, "nodeName": NODE_NAME}))
        .collect();
    serde_json::from_value(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(service, v6), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "endpoints": endpoints,
        "ports": [
            {"name": "tcp", "port": TARGET, "protocol": "TCP"},
            {"name": "udp", "port": TARGET, "protocol": "UDP"},
        ],
    }))
    .unwrap()
}
