//! What the node's connection tracking shows.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

use crate::{netns::Namespace, wire::Proto};

/// One direction of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Transport.
    pub proto: Proto,
    /// TCP's state; empty for UDP.
    pub state: String,
    /// As the flow began.
    pub original: Tuple,
    /// As its answers are expected.
    pub reply: Tuple,
    /// Traffic was seen in both directions, and the entry is kept under pressure.
    pub assured: bool,
    /// No answer was seen.
    pub unreplied: bool,
}

/// Every TCP and UDP entry of a namespace.
pub fn list(ns: &Namespace) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for family in ["ipv4", "ipv6"] {
        let listing = ns.output("conntrack", &["-L", "-f", family])?;
        entries.extend(listing.lines().filter_map(parse));
    }
    Ok(entries)
}

/// Packets that conntrack could not place: its `invalid` counters, over all CPUs.
pub fn invalid(ns: &Namespace) -> Result<u64> {
    let mut sum = 0;
    for line in ns.output("conntrack", &["-S"])?.lines() {
        for word in line.split_ascii_whitespace() {
            if let Some(count) = word.strip_prefix("invalid=") {
                sum += count.parse::<u64>().with_context(|| format!("conntrack -S: {line}"))?;
            }
        }
    }
    Ok(sum)
}

/// One line of `conntrack -L`.
fn parse(line: &str) -> Option<Entry> {
    let mut words = line.split_ascii_whitespace();
    let proto = match words.next()? {
        "tcp" => Proto::Tcp,
        "udp" => Proto::Udp,
        _ => return None,
    };
    let state = if proto == Proto::Tcp { words.nth(2)? } else { "" };
    let values = |key: &str| -> Vec<&str> {
        line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).collect()
    };
    let (src, dst, sport, dport) = (values("src"), values("dst"), values("sport"), values("dport"));
    let tuple = |n: usize| {
        let socket = |addrs: &[&str], ports: &[&str]| {
            Some(SocketAddr::new(addrs.get(n)?.parse::<IpAddr>().ok()?, ports.get(n)?.parse().ok()?))
        };
        Some(Tuple { src: socket(&src, &sport)?, dst: socket(&dst, &dport)? })
    };
    Some(Entry {
        proto,
        state: state.to_owned(),
        original: tuple(0)?,
        reply: tuple(1)?,
        assured: line.contains("[ASSURED]"),
        unreplied: line.contains("[UNREPLIED]"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_families_are_read() {
        let entry = parse(
            "tcp      6 431999 ESTABLISHED src=10.244.1.9 dst=10.244.1.10 sport=4000 dport=80 src=10.244.1.10 \
             dst=10.244.1.9 sport=80 dport=4000 [ASSURED] mark=0 use=1",
        )
        .unwrap();
        assert_eq!((&*entry.state, entry.assured, entry.unreplied), ("ESTABLISHED", true, false));
        assert_eq!(entry.original.src, "10.244.1.9:4000".parse().unwrap());
        assert_eq!(entry.reply.dst, "10.244.1.9:4000".parse().unwrap());
        let entry = parse(
            "udp      17 29 src=fd00::1 dst=fd00::2 sport=5 dport=53 [UNREPLIED] src=fd00::2 dst=fd00::1 sport=53 \
             dport=5 mark=0 use=1",
        )
        .unwrap();
        assert_eq!((entry.proto, entry.unreplied), (Proto::Udp, true));
        assert_eq!(entry.original.dst, "[fd00::2]:53".parse().unwrap());
        assert_eq!(parse("icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=1"), None);
    }
}
