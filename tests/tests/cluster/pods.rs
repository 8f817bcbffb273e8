//! Pods as objects of the API, with the status that a kubelet would give them.

use std::net::IpAddr;

use fairlead_lab::{Proto, manifest::NODE_NAME};
use fairlead_tests::controlplane::Api;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::fixture::TARGET;

/// A Pod to create: what runs where it points is the case's own.
#[derive(Clone, Debug)]
pub(crate) struct PodSpec {
    name: String,
    labels: Value,
    node: String,
    addresses: Vec<IpAddr>,
    ports: Value,
    host_network: bool,
    sidecar: bool,
}

impl PodSpec {
    /// A Pod of this app on the node under test, with a port of the name `tcp` and one of the name `udp`.
    pub(crate) fn new(name: &str, app: &str, addresses: &[IpAddr]) -> Self {
        Self {
            name: name.to_owned(),
            labels: json!({"app": app}),
            node: NODE_NAME.to_owned(),
            addresses: addresses.to_vec(),
            ports: json!([
                {"name": "tcp", "containerPort": TARGET, "protocol": "TCP"},
                {"name": "udp", "containerPort": TARGET, "protocol": "UDP"},
            ]),
            host_network: false,
            sidecar: false,
        }
    }

    /// On another node.
    pub(crate) fn on(mut self, node: &str) -> Self {
        node.clone_into(&mut self.node);
        self
    }

    /// With the addresses of its node for its own.
    pub(crate) fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// With this name.
    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// With these container ports: name, number, protocol.
    pub(crate) fn ports(mut self, ports: &[(&str, u16, Proto)]) -> Self {
        let port = |(name, number, proto): &(&str, u16, Proto)| json!({"name": name, "containerPort": number, "protocol": proto.name()});
        self.ports = ports.iter().map(port).collect();
        self
    }

    /// Its ports belong to an init container that goes on running beside the others.
    pub(crate) fn sidecar(mut self) -> Self {
        self.sidecar = true;
        self
    }

    /// Creates it and reports it as running and ready, as the kubelet of its node does.
    pub(crate) fn run(&self, api: &Api) {
        self.create(api);
        self.report(api, "Running", true);
    }

    /// Creates it, bound to its node; it has no status yet.
    pub(crate) fn create(&self, api: &Api) {
        let container = |name: &str, more: Value| {
            let mut container = json!({"name": name, "image": format!("example.org/{name}")});
            if let (Value::Object(fields), Value::Object(more)) = (&mut container, more) {
                fields.extend(more);
            }
            container
        };
        // The API server wants to see that a Pod of the host's network takes the host's ports.
        let mut ports = self.ports.clone();
        for port in ports.as_array_mut().into_iter().flatten().filter(|_| self.host_network) {
            port["hostPort"] = port["containerPort"].clone();
        }
        let ports = json!({"ports": ports});
        let (init, containers) = if self.sidecar {
            let mut sidecar = container("sidecar", ports);
            sidecar["restartPolicy"] = json!("Always");
            (json!([sidecar]), container("main", Value::Null))
        } else {
            (json!([]), container("server", ports))
        };
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.name, "namespace": "default", "labels": self.labels},
            "spec": {
                "nodeName": self.node,
                "hostNetwork": self.host_network,
                "initContainers": init,
                "containers": [containers],
            },
        });
        api.create(&serde_json::from_value::<Pod>(pod).unwrap()).unwrap();
    }

    /// Reports its phase and whether it is ready.
    pub(crate) fn report(&self, api: &Api, phase: &str, ready: bool) {
        let ready = if ready { "True" } else { "False" };
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        let status = json!({"status": {
            "phase": phase,
            "podIP": self.addresses[0],
            "podIPs": self.addresses.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
            "conditions": [
                condition("PodScheduled", "True"),
                condition("Initialized", "True"),
                condition("ContainersReady", ready),
                condition("Ready", ready),
            ],
        }});
        let name = self.name.clone();
        api.call(async move |client| {
            let pods = kube::Api::<Pod>::namespaced(client, "default");
            pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await
        })
        .unwrap();
    }

    /// Gives it other labels, so that other Services select it; null takes one away.
    pub(crate) fn label(&self, api: &Api, labels: &Value) {
        api.patch::<Pod>("default", &self.name, json!({"metadata": {"labels": labels}})).unwrap();
    }

    /// Asks for its end as a user does: it has a grace period and is terminating meanwhile.
    pub(crate) fn terminate(&self, api: &Api) {
        delete(api, &self.name, 600);
    }

    /// Says that it has ended, as the kubelet does after the grace period: the object goes.
    pub(crate) fn remove(&self, api: &Api) {
        delete(api, &self.name, 0);
    }
}

fn delete(api: &Api, name: &str, grace: u32) {
    let name = name.to_owned();
    let params = DeleteParams { grace_period_seconds: Some(grace), ..DeleteParams::default() };
    api.call(async move |client| kube::Api::<Pod>::namespaced(client, "default").delete(&name, &params).await).unwrap();
}
