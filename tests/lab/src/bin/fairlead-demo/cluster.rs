//! The demo's cluster: lab, servers, agent, and the example's manifests.

use std::{net::SocketAddr, time::Instant};

use anyhow::Result;
use fairlead_lab::{
    Agent, AgentOptions, Lab, LabConfig, Manifests, Netfilter, Server, ServiceSpec, Shape, janitor,
    manifest::EndpointSpec,
};

use crate::{keep, show::Screen};

/// Where the pods listen.
pub(crate) const TARGET: u16 = 8080;

/// The example folder, which also `cargo xtask build-and-load` serves.
const EXAMPLE: [(&str, &str); 9] = [
    ("web", include_str!("../../../../../deploy/examples/web/web.yaml")),
    ("web-ipv4", include_str!("../../../../../deploy/examples/web/web-ipv4.yaml")),
    ("web-ipv6", include_str!("../../../../../deploy/examples/web/web-ipv6.yaml")),
    ("web-external", include_str!("../../../../../deploy/examples/web/web-external.yaml")),
    ("web-external-ipv4", include_str!("../../../../../deploy/examples/web/web-external-ipv4.yaml")),
    ("web-external-ipv6", include_str!("../../../../../deploy/examples/web/web-external-ipv6.yaml")),
    ("nobody", include_str!("../../../../../deploy/examples/web/nobody.yaml")),
    ("nobody-ipv4", include_str!("../../../../../deploy/examples/web/nobody-ipv4.yaml")),
    ("nobody-ipv6", include_str!("../../../../../deploy/examples/web/nobody-ipv6.yaml")),
];

/// The Services of the example.
pub(crate) struct Services {
    /// Three pods behind a ClusterIP.
    pub(crate) web: ServiceSpec,
    /// The same pods behind a NodePort with `externalTrafficPolicy: Local`.
    pub(crate) external: ServiceSpec,
    /// No endpoint at all.
    pub(crate) nobody: ServiceSpec,
}

impl Services {
    /// As the example folder has them.
    pub(crate) fn example() -> Self {
        let service = |name: &str, n: u8| {
            let vips = [format!("10.96.0.{n}"), format!("fd00:10:96::{n}")];
            let vips = vips.map(|vip| vip.parse().unwrap_or_else(|_| unreachable!("{vip} is an address")));
            ServiceSpec::both(name, &vips, 80, TARGET)
        };
        Self {
            web: service("web", 10),
            external: service("web-external", 11).node_port_local(30080),
            nobody: service("nobody", 12),
        }
    }
}

/// Everything that runs.
pub(crate) struct Cluster {
    /// The agent; dropped first, while its node is there.
    pub(crate) agent: Agent,
    /// One server a pod.
    pub(crate) servers: Vec<Server>,
    /// The namespaces.
    pub(crate) lab: Lab,
    /// What is served.
    pub(crate) services: Services,
}

impl Cluster {
    /// Builds the cluster and starts the agent.
    pub(crate) fn build(screen: &Screen, shape: Shape, id: Option<String>) -> Result<Self> {
        screen.step("Building the cluster");
        if id.is_some() {
            keep::clean()?;
        }
        // With connection tracking as nearly every node has it; the demo would also do without.
        let begun = Instant::now();
        let lab = Lab::new(LabConfig { id, ..LabConfig::new(shape, Netfilter::Conntrack) })?;
        let servers = lab
            .pods
            .iter()
            .map(|pod| Server::both(&pod.ns, &pod.name, &pod_addrs(pod.ip(false), pod.ip(true))))
            .collect::<Result<Vec<_>>>()?;
        for host in [&lab.node, &lab.ext].into_iter().chain(lab.all_pods().map(|pod| &pod.host)) {
            screen.saw(&format!("{:<8}{:<16}{:<24}namespace {}", host.name, host.v4, host.v6, host.ns.name()));
        }
        screen.note(&format!("up after {} ms", begun.elapsed().as_millis()));

        screen.step("Starting the agent on a folder of manifests");
        let manifests = Manifests::new(&lab.dir().join("manifests"))?;
        for (name, text) in EXAMPLE {
            manifests.write(name, text)?;
        }
        let agent = Agent::start(&lab, AgentOptions::default())?;
        let (dir, pins) = (agent.manifests.dir().display(), agent.pin_path.display());
        screen.saw(&format!("fairlead run --manifests {dir} --node-name node-a --pin-path {pins}"));
        screen.saw(&format!("first sync complete after {} ms", agent.ready_after.as_millis()));
        Ok(Self { agent, servers, lab, services: Services::example() })
    }

    /// The first `n` pods as endpoints.
    pub(crate) fn endpoints(&self, n: usize) -> Vec<EndpointSpec> {
        endpoints(self.lab.pods[..n].iter().map(|pod| (pod.ip(false), pod.ip(true))))
    }

    /// The last lines of the agent's log.
    pub(crate) fn log_tail(&self, count: usize) -> String {
        let log = self.agent.log_text();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }
}

/// Where a pod listens.
pub(crate) fn pod_addrs(v4: std::net::IpAddr, v6: std::net::IpAddr) -> [SocketAddr; 2] {
    [v4, v6].map(|ip| SocketAddr::new(ip, TARGET))
}

fn endpoints(pods: impl Iterator<Item = (std::net::IpAddr, std::net::IpAddr)>) -> Vec<EndpointSpec> {
    pods.flat_map(|(v4, v6)| [v4, v6]).map(EndpointSpec::here).collect()
}

/// The id's prefix under which a kept cluster is found.
pub(crate) fn kept_prefix() -> String {
    format!("{}demo", janitor::PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `FAIRLEAD_BLESS=1 cargo test -p fairlead-lab` writes the folder anew.
    #[test]
    fn the_example_folder_is_what_the_demo_changes() {
        let Services { web, external, nobody } = Services::example();
        let pods = endpoints(
            (10..13)
                .map(|n| (format!("10.244.1.{n}").parse().unwrap(), format!("fd00:10:244:1::{n:x}").parse().unwrap())),
        );
        let mut files = Vec::new();
        for (service, endpoints) in [(&web, &pods[..]), (&external, &pods), (&nobody, &[])] {
            files.push((service.name.clone(), service.yaml()));
            for v6 in [false, true] {
                files.push((service.slice_name(v6), service.slice_yaml(v6, endpoints)));
            }
        }
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples/web");
        for ((name, text), (listed, included)) in files.iter().zip(EXAMPLE) {
            assert_eq!(name, listed);
            if std::env::var_os("FAIRLEAD_BLESS").is_some() {
                std::fs::write(folder.join(format!("{name}.yaml")), text).unwrap();
            } else {
                assert_eq!(text, included, "{name}.yaml");
            }
        }
        assert_eq!(files.len(), EXAMPLE.len());
    }
}
