//! The own Node: kube-proxy's rules 4, 57 and 140.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{Decoded, Warning, labels, parse_network, parse_usable_address};
use crate::model::{NameError, Node, ObjectName};

/// Longest name of a Node, a DNS subdomain.
const MAX_NAME: usize = 253;

/// Cluster Autoscaler puts this taint on a Node that it is about to remove.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Why a Node cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// Its name.
    #[error("metadata: {0}")]
    Name(#[from] NameError),
}

/// Decodes a Node. Another than `own` comes out as none.
pub fn decode(object: &core::Node, own: &str) -> Result<Decoded<Node>, NodeError> {
    let meta = &object.metadata;
    let name = ObjectName::checked_cluster_wide(meta.name.as_deref().unwrap_or_default(), MAX_NAME)?;
    if name.name() != own && !mutant!("rule-4") {
        return Ok(Decoded::skipped());
    }
    let mut warnings = Vec::new();
    let zone = meta
        .labels
        .as_ref()
        .and_then(|labels| labels.get(labels::ZONE))
        .filter(|zone| !zone.is_empty() || mutant!("rule-57"));
    let taints = object.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let leaving = meta.deletion_timestamp.is_some()
        || taints.into_iter().any(|taint| taint.key == TO_BE_DELETED && !mutant!("rule-118"));
    let addresses = addresses(object, &mut warnings);
    let zone = zone.map(|zone| zone.as_str().into());
    let pod_cidrs = pod_cidrs(object, &mut warnings);
    let node = Node { name, addresses, zone, pod_cidrs, leaving };
    Ok(Decoded { object: Some(node), warnings })
}

/// `spec.podCIDRs`, or else what it is called where there is only one.
fn pod_cidrs(object: &core::Node, warnings: &mut Vec<Warning>) -> Vec<IpNet> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let several = spec.pod_cidrs.iter().flatten().enumerate().map(|(i, text)| (format!("spec.podCIDRs[{i}]"), text));
    let one = spec.pod_cidr.iter().map(|text| ("spec.podCIDR".to_owned(), text));
    let listed: Vec<_> =
        if spec.pod_cidrs.is_some() && !mutant!("rule-71-node") { several.collect() } else { one.collect() };
    let mut found = Vec::new();
    for (field, text) in listed.into_iter().filter(|(_, text)| !text.is_empty()) {
        match parse_network(text) {
            Ok(net) => found.push(net),
            Err(error) => warnings.push(Warning { field, problem: error.to_string() }),
        }
    }
    found
}

/// The first InternalIP, or else ExternalIP, and the first of the other family in the same order.
fn addresses(object: &core::Node, warnings: &mut Vec<Warning>) -> Vec<IpAddr> {
    let listed = object.status.iter().flat_map(|status| status.addresses.iter().flatten()).enumerate();
    let mut found: Vec<IpAddr> = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        for (i, address) in listed.clone().filter(|(_, address)| address.type_ == kind) {
            match parse_usable_address(&address.address) {
                Ok(addr) if found.iter().all(|other| other.is_ipv4() != addr.is_ipv4()) => found.push(addr),
                Ok(_) => {}
                Err(error) => {
                    let field = format!("status.addresses[{i}].address");
                    warnings.push(Warning { field, problem: error.to_string() });
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: serde_json::Value) -> core::Node {
        serde_json::from_value(value).unwrap()
    }

    fn with_addresses(addresses: &[(&str, &str)]) -> Decoded<Node> {
        let entry = |(kind, address): &(&str, &str)| serde_json::json!({"type": kind, "address": address});
        let addresses: Vec<_> = addresses.iter().map(entry).collect();
        let status = serde_json::json!({"metadata": {"name": "node-a"}, "status": {"addresses": addresses}});
        decode(&node(status), "node-a").unwrap()
    }

    #[test]
    fn rule_140_internal_addresses_come_first_and_one_of_each_family_counts() {
        for (listed, expected) in [
            (&[][..], &[][..]),
            (&[("Hostname", "node-a"), ("InternalIP", "192.0.2.1")], &["192.0.2.1"]),
            (&[("InternalIP", "192.0.2.1"), ("InternalIP", "192.0.2.2")], &["192.0.2.1"]),
            (&[("ExternalIP", "198.51.100.1"), ("InternalIP", "192.0.2.1")], &["192.0.2.1"]),
            (&[("ExternalIP", "198.51.100.1")], &["198.51.100.1"]),
            (&[("InternalIP", "2001:db8::1"), ("InternalIP", "192.0.2.1")], &["2001:db8::1", "192.0.2.1"]),
            (&[("ExternalIP", "2001:db8::2"), ("InternalIP", "192.0.2.1")], &["192.0.2.1", "2001:db8::2"]),
            (&[("InternalIP", "192.0.02.001")], &["192.0.2.1"]),
        ] {
            let found: Vec<_> =
                with_addresses(listed).object.unwrap().addresses.iter().map(ToString::to_string).collect();
            assert_eq!(found, expected, "{listed:?}");
        }
    }

    #[test]
    fn an_address_that_is_none_is_left_out_with_a_warning() {
        let decoded =
            with_addresses(&[("InternalIP", "nonsense"), ("InternalIP", "127.0.0.1"), ("ExternalIP", "192.0.2.1")]);
        assert_eq!(decoded.warnings.len(), 2);
        assert!(decoded.warnings[0].field == "status.addresses[0].address", "{:?}", decoded.warnings);
        assert_eq!(decoded.object.unwrap().addresses, [IpAddr::from([192, 0, 2, 1])]);
    }

    #[test]
    fn rule_71_the_networks_of_its_pods_are_read() {
        let cidrs = |spec: serde_json::Value| {
            let object = node(serde_json::json!({"metadata": {"name": "node-a"}, "spec": spec}));
            let decoded = decode(&object, "node-a").unwrap();
            let cidrs = decoded.object.unwrap().pod_cidrs;
            (cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), decoded.warnings.len())
        };
        let both = serde_json::json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10::/64"]});
        assert_eq!(cidrs(both), ("10.244.1.0/24 fd00:10::/64".to_owned(), 0));
        assert_eq!(cidrs(serde_json::json!({"podCIDR": "10.244.1.0/24"})), ("10.244.1.0/24".to_owned(), 0));
        assert_eq!(cidrs(serde_json::json!({"podCIDRs": ["nonsense", "10.0.0.0/8"]})), ("10.0.0.0/8".to_owned(), 1));
        assert_eq!(cidrs(serde_json::json!({})), (String::new(), 0));
    }

    #[test]
    fn rule_57_an_empty_zone_is_none() {
        let zone = |zone: &str| {
            let labels =
                serde_json::json!({"topology.kubernetes.io/zone": zone, "failure-domain.beta.kubernetes.io/zone": "b"});
            decode(&node(serde_json::json!({"metadata": {"name": "node-a", "labels": labels}})), "node-a")
                .unwrap()
                .object
                .unwrap()
                .zone
        };
        assert_eq!(zone("a").as_deref(), Some("a"));
        assert_eq!(zone(""), None);
    }

    #[test]
    fn rule_118_a_node_leaves_when_it_is_deleted_or_about_to_be() {
        let leaving = |more: serde_json::Value| {
            let mut value = serde_json::json!({"metadata": {"name": "node-a"}, "spec": {}});
            let object = value.as_object_mut().unwrap();
            for (field, inner) in more.as_object().unwrap() {
                object[field].as_object_mut().unwrap().extend(inner.as_object().unwrap().clone());
            }
            decode(&node(value), "node-a").unwrap().object.unwrap().leaving
        };
        let taint = |key: &str| serde_json::json!({"key": key, "effect": "NoSchedule", "value": "1"});
        let tainted = |keys: &[&str]| serde_json::json!({"spec": {"unschedulable": true, "taints": keys.iter().map(|k| taint(k)).collect::<Vec<_>>()}});
        assert!(!leaving(tainted(&[])), "cordoned");
        assert!(!leaving(tainted(&["node.kubernetes.io/unschedulable", "node.kubernetes.io/not-ready"])));
        assert!(leaving(tainted(&["node.kubernetes.io/unschedulable", "ToBeDeletedByClusterAutoscaler"])));
        assert!(leaving(serde_json::json!({"metadata": {"deletionTimestamp": "2026-05-17T10:00:00Z"}})));
    }

    #[test]
    fn rule_4_another_node_is_not_read() {
        let other = node(serde_json::json!({"metadata": {"name": "node-b"}}));
        assert_eq!(decode(&other, "node-a").unwrap().object, None);
        decode(&core::Node::default(), "").unwrap_err();
    }
}
