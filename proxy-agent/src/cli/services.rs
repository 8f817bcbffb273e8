//! `fairlead services`: addresses, what they lead to, and how often they were used.

use std::collections::BTreeMap;
use std::process::ExitCode;

use aya::maps::{Map, MapData, PerCpuArray};
use proxy_common::abi::{Class, Policy, Port, PortStats, RunVerdict};
use serde::Serialize;

use super::{Row, pins, show, snapshot};
use crate::args::ShowArgs;
use crate::dataplane::pin::PinRoot;
use crate::dataplane::{Snapshot, Tuple};

#[derive(Debug, PartialEq, Eq, Serialize)]
struct ServiceRow {
    namespace: String,
    service: String,
    port_name: String,
    address: String,
    port: u16,
    protocol: String,
    class: &'static str,
    policy: &'static str,
    endpoints: u32,
    /// What a packet meets where there is no endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<&'static str>,
    port_id: u32,
    new_flows: u64,
    refused: u64,
}

impl Row for ServiceRow {
    const HEADER: &'static [&'static str] =
        &["SERVICE", "PORT", "ADDRESS", "CLASS", "POLICY", "ENDPOINTS", "NEW-FLOWS", "REFUSED"];

    fn cells(&self) -> Vec<String> {
        let endpoints = match self.verdict {
            Some(verdict) => format!("0 ({verdict})"),
            None => self.endpoints.to_string(),
        };
        let address = match self.address.as_str() {
            "0.0.0.0" | "::" => format!("*:{}", self.port),
            v6 if v6.contains(':') => format!("[{v6}]:{}", self.port),
            v4 => format!("{v4}:{}", self.port),
        };
        vec![
            format!("{}/{}", self.namespace, self.service),
            if self.port_name.is_empty() { "-".to_owned() } else { self.port_name.clone() },
            format!("{address}/{}", self.protocol),
            self.class.to_owned(),
            self.policy.to_owned(),
            endpoints,
            self.new_flows.to_string(),
            self.refused.to_string(),
        ]
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pins = pins(args)?;
    let maps = snapshot(&pins)?;
    let stats = port_stats(&pins, maps.names.keys().copied())?;
    show(&rows(&maps, &stats), args.output)
}

fn port_stats(pins: &PinRoot, ids: impl Iterator<Item = u32>) -> anyhow::Result<BTreeMap<u32, PortStats>> {
    let data = MapData::from_pin(pins.map("PORT_STATS"))?;
    let map: PerCpuArray<_, PortStats> = PerCpuArray::try_from(Map::PerCpuArray(data))?;
    let mut sums = BTreeMap::new();
    for id in ids.filter(|id| *id < map.len()) {
        let cpus = map.get(&id, 0)?;
        let sum = |field: fn(&PortStats) -> u64| cpus.iter().map(field).sum();
        sums.insert(id, PortStats { new_flows: sum(|s| s.new_flows), refused: sum(|s| s.refused) });
    }
    Ok(sums)
}

fn rows(maps: &Snapshot, stats: &BTreeMap<u32, PortStats>) -> Vec<ServiceRow> {
    let mut rows: Vec<_> = maps
        .services
        .iter()
        .map(|(tuple, service)| {
            let id = service.port_id;
            row(maps, tuple, id, service.class, stats.get(&id))
        })
        .collect();
    rows.sort_by(|a, b| {
        (&a.namespace, &a.service, &a.port_name, &a.class).cmp(&(&b.namespace, &b.service, &b.port_name, &b.class))
    });
    rows
}

fn row(maps: &Snapshot, tuple: &Tuple, id: u32, class: u8, stats: Option<&PortStats>) -> ServiceRow {
    let port = maps.ports.get(&id).copied().unwrap_or(Port::UNUSED);
    let key = maps.names.get(&id);
    let flag = if class == Class::ClusterIp as u8 { Policy::INTERNAL_LOCAL } else { Policy::EXTERNAL_LOCAL };
    let local = port.policy.flags() & flag != 0;
    let run = if local { port.local } else { port.cluster };
    ServiceRow {
        namespace: key.map_or("?", |k| k.service.namespace()).to_owned(),
        service: key.map_or("?", |k| k.service.name()).to_owned(),
        port_name: key.map_or_else(String::new, |k| k.port.to_string()),
        address: tuple.addr.to_string(),
        port: tuple.port,
        protocol: tuple.protocol.to_string(),
        class: class_name(class),
        policy: if local { "Local" } else { "Cluster" },
        endpoints: run.len(),
        verdict: run.is_empty().then(|| match run.verdict() {
            RunVerdict::Reject => "reject",
            RunVerdict::Drop => "drop",
        }),
        port_id: id,
        new_flows: stats.map_or(0, |s| s.new_flows),
        refused: stats.map_or(0, |s| s.refused),
    }
}

fn class_name(class: u8) -> &'static str {
    let classes = [
        (Class::ClusterIp, "ClusterIP"),
        (Class::NodePort, "NodePort"),
        (Class::ExternalIp, "ExternalIP"),
        (Class::LoadBalancer, "LoadBalancer"),
    ];
    classes.iter().find(|(c, _)| *c as u8 == class).map_or("?", |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::{Run, Service};

    use super::*;
    use crate::model::{IpFamily, ObjectName, PortKey, Protocol};

    #[test]
    fn a_row_reads_like_the_service() {
        let mut maps = Snapshot::default();
        let key = |port: &str| PortKey {
            service: ObjectName::new("default", "web"),
            port: port.into(),
            protocol: Protocol::Tcp,
            family: IpFamily::V4,
        };
        maps.names.insert(3, key("http"));
        let port = Port { cluster: Run::new(5, 2, 0), policy: Policy::new(Policy::EXTERNAL_LOCAL, 0), ..Port::UNUSED };
        maps.ports.insert(3, Port { local: Run::empty(RunVerdict::Drop, 0), ..port });
        let tuple = Tuple { addr: "10.96.0.1".parse().unwrap(), port: 80, protocol: Protocol::Tcp };
        maps.services.insert(tuple, Service::new(3, Class::ClusterIp));
        let node_port = Tuple::node_port(IpFamily::V4, 30_080, Protocol::Tcp);
        maps.services.insert(node_port, Service::new(3, Class::NodePort));
        let stats = BTreeMap::from([(3, PortStats { new_flows: 7, refused: 1 })]);

        let lines: Vec<String> = rows(&maps, &stats).iter().map(|row| row.cells().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "default/web http 10.96.0.1:80/TCP ClusterIP Cluster 2 7 1",
                "default/web http *:30080/TCP NodePort Local 0 (drop) 7 1",
            ]
        );
    }
}
