//! Maps as text that reads like the Services they come from. Ids are left out unless asked for, so that two ways to the
//! same state render alike.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use proxy_common::abi::{Class, NodeAddr, Policy, Port, Run, RunVerdict, Service, filter};
use proxy_common::{Addr4, Addr6};

use super::{Slot, Snapshot, Tuple};
use crate::model::{IpFamily, PortKey};

/// What to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Port ids, endpoint ids, generations and slot numbers.
    pub ids: bool,
}

/// The whole of the maps as text.
pub fn render(maps: &Snapshot, options: Options) -> String {
    let mut out = Renderer { maps, options, text: String::new() };
    out.services();
    out.lists();
    out.faults();
    out.text
}

/// What in the maps contradicts itself. Empty for a sound state.
pub fn inconsistencies(maps: &Snapshot) -> Vec<String> {
    let mut found = Vec::new();
    for (tuple, service) in &maps.services {
        if !maps.names.contains_key(&service.port_id) {
            found.push(format!("{tuple} leads to port id {}, which has no name", service.port_id));
        }
        if !tuple.addr.is_unspecified() && !has_bit(maps, &tuple.addr, filter::SERVICE) {
            found.push(format!("FILTER does not know the Service address {}", tuple.addr));
        }
    }
    for (tuple, service) in maps.services.iter().filter(|(_, service)| service.flags & Service::SOURCE_RANGES != 0) {
        if maps.ranges_of(service.port_id).next().is_none() {
            found.push(format!("{tuple} asks for source ranges and has none"));
        }
    }
    for (id, net) in maps.source_ranges.iter().filter(|(id, _)| !maps.names.contains_key(id)) {
        found.push(format!("the source range {net} belongs to port id {id}, which has no name"));
    }
    for addr in &maps.cluster_ips {
        if !has_bit(maps, addr, filter::SERVICE) {
            found.push(format!("FILTER does not know the ClusterIP {addr}"));
        }
    }
    for addr in maps.node_addrs.keys() {
        if !has_bit(maps, addr, filter::NODE) {
            found.push(format!("FILTER does not know the node's address {addr}"));
        }
    }
    // What no key leads to may be the half of a change that failed.
    let used: BTreeSet<_> = maps.services.values().map(|service| service.port_id).collect();
    for (id, key) in maps.names.iter().filter(|(id, _)| used.contains(id)) {
        for run in current_runs(maps, *id) {
            found.extend(
                slots_of(maps, key.family, run).filter_map(|(index, slot)| wrong_slot(maps, key, *id, index, slot)),
            );
        }
    }
    found
}

fn wrong_slot(maps: &Snapshot, key: &PortKey, id: u32, index: u32, slot: Option<&Slot>) -> Option<String> {
    let Some(slot) = slot.filter(|slot| slot.owner == id) else {
        return Some(format!("slot {index} of {key} belongs to {:?}", slot.map(|slot| slot.owner)));
    };
    let live = maps.live.get(&slot.endpoint_id).copied().unwrap_or(0);
    if live != slot.endpoint_gen {
        return Some(format!("slot {index} of {key} has generation {}, LIVE has {live}", slot.endpoint_gen));
    }
    (!has_bit(maps, &slot.addr, filter::ENDPOINT)).then(|| format!("FILTER does not know the endpoint {}", slot.addr))
}

fn current_runs(maps: &Snapshot, id: u32) -> [Run; 2] {
    let port = maps.ports.get(&id).copied().unwrap_or(Port::UNUSED);
    [port.cluster, port.local]
}

fn slots_of(maps: &Snapshot, family: IpFamily, run: Run) -> impl Iterator<Item = (u32, Option<&Slot>)> {
    let len = run.len();
    (run.base()..run.base().saturating_add(len)).map(move |index| (index, maps.slots(family).get(&index)))
}

/// The word and shift of an address in `FILTER`.
pub fn filter_bucket(addr: &IpAddr) -> (u32, u32) {
    match addr {
        IpAddr::V4(addr) => filter::bucket(&Addr4::from(*addr)),
        IpAddr::V6(addr) => filter::bucket(&Addr6::from(*addr)),
    }
}

fn has_bit(maps: &Snapshot, addr: &IpAddr, bit: u8) -> bool {
    let (word, shift) = filter_bucket(addr);
    filter::bits(maps.filter.get(&word).copied().unwrap_or(0), shift) & bit != 0
}

struct Renderer<'a> {
    maps: &'a Snapshot,
    options: Options,
    text: String,
}

impl Renderer<'_> {
    fn line(&mut self, indent: usize, text: &str) {
        // Writing to a String cannot fail.
        _ = writeln!(self.text, "{:indent$}{text}", "");
    }

    fn services(&mut self) {
        let mut addresses: BTreeMap<u32, Vec<&Tuple>> = BTreeMap::new();
        for (tuple, service) in &self.maps.services {
            addresses.entry(service.port_id).or_default().push(tuple);
        }
        let mut ports: Vec<_> = self.maps.names.iter().map(|(id, key)| (key, *id)).collect();
        ports.sort();
        let mut current = None;
        for (key, id) in ports {
            if current.replace(&key.service) != Some(&key.service) {
                self.line(0, &format!("Service {}", key.service));
            }
            self.port(key, id, addresses.get(&id).map_or(&[], Vec::as_slice));
        }
    }

    fn port(&mut self, key: &PortKey, id: u32, addresses: &[&Tuple]) {
        let maps = self.maps;
        let port = maps.ports.get(&id).copied().unwrap_or(Port::UNUSED);
        let name = if key.port.is_empty() { "(unnamed)" } else { &key.port };
        let ids = if self.options.ids { format!(" id {id}") } else { String::new() };
        let affinity = match port.policy.affinity_secs() {
            0 => String::new(),
            secs => format!(", affinity {secs} s"),
        };
        self.line(2, &format!("port {name} {} {}{affinity}{ids}", key.protocol, key.family));
        for tuple in addresses {
            let what = if tuple.addr.is_unspecified() {
                format!("NodePort {}", tuple.port)
            } else {
                let class = maps.services.get(*tuple).map_or(0, |service| service.class);
                format!("{} {}", class_name(class), std::net::SocketAddr::new(tuple.addr, tuple.port))
            };
            let runs = if self.takes_local(tuple, &port) { "local" } else { "cluster" };
            let guarded = maps.services.get(*tuple).is_some_and(|service| service.flags & Service::SOURCE_RANGES != 0);
            self.line(4, &format!("{what} -> {runs}{}", if guarded { ", from its source ranges only" } else { "" }));
        }
        let ranges: Vec<_> = maps.ranges_of(id).map(ToString::to_string).collect();
        if !ranges.is_empty() {
            self.line(4, &format!("source ranges: {}", ranges.join(", ")));
        }
        self.run(key, "cluster", port.cluster);
        self.run(key, "local", port.local);
        self.settled(key, "cluster", port.cluster_settled, port.policy.flags() & Policy::CLUSTER_MOVED != 0);
        self.settled(key, "local", port.local_settled, port.policy.flags() & Policy::LOCAL_MOVED != 0);
    }

    fn takes_local(&self, tuple: &Tuple, port: &Port) -> bool {
        let class = self.maps.services.get(tuple).map(|service| service.class);
        let flag = if class == Some(Class::ClusterIp as u8) { Policy::INTERNAL_LOCAL } else { Policy::EXTERNAL_LOCAL };
        port.policy.flags() & flag != 0
    }

    fn run(&mut self, key: &PortKey, name: &str, run: Run) {
        let ids =
            if self.options.ids { format!(" (base {}, gen {})", run.base(), run.generation()) } else { String::new() };
        if run.is_empty() {
            let verdict = match run.verdict() {
                RunVerdict::Reject => "reject",
                RunVerdict::Drop => "drop",
            };
            return self.line(4, &format!("{name}: none, {verdict}{ids}"));
        }
        self.line(4, &format!("{name}:{ids}"));
        let maps = self.maps;
        for (index, slot) in slots_of(maps, key.family, run) {
            let text = slot.map_or_else(|| format!("slot {index} was never written"), |slot| self.slot(slot));
            self.line(6, &text);
        }
    }

    fn slot(&self, slot: &Slot) -> String {
        let mut text = std::net::SocketAddr::new(slot.addr, slot.port).to_string();
        for (flag, name) in [(Slot::LOCAL, " local"), (Slot::TERMINATING, " terminating")] {
            if slot.flags & flag != 0 {
                text.push_str(name);
            }
        }
        if self.options.ids {
            _ = write!(text, " (id {}, gen {})", slot.endpoint_id, slot.endpoint_gen);
        }
        text
    }

    fn settled(&mut self, key: &PortKey, name: &str, run: Run, moved: bool) {
        if moved {
            self.line(4, &format!("{name} moved a short time ago"));
        }
        if !run.is_empty() {
            self.run(key, &format!("{name} before that"), run);
        }
    }

    fn lists(&mut self) {
        let cluster_ips: Vec<_> = self.maps.cluster_ips.iter().map(ToString::to_string).collect();
        let node_ports = self.maps.node_ports.iter().flat_map(|(index, bits)| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| (index * 64 + bit).to_string())
        });
        let node_ports: Vec<_> = node_ports.collect();
        let node_addrs: Vec<_> = self.maps.node_addrs.iter().map(|(addr, flags)| node_addr(addr, *flags)).collect();
        let cidrs: Vec<_> = self.maps.service_cidrs.iter().map(ToString::to_string).collect();
        let lists = [
            ("ClusterIPs", cluster_ips),
            ("ServiceCIDRs", cidrs),
            ("NodePorts", node_ports),
            ("node addresses", node_addrs),
        ];
        for (title, list) in lists {
            if !list.is_empty() {
                self.line(0, &format!("{title}: {}", list.join(", ")));
            }
        }
    }

    fn faults(&mut self) {
        for fault in inconsistencies(self.maps) {
            self.line(0, &format!("! {fault}"));
        }
    }
}

const fn class_name(class: u8) -> &'static str {
    match class {
        c if c == Class::ExternalIp as u8 => "external IP",
        c if c == Class::LoadBalancer as u8 => "load balancer",
        _ => "address",
    }
}

fn node_addr(addr: &IpAddr, flags: u32) -> String {
    let mut text = addr.to_string();
    for (flag, name) in [(NodeAddr::LOCAL, " local"), (NodeAddr::NODE_PORTS, " NodePorts")] {
        if flags & flag != 0 {
            text.push_str(name);
        }
    }
    text
}
