//! `fairlead endpoints`: who can be chosen, and by which Service port.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;

use proxy_common::abi::{Port, Run};
use serde::Serialize;

use super::{Row, pins, show, snapshot};
use crate::args::ShowArgs;
use crate::dataplane::{Slot, Snapshot};
use crate::model::PortKey;

#[derive(Debug, PartialEq, Eq, Serialize)]
struct EndpointRow {
    namespace: String,
    service: String,
    port_name: String,
    protocol: String,
    address: String,
    port: u16,
    /// On this node.
    local: bool,
    terminating: bool,
    /// Runs that hold it: cluster, local.
    runs: Vec<&'static str>,
    endpoint_id: u32,
    generation: u32,
}

impl Row for EndpointRow {
    const HEADER: &'static [&'static str] = &["ENDPOINT", "SERVICE", "PORT", "HERE", "TERMINATING", "RUNS"];

    fn cells(&self) -> Vec<String> {
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let address = match self.address.parse() {
            Ok(addr) => SocketAddr::new(addr, self.port).to_string(),
            Err(_) => self.address.clone(),
        };
        let name = if self.port_name.is_empty() { "-" } else { &self.port_name };
        vec![
            format!("{address}/{}", self.protocol),
            format!("{}/{}", self.namespace, self.service),
            name.to_owned(),
            yes(self.local),
            yes(self.terminating),
            self.runs.join(","),
        ]
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    show(&rows(&snapshot(&pins(args)?)?), args.output)
}

fn rows(maps: &Snapshot) -> Vec<EndpointRow> {
    let mut ports: Vec<_> = maps.names.iter().map(|(id, key)| (key, *id)).collect();
    ports.sort();
    ports.into_iter().flat_map(|(key, id)| port_rows(maps, key, id)).collect()
}

fn port_rows(maps: &Snapshot, key: &PortKey, id: u32) -> Vec<EndpointRow> {
    let port = maps.ports.get(&id).copied().unwrap_or(Port::UNUSED);
    let mut rows: BTreeMap<(std::net::IpAddr, u16), EndpointRow> = BTreeMap::new();
    for (name, run) in [("cluster", port.cluster), ("local", port.local)] {
        for slot in slots(maps, key, run).filter(|slot| slot.owner == id) {
            let row = rows.entry((slot.addr, slot.port)).or_insert_with(|| row(key, slot));
            // A run may name an endpoint more than once, to weigh it.
            if !row.runs.contains(&name) {
                row.runs.push(name);
            }
        }
    }
    rows.into_values().collect()
}

fn slots<'a>(maps: &'a Snapshot, key: &PortKey, run: Run) -> impl Iterator<Item = &'a Slot> {
    let end = if run.is_empty() { run.base() } else { run.base().saturating_add(run.len()) };
    maps.slots(key.family).range(run.base()..end).map(|(_, slot)| slot)
}

fn row(key: &PortKey, slot: &Slot) -> EndpointRow {
    EndpointRow {
        namespace: key.service.namespace().to_owned(),
        service: key.service.name().to_owned(),
        port_name: key.port.to_string(),
        protocol: key.protocol.to_string(),
        address: slot.addr.to_string(),
        port: slot.port,
        local: slot.flags & Slot::LOCAL != 0,
        terminating: slot.flags & Slot::TERMINATING != 0,
        runs: Vec::new(),
        endpoint_id: slot.endpoint_id,
        generation: slot.endpoint_gen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IpFamily, ObjectName, Protocol};

    #[test]
    fn an_endpoint_stands_once_with_its_runs() {
        let mut maps = Snapshot::default();
        let key = PortKey {
            service: ObjectName::new("default", "dns"),
            port: "".into(),
            protocol: Protocol::Udp,
            family: IpFamily::V6,
        };
        maps.names.insert(1, key);
        maps.ports.insert(1, Port { cluster: Run::new(0, 2, 0), local: Run::new(2, 1, 0), ..Port::UNUSED });
        let slot = |last: u16, flags, owner| Slot {
            addr: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).into(),
            port: 53,
            flags,
            endpoint_id: last.into(),
            endpoint_gen: 0,
            owner,
        };
        maps.slots_v6.insert(0, slot(1, Slot::LOCAL, 1));
        maps.slots_v6.insert(1, slot(2, Slot::TERMINATING, 1));
        maps.slots_v6.insert(2, slot(1, Slot::LOCAL, 1));
        maps.slots_v6.insert(3, slot(9, 0, 2));
        let lines: Vec<String> = rows(&maps).iter().map(|row| row.cells().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "[2001:db8::1]:53/UDP default/dns - yes no cluster,local",
                "[2001:db8::2]:53/UDP default/dns - no yes cluster"
            ]
        );
    }
}
