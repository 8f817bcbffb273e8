//! `fairlead services`: addresses, what they lead to, how often they were used, and what is not served.

use std::collections::BTreeMap;
use std::io;
use std::process::ExitCode;
use std::time::SystemTime;

use aya::maps::{Map, MapData, PerCpuArray};
use proxy_common::abi::{Class, Policy, Port, PortStats, RunVerdict, Service};
use serde::Serialize;

use super::table::Table;
use super::{Row, complain, document, pins, print, snapshot, table, wide};
use crate::args::{Output, ShowArgs};
use crate::dataplane::pin::PinRoot;
use crate::dataplane::{Snapshot, Tuple};
use crate::status::Entry;
use crate::status::file::{self, Said};

/// One address that is served, or one thing that is not: the other fields are empty then.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
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
    /// Timeout of session affinity.
    #[serde(skip_serializing_if = "Option::is_none")]
    affinity_secs: Option<u32>,
    /// Whose clients may use the address; everybody, if it has none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ranges: Vec<String>,
    port_id: u32,
    new_flows: u64,
    refused: u64,
    /// What the agent does not serve, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_served: Option<String>,
}

impl Row for ServiceRow {
    const HEADER: &'static [&'static str] =
        &["SERVICE", "PORT", "ADDRESS", "CLASS", "POLICY", "ENDPOINTS", "NEW-FLOWS", "REFUSED"];
    const WIDE: &'static [&'static str] = &["AFFINITY", "SOURCE-RANGES", "PORT-ID"];

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

    fn wide(&self) -> Vec<String> {
        vec![
            self.affinity_secs.map_or_else(|| "-".to_owned(), |secs| format!("{secs}s")),
            if self.source_ranges.is_empty() { "-".to_owned() } else { self.source_ranges.join(",") },
            self.port_id.to_string(),
        ]
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pins = pins(args)?;
    let maps = snapshot(&pins)?;
    let stats = port_stats(&pins, maps.names.keys().copied())?;
    let (said, note) = what_is_said(file::of(&pins).read(), pins.agent_runs()?, SystemTime::now());
    let (served, not_served) = (rows(&maps, &stats), not_served(&said.entries));
    match args.output {
        Output::Json | Output::Yaml => {
            let rows: Vec<_> = served.iter().chain(&not_served).collect();
            document(&rows, args.output)?;
        }
        Output::Table | Output::Wide => {
            let text = if args.output == Output::Wide { wide(&served) } else { table(&served) };
            print(&text.to_string())?;
            if !not_served.is_empty() {
                print(&format!("\n{}", not_served_table(&not_served)))?;
            }
        }
    }
    // Beside the rows, so that these stay what a script reads.
    note.iter().for_each(|note| complain(note));
    Ok(ExitCode::SUCCESS)
}

/// What the status file says, and what must be known to understand it.
fn what_is_said(
    read: io::Result<Option<(Said, SystemTime)>>,
    agent_runs: bool,
    now: SystemTime,
) -> (Said, Option<String>) {
    let unknown = |why: String| (Said::default(), Some(format!("what is not served is not known: {why}")));
    match read {
        Ok(Some((said, _))) if !said.synced => unknown("the agent has not yet seen to every Service".to_owned()),
        Ok(Some((said, _))) if agent_runs => (said, None),
        Ok(Some((said, written))) => {
            let secs = now.duration_since(written).unwrap_or_default().as_secs();
            (said, Some(format!("no agent is running; what is not served is what the last one said {secs} s ago")))
        }
        Ok(None) if agent_runs => unknown("the agent could not write it down; its log says why".to_owned()),
        Ok(None) => unknown("no agent is running, and the last one left no word".to_owned()),
        Err(error) => unknown(error.to_string()),
    }
}

fn not_served(entries: &[Entry]) -> Vec<ServiceRow> {
    let mut rows = Vec::new();
    for entry in entries {
        let (namespace, service) = entry.service.as_deref().and_then(|name| name.split_once('/')).unwrap_or_default();
        // What is no Service's is told by its own name.
        let about = if service.is_empty() { format!("{}: ", entry.subject) } else { String::new() };
        let failed = entry.error.iter().map(|error| format!("{about}failed, and is tried again: {error}"));
        rows.extend(failed.chain(entry.unserved.iter().map(|what| format!("{about}{what}"))).map(|what| ServiceRow {
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            not_served: Some(what),
            ..ServiceRow::default()
        }));
    }
    rows
}

fn not_served_table(rows: &[ServiceRow]) -> Table {
    let mut table = Table::new(&["SERVICE", "NOT SERVED"]);
    for row in rows {
        let name = if row.service.is_empty() { "-".to_owned() } else { format!("{}/{}", row.namespace, row.service) };
        table.row(vec![name, row.not_served.clone().unwrap_or_default()]);
    }
    table
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
            row(maps, tuple, service, stats.get(&id))
        })
        .collect();
    rows.sort_by(|a, b| {
        (&a.namespace, &a.service, &a.port_name, &a.class).cmp(&(&b.namespace, &b.service, &b.port_name, &b.class))
    });
    rows
}

fn row(maps: &Snapshot, tuple: &Tuple, service: &Service, stats: Option<&PortStats>) -> ServiceRow {
    let Service { port_id: id, class, flags, .. } = *service;
    let guarded = flags & Service::SOURCE_RANGES != 0;
    let ranges = maps.ranges_of(id).filter(|_| guarded);
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
        affinity_secs: Some(port.policy.affinity_secs()).filter(|secs| *secs != 0),
        source_ranges: ranges.map(|net| net.to_string()).collect(),
        port_id: id,
        new_flows: stats.map_or(0, |s| s.new_flows),
        refused: stats.map_or(0, |s| s.refused),
        not_served: None,
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
    use std::time::Duration;

    use proxy_common::abi::Run;

    use super::*;
    use crate::model::{IpFamily, ObjectName, PortKey, Protocol};

    #[test]
    fn what_is_not_served_has_rows_of_its_own() {
        let entry = |subject: &str, service: Option<&str>, error: Option<&str>, unserved: &[&str]| Entry {
            subject: subject.to_owned(),
            service: service.map(str::to_owned),
            error: error.map(str::to_owned),
            unserved: unserved.iter().map(|what| (*what).to_owned()).collect(),
        };
        let rows = not_served(&[
            entry("Service shop/web", Some("shop/web"), Some("PORTS is full"), &["NodePort 30080/TCP: not yet"]),
            entry("node addresses", None, Some("no room"), &[]),
        ]);
        assert_eq!(
            not_served_table(&rows).to_string(),
            "SERVICE   NOT SERVED\n\
             shop/web  failed, and is tried again: PORTS is full\n\
             shop/web  NodePort 30080/TCP: not yet\n\
             -         node addresses: failed, and is tried again: no room\n"
        );
        let json = serde_json::to_value(&rows[1]).unwrap();
        assert_eq!((&json["service"], &json["not_served"]), (&"web".into(), &"NodePort 30080/TCP: not yet".into()));
    }

    #[test]
    fn a_file_that_an_agent_left_behind_is_told_from_one_that_is_kept() {
        let (said, at) = (Said { synced: true, entries: Vec::new() }, SystemTime::UNIX_EPOCH);
        let note = |read, runs| what_is_said(read, runs, at + Duration::from_secs(7)).1.unwrap_or_default();
        assert_eq!(note(Ok(Some((said.clone(), at))), true), "");
        assert!(note(Ok(Some((said, at))), false).ends_with("what the last one said 7 s ago"));
        assert!(note(Ok(Some((Said::default(), at))), true).ends_with("has not yet seen to every Service"));
        assert!(note(Ok(None), true).contains("its log says why"));
        assert!(note(Ok(None), false).contains("no agent is running"));
        assert!(note(Err(io::Error::other("no JSON")), true).ends_with("no JSON"));
    }

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
        let port = Port { cluster: Run::new(5, 2, 0), policy: Policy::new(Policy::EXTERNAL_LOCAL, 60), ..Port::UNUSED };
        maps.ports.insert(3, Port { local: Run::empty(RunVerdict::Drop, 0), ..port });
        let tuple = Tuple { addr: "10.96.0.1".parse().unwrap(), port: 80, protocol: Protocol::Tcp };
        maps.services.insert(tuple, Service::new(3, Class::ClusterIp));
        let node_port = Tuple::node_port(IpFamily::V4, 30_080, Protocol::Tcp);
        maps.services.insert(node_port, Service::new(3, Class::NodePort));
        let balancer = Tuple { addr: "198.51.100.1".parse().unwrap(), ..tuple };
        let guarded = Service { flags: Service::SOURCE_RANGES, ..Service::new(3, Class::LoadBalancer) };
        maps.services.insert(balancer, guarded);
        let ranges = [(2, "192.0.2.0/24"), (3, "10.0.0.0/8"), (3, "fd00::/8"), (4, "192.0.2.0/24")];
        maps.source_ranges = ranges.map(|(id, net)| (id, net.parse().unwrap())).into();
        let stats = BTreeMap::from([(3, PortStats { new_flows: 7, refused: 1 })]);

        let lines: Vec<String> = rows(&maps, &stats).iter().map(|row| row.cells().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "default/web http 10.96.0.1:80/TCP ClusterIP Cluster 2 7 1",
                "default/web http 198.51.100.1:80/TCP LoadBalancer Local 0 (drop) 7 1",
                "default/web http *:30080/TCP NodePort Local 0 (drop) 7 1",
            ]
        );
        let wide: Vec<String> = rows(&maps, &stats).iter().map(|row| row.wide().join(" ")).collect();
        assert_eq!(wide, ["60s - 3", "60s 10.0.0.0/8,fd00::/8 3", "60s - 3"]);
    }
}
