//! Node objects, which belong to no namespace, and what else their kubelets would write.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::Api;

/// Creates a Node in `zone-a`, without a status.
pub fn create(api: &Api, name: &str) -> Result<()> {
    let node: Node = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
    }))?;
    let created = api.call(async move |client| kube::Api::all(client).create(&PostParams::default(), &node).await);
    created.map(drop).with_context(|| format!("cannot create Node {name}"))
}

/// Moves it to another zone.
pub fn set_zone(api: &Api, name: &str, zone: &str) -> Result<()> {
    let patch = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
    let owned = name.to_owned();
    let patched = api.call(async move |client| {
        kube::Api::<Node>::all(client).patch(&owned, &PatchParams::default(), &Patch::Merge(&patch)).await
    });
    patched.map(drop).with_context(|| format!("cannot move Node {name}"))
}

/// Reports this of its status.
pub fn set_status(api: &Api, name: &str, status: &Value) -> Result<()> {
    let (owned, status) = (name.to_owned(), json!({"status": status}));
    let patched = api.call(async move |client| {
        kube::Api::<Node>::all(client).patch_status(&owned, &PatchParams::default(), &Patch::Merge(&status)).await
    });
    patched.map(drop).with_context(|| format!("cannot write the status of Node {name}"))
}

/// Gives it these InternalIPs.
pub fn set_addresses(api: &Api, name: &str, addresses: &[IpAddr]) -> Result<()> {
    let addresses: Vec<_> = addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    set_status(api, name, &json!({"addresses": addresses}))
}
