//! Services and their EndpointSlices: written as a person would, handed over as the YAML of a manifest.

use std::fmt::Write as _;
use std::net::IpAddr;

use proxy_agent::model::Protocol;

use super::world::{NODE_NAME, OTHER_NODE};

#[derive(Clone, Debug)]
struct Port {
    protocol: Protocol,
    port: u16,
    target: u16,
    node_port: Option<u16>,
}

#[derive(Clone, Debug)]
struct Endpoint {
    addr: IpAddr,
    node: &'static str,
    conditions: &'static str,
}

/// A Service with its endpoints.
#[derive(Clone, Debug)]
pub struct Service {
    name: &'static str,
    cluster_ips: Vec<IpAddr>,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
    internal: &'static str,
    external: &'static str,
    affinity_secs: Option<u32>,
    external_ips: Vec<IpAddr>,
    balancer_ips: Vec<IpAddr>,
    source_ranges: Vec<&'static str>,
}

impl Service {
    /// A Service of this name at these ClusterIPs, one for each family it has.
    pub fn new(name: &'static str, cluster_ips: &[IpAddr]) -> Self {
        let (ports, endpoints) = (Vec::new(), Vec::new());
        let cluster_ips = cluster_ips.to_vec();
        Self {
            name,
            cluster_ips,
            ports,
            endpoints,
            internal: "Cluster",
            external: "Cluster",
            affinity_secs: None,
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
        }
    }

    /// With a port that leads to `target` of its endpoints.
    #[must_use]
    pub fn port(mut self, protocol: Protocol, port: u16, target: u16) -> Self {
        self.ports.push(Port { protocol, port, target, node_port: None });
        self
    }

    /// The last port is a NodePort as well.
    #[must_use]
    pub fn node_port(mut self, number: u16) -> Self {
        self.ports.last_mut().expect("a NodePort belongs to a port").node_port = Some(number);
        self
    }

    /// With `internalTrafficPolicy: Local`.
    #[must_use]
    pub const fn internal_local(mut self) -> Self {
        self.internal = "Local";
        self
    }

    /// With `externalTrafficPolicy: Local`.
    #[must_use]
    pub const fn external_local(mut self) -> Self {
        self.external = "Local";
        self
    }

    /// With `sessionAffinity: ClientIP`.
    #[must_use]
    pub const fn affine(mut self, timeout_secs: u32) -> Self {
        self.affinity_secs = Some(timeout_secs);
        self
    }

    /// With one of `spec.externalIPs`.
    #[must_use]
    pub fn external_ip(mut self, addr: IpAddr) -> Self {
        self.external_ips.push(addr);
        self
    }

    /// With one of `status.loadBalancer.ingress`.
    #[must_use]
    pub fn balancer_ip(mut self, addr: IpAddr) -> Self {
        self.balancer_ips.push(addr);
        self
    }

    /// With one of `spec.loadBalancerSourceRanges`.
    #[must_use]
    pub fn source_range(mut self, cidr: &'static str) -> Self {
        self.source_ranges.push(cidr);
        self
    }

    /// With a ready endpoint on this node.
    #[must_use]
    pub fn here(self, addr: IpAddr) -> Self {
        self.endpoint(addr, NODE_NAME, "ready: true")
    }

    /// With a ready endpoint on another node.
    #[must_use]
    pub fn elsewhere(self, addr: IpAddr) -> Self {
        self.endpoint(addr, OTHER_NODE, "ready: true")
    }

    /// With an endpoint on this node that is shutting down and still serves.
    #[must_use]
    pub fn shutting_down(self, addr: IpAddr) -> Self {
        self.endpoint(addr, NODE_NAME, "ready: false, serving: true, terminating: true")
    }

    /// With an endpoint on this node or another one, in this condition.
    #[must_use]
    pub fn endpoint_that_is(self, addr: IpAddr, here: bool, conditions: &'static str) -> Self {
        self.endpoint(addr, if here { NODE_NAME } else { OTHER_NODE }, conditions)
    }

    fn endpoint(mut self, addr: IpAddr, node: &'static str, conditions: &'static str) -> Self {
        self.endpoints.push(Endpoint { addr, node, conditions });
        self
    }

    /// Without any endpoint.
    #[must_use]
    pub fn deserted(mut self) -> Self {
        self.endpoints.clear();
        self
    }

    /// The manifest.
    pub fn yaml(&self) -> String {
        let mut yaml = self.service();
        for v4 in [true, false] {
            if self.cluster_ips.iter().any(|ip| ip.is_ipv4() == v4) {
                yaml += &self.slice(v4);
            }
        }
        yaml
    }

    fn service(&self) -> String {
        let balancer = !self.balancer_ips.is_empty();
        let external =
            balancer || !self.external_ips.is_empty() || self.ports.iter().any(|port| port.node_port.is_some());
        let mut yaml = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {}, namespace: default}}\nspec:\n  type: {}\n",
            self.name,
            match (balancer, external) {
                (true, _) => "LoadBalancer",
                (false, true) => "NodePort",
                (false, false) => "ClusterIP",
            },
        );
        let ips: Vec<_> = self.cluster_ips.iter().map(|ip| format!("\"{ip}\"")).collect();
        let first = ips.first().expect("a Service of these tests has a ClusterIP");
        let mut line = |text: String| writeln!(yaml, "  {text}").expect("strings take everything");
        line(format!("clusterIP: {first}\n  clusterIPs: [{}]", ips.join(", ")));
        line(format!("internalTrafficPolicy: {}", self.internal));
        if external {
            line(format!("externalTrafficPolicy: {}", self.external));
        }
        if let Some(secs) = self.affinity_secs {
            line("sessionAffinity: ClientIP".to_owned());
            line(format!("sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {secs}}}}}"));
        }
        let quoted = |addrs: &[IpAddr]| addrs.iter().map(|ip| format!("\"{ip}\"")).collect::<Vec<_>>().join(", ");
        line(format!("externalIPs: [{}]", quoted(&self.external_ips)));
        let ranges: Vec<_> = self.source_ranges.iter().map(|cidr| format!("\"{cidr}\"")).collect();
        line(format!("loadBalancerSourceRanges: [{}]", ranges.join(", ")));
        line("ports:".to_owned());
        for port in &self.ports {
            let node_port = port.node_port.map(|n| format!(", nodePort: {n}")).unwrap_or_default();
            let Port { protocol, port, .. } = port;
            line(format!("- {{name: {}, port: {port}, protocol: {protocol}{node_port}}}", name(*protocol, *port)));
        }
        let ingress: Vec<_> = self.balancer_ips.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
        writeln!(yaml, "status: {{loadBalancer: {{ingress: [{}]}}}}", ingress.join(", "))
            .expect("strings take everything");
        yaml
    }

    fn slice(&self, v4: bool) -> String {
        let family = if v4 { "IPv4" } else { "IPv6" };
        let mut yaml = format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {0}-{1}\n  \
             namespace: default\n  labels: {{kubernetes.io/service-name: {0}}}\naddressType: {family}\nports:\n",
            self.name,
            family.to_lowercase(),
        );
        let mut line = |text: String| writeln!(yaml, "{text}").expect("strings take everything");
        for Port { protocol, port, target, .. } in &self.ports {
            line(format!("- {{name: {}, port: {target}, protocol: {protocol}}}", name(*protocol, *port)));
        }
        let endpoints: Vec<_> = self.endpoints.iter().filter(|e| e.addr.is_ipv4() == v4).collect();
        line(if endpoints.is_empty() { "endpoints: []".to_owned() } else { "endpoints:".to_owned() });
        for Endpoint { addr, node, conditions } in endpoints {
            line(format!("- {{addresses: [\"{addr}\"], nodeName: {node}, conditions: {{{conditions}}}}}"));
        }
        yaml
    }
}

fn name(protocol: Protocol, port: u16) -> String {
    format!("{}-{port}", protocol.to_string().to_lowercase())
}
