//! Services and EndpointSlices as YAML files, written the way a careful person would: whole files, by rename.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::wire::Proto;

/// The node's name in every manifest.
pub const NODE_NAME: &str = "node-a";
/// The name of another node.
pub const OTHER_NODE: &str = "node-b";

/// A port of a Service.
#[derive(Clone, Debug)]
pub struct PortSpec {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub proto: Proto,
    /// The Service's port.
    pub port: u16,
    /// The endpoints' port.
    pub target: u16,
    /// The NodePort, if any.
    pub node_port: Option<u16>,
}

/// A Service.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Its name, in namespace `default`.
    pub name: String,
    /// Its cluster IPs, one for each family it has.
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<PortSpec>,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// The load balancer's, in the status.
    pub balancer_ips: Vec<IpAddr>,
    /// Seconds of `sessionAffinity: ClientIP`.
    pub affinity: Option<u32>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug)]
pub struct EndpointSpec {
    /// Its address.
    pub ip: IpAddr,
    /// The node it runs on.
    pub node: &'static str,
    /// `conditions.ready`.
    pub ready: bool,
}

impl EndpointSpec {
    /// Ready, on the node under test.
    pub const fn here(ip: IpAddr) -> Self {
        Self::on(NODE_NAME, ip)
    }

    /// Ready, on another node.
    pub const fn elsewhere(ip: IpAddr) -> Self {
        Self::on(OTHER_NODE, ip)
    }

    /// Ready, on the node of this name.
    pub const fn on(node: &'static str, ip: IpAddr) -> Self {
        Self { ip, node, ready: true }
    }
}

impl ServiceSpec {
    /// A Service with one port number for both transports.
    pub fn both(name: &str, cluster_ips: &[IpAddr], port: u16, target: u16) -> Self {
        let ports = Proto::ALL
            .map(|proto| {
                let name = proto.name().to_lowercase();
                PortSpec { name, proto, port, target, node_port: None }
            })
            .to_vec();
        Self {
            name: name.to_owned(),
            cluster_ips: cluster_ips.to_vec(),
            ports,
            external_local: false,
            internal_local: false,
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            affinity: None,
        }
    }

    /// The same, also on a NodePort with `externalTrafficPolicy: Local`.
    #[must_use]
    pub fn node_port_local(mut self, node_port: u16) -> Self {
        self.external_local = true;
        self.node_port(node_port)
    }

    /// The same, also on a NodePort with `externalTrafficPolicy: Cluster`.
    #[must_use]
    pub fn node_port(mut self, node_port: u16) -> Self {
        self.ports.iter_mut().for_each(|port| port.node_port = Some(node_port));
        self
    }

    /// Where it answers for one family: its cluster IP and first port.
    pub fn vip(&self, v6: bool) -> Option<SocketAddr> {
        let ip = self.cluster_ips.iter().find(|ip| ip.is_ipv6() == v6)?;
        Some(SocketAddr::new(*ip, self.ports.first()?.port))
    }

    /// The Service.
    pub fn yaml(&self) -> String {
        let kind = match self.ports.iter().any(|port| port.node_port.is_some()) {
            _ if !self.balancer_ips.is_empty() => "LoadBalancer",
            true => "NodePort",
            false => "ClusterIP",
        };
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {}\n  namespace: default\nspec:\n  type: {kind}\n",
            self.name
        );
        if let Some(first) = self.cluster_ips.first() {
            text += &format!("  clusterIP: \"{first}\"\n  clusterIPs:\n");
        }
        for ip in &self.cluster_ips {
            text += &format!("  - \"{ip}\"\n");
        }
        text += "  ipFamilies:\n";
        for ip in &self.cluster_ips {
            text += &format!("  - {}\n", family(ip.is_ipv6()));
        }
        if self.external_local {
            text += "  externalTrafficPolicy: Local\n";
        }
        if self.internal_local {
            text += "  internalTrafficPolicy: Local\n";
        }
        if !self.external_ips.is_empty() {
            text += &format!("  externalIPs: [{}]\n", listed(&self.external_ips, |ip| format!("\"{ip}\"")));
        }
        if let Some(secs) = self.affinity {
            text += &format!(
                "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {secs}}}}}\n"
            );
        }
        text += "  ports:\n";
        for port in &self.ports {
            text += &format!(
                "  - name: {}\n    protocol: {}\n    port: {}\n    targetPort: {}\n",
                port.name, port.proto, port.port, port.target
            );
            if let Some(node_port) = port.node_port {
                text += &format!("    nodePort: {node_port}\n");
            }
        }
        if !self.balancer_ips.is_empty() {
            let ingress = listed(&self.balancer_ips, |ip| format!("{{ip: \"{ip}\"}}"));
            text += &format!("status:\n  loadBalancer: {{ingress: [{ingress}]}}\n");
        }
        text
    }

    /// The name of its EndpointSlice of one family.
    pub fn slice_name(&self, v6: bool) -> String {
        format!("{}-{}", self.name, family(v6).to_lowercase())
    }

    /// Its EndpointSlice of one family; endpoints of the other family are left out.
    pub fn slice_yaml(&self, v6: bool, endpoints: &[EndpointSpec]) -> String {
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {}\n  namespace: default\n  \
             labels:\n    kubernetes.io/service-name: {}\naddressType: {}\nports:\n",
            self.slice_name(v6),
            self.name,
            family(v6)
        );
        for port in &self.ports {
            // Writing to a String cannot fail.
            writeln!(text, "- name: {}\n  protocol: {}\n  port: {}", port.name, port.proto, port.target).ok();
        }
        let mut own = endpoints.iter().filter(|endpoint| endpoint.ip.is_ipv6() == v6).peekable();
        text += if own.peek().is_some() { "endpoints:\n" } else { "endpoints: []\n" };
        for EndpointSpec { ip, node, ready } in own {
            writeln!(
                text,
                "- addresses: [\"{ip}\"]\n  nodeName: {node}\n  conditions: {{ready: {ready}, serving: {ready}, terminating: false}}"
            )
            .ok();
        }
        text
    }
}

/// Items of a YAML sequence in one line.
fn listed(ips: &[IpAddr], shown: impl Fn(&IpAddr) -> String) -> String {
    ips.iter().map(shown).collect::<Vec<_>>().join(", ")
}

const fn family(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

/// A folder of manifests.
#[derive(Clone, Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    /// Makes the folder, empty.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes `NAME.yaml` whole.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let (draft, path) = (self.dir.join(format!(".{name}.draft")), self.dir.join(format!("{name}.yaml")));
        fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
        fs::rename(&draft, &path).with_context(|| format!("cannot put {} in place", path.display()))
    }

    /// Removes `NAME.yaml`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.dir.join(format!("{name}.yaml"));
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Writes a Service and its slices, slices first: the Service is never without its endpoints.
    pub fn apply(&self, service: &ServiceSpec, endpoints: &[EndpointSpec]) -> Result<()> {
        self.endpoints(service, endpoints)?;
        self.write(&service.name, &service.yaml())
    }

    /// Rewrites the slices of a Service.
    pub fn endpoints(&self, service: &ServiceSpec, endpoints: &[EndpointSpec]) -> Result<()> {
        for ip in &service.cluster_ips {
            let v6 = ip.is_ipv6();
            self.write(&service.slice_name(v6), &service.slice_yaml(v6, endpoints))?;
        }
        Ok(())
    }

    /// Removes a Service and its slices.
    pub fn delete(&self, service: &ServiceSpec) -> Result<()> {
        self.remove(&service.name)?;
        service.cluster_ips.iter().try_for_each(|ip| self.remove(&service.slice_name(ip.is_ipv6())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_holds_the_endpoints_of_its_family() {
        let service = ServiceSpec::both("web", &["10.96.0.10".parse().unwrap()], 80, 8080).node_port_local(30080);
        assert!(service.yaml().contains("type: NodePort") && service.yaml().contains("nodePort: 30080"));
        let endpoints = ["10.244.1.10", "fd00::10"].map(|ip| EndpointSpec::here(ip.parse().unwrap()));
        let slice = service.slice_yaml(false, &endpoints);
        assert!(slice.contains("10.244.1.10") && !slice.contains("fd00::10"), "{slice}");
        assert!(service.slice_yaml(true, &endpoints[..1]).ends_with("endpoints: []\n"));
    }
}
