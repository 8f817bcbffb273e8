//! Entries of /proc/sys that decide whether translated packets reach anybody. Nothing is changed.

use std::fs;

use super::{Report, Weight};
use crate::devices::desired::Desired;

/// The range that the API server allocates NodePorts from by default.
const NODE_PORTS: (u16, u16) = (30_000, 32_767);

pub(super) fn check(report: &mut Report, devices: Option<&Desired>) {
    forwarding(report);
    port_range(report);
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

fn port_range(report: &mut Report) {
    let range = read("net/ipv4/ip_local_port_range").and_then(|text| parse_range(&text));
    let reserved = read("net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    match range {
        Some((low, high)) if low <= NODE_PORTS.1 && high >= NODE_PORTS.0 && reserved.is_empty() => report.add(
            Weight::Note,
            format!(
                "local ports {low}-{high} overlap NodePorts 30000-32767: the node's own connections may take one; \
                     reserve them (net.ipv4.ip_local_reserved_ports=30000-32767)"
            ),
        ),
        Some((low, high)) => {
            report.add(Weight::Ok, format!("local ports {low}-{high}, reserved: {}", or_none(&reserved)));
        }
        None => {}
    }
}

fn parse_range(text: &str) -> Option<(u16, u16)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_range_is_two_numbers() {
        assert_eq!(parse_range("32768\t60999"), Some((32_768, 60_999)));
        assert_eq!(parse_range("32768"), None);
    }
}
