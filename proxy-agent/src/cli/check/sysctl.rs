//! Entries of /proc/sys that decide whether translated packets reach anybody, and what an agent has set. Nothing is
//! changed.

use std::fs;

use proxy_common::abi::Role;

use super::{Report, Weight};
use crate::dataplane::pin::PinRoot;
use crate::devices::desired::Desired;
use crate::source_ports::{ENOUGH, NODE_PORTS, RESERVED, SourcePorts, span_text};
use crate::sysctl::Sysctls;

pub(super) fn check(report: &mut Report, pins: &PinRoot, devices: Option<&Desired>) {
    forwarding(report);
    match Sysctls::of(pins) {
        Ok(sysctls) => {
            ports(report, &sysctls);
            let served = devices.is_some_and(|d| d.devices.values().any(|d| d.role == Role::Loopback));
            if served && !sysctls.accepts_local() {
                let text = "net.ipv4.conf.lo.accept_local is 0: set at the start, unless --manage-sysctls=false, so that \
                            processes of the node reach NodePorts of its own IPv4 addresses";
                report.add(Weight::Note, text.to_owned());
            }
        }
        Err(error) => report.add(Weight::Note, format!("cannot identify the network namespace: {error}")),
    }
    bridges(report);
    for device in devices.into_iter().flat_map(|d| d.devices.values()).filter(|d| d.programs) {
        reverse_path(report, &device.name);
    }
}

fn read(entry: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/{entry}")).ok().map(|text| text.trim().to_owned())
}

fn forwarding(report: &mut Report) {
    for (entry, family) in [("net/ipv4/ip_forward", "IPv4"), ("net/ipv6/conf/all/forwarding", "IPv6")] {
        match read(entry).as_deref() {
            Some("0") => {
                let remedy = format!("sysctl -w {}=1", entry.replace('/', "."));
                report.add(
                    Weight::Note,
                    format!("{family} is not forwarded: nobody but the node reaches pods ({remedy})"),
                );
            }
            Some(_) => report.add(Weight::Ok, format!("{family} is forwarded")),
            None => {}
        }
    }
}

fn ports(report: &mut Report, sysctls: &Sysctls) {
    let (range, reserved) = sysctls.local_ports();
    let meets = *range.start() <= *NODE_PORTS.end() && *range.end() >= *NODE_PORTS.start();
    if meets && !reserved.holds(&NODE_PORTS) {
        report.add(
            Weight::Note,
            format!(
                "local ports {} overlap NodePorts {}: the node's own connections may take one; reserve them \
                 (net.ipv4.ip_local_reserved_ports)",
                span_text(&range),
                span_text(&NODE_PORTS)
            ),
        );
    }
    let reserved_text = reserved.to_string();
    let reserved_text = if reserved_text.is_empty() { "none" } else { &reserved_text };
    report.add(Weight::Ok, format!("local ports {}, reserved: {reserved_text}", span_text(&range)));
    let free = SourcePorts::free(&range, &reserved, &NODE_PORTS);
    let text = format!("masquerade has {} source ports: {free}", free.count());
    if free.count() < ENOUGH {
        let remedy = format!("{} are reserved at the start, unless --manage-sysctls=false", span_text(&RESERVED));
        report.add(Weight::Note, format!("{text}; {remedy}"));
    } else {
        report.add(Weight::Ok, text);
    }
    match sysctls.set() {
        Ok(set) => set.iter().for_each(|set| {
            let (name, change) = (set.name(), set.change());
            let text = format!("{name} was set by Fairlead: {change}, `fairlead cleanup` restores it");
            report.add(Weight::Note, text);
        }),
        Err(error) => report.add(Weight::Note, format!("cannot read {}: {error}", sysctls.record().display())),
    }
}

fn bridges(report: &mut Report) {
    let calls = ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"].map(read);
    let text = match calls {
        [None, None] => "bridged packets do not pass netfilter (br_netfilter is not loaded)".to_owned(),
        [v4, v6] => {
            let passes = |value: Option<String>| if value.as_deref() == Some("1") { "pass" } else { "do not pass" };
            format!("bridged packets: IPv4 {} and IPv6 {} netfilter", passes(v4), passes(v6))
        }
    };
    report.add(Weight::Ok, format!("{text}; Fairlead works either way"));
}

fn reverse_path(report: &mut Report, device: &str) {
    let value = |name: &str| read(&format!("net/ipv4/conf/{name}/rp_filter")).and_then(|v| v.parse::<u8>().ok());
    // The kernel takes the larger of the two.
    let effective = value("all").unwrap_or(0).max(value(device).unwrap_or(0));
    if effective == 1 {
        report.add(
            Weight::Note,
            format!("rp_filter is strict on {device}: replies that come back by another device are dropped"),
        );
    }
}
