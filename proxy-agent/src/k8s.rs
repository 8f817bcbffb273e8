//! From Kubernetes' own types to the model: pure functions, one file per kind of object, and the watch.
//!
//! An object that makes no sense is an error; a part that can be left out is a [`Warning`], and the rest is used.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

mod backoff;
mod client;
pub mod endpoint_slice;
pub mod endpoints;
pub mod events;
mod failure;
pub mod manifest;
pub mod node;
mod reflect;
pub mod service;
pub mod service_cidr;
mod text;
pub mod watch;

/// Names of the labels that the proxy reads (rules 1, 2, 8, 57).
pub mod labels {
    /// On a Service: another proxy serves it.
    pub const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
    /// On an EndpointSlice: its Service is headless.
    pub const HEADLESS: &str = "service.kubernetes.io/headless";
    /// On an EndpointSlice: the Service it belongs to.
    pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
    /// On a Node: the zone it stands in.
    pub const ZONE: &str = "topology.kubernetes.io/zone";
}

/// The annotation in which the controllers say what an EndpointSlice follows from (rule 135).
pub const LAST_CHANGE_TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// A part of an object that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Path of the field.
    pub field: String,
    /// What is wrong, and what to do.
    pub problem: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; left out", self.field, self.problem)
    }
}

/// An object as decoded. `None` for one that is not for this proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded<T> {
    /// The object.
    pub object: Option<T>,
    /// What was left out of it.
    pub warnings: Vec<Warning>,
}

impl<T> Decoded<T> {
    /// Not for this proxy.
    pub(crate) const fn skipped() -> Self {
        Self { object: None, warnings: Vec::new() }
    }
}

/// Text that is no address a packet could have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not an address.
    #[error("{0:?} is no IP address; write it like 10.96.0.10 or fd00::10")]
    Invalid(String),
    /// An address that nobody can be reached at.
    #[error("{addr} is {what}; give an address that packets can be sent to")]
    Unusable {
        /// The address.
        addr: IpAddr,
        /// What it is instead.
        what: &'static str,
    },
}

/// Reads an address as Kubernetes does: leading zeros are decimal (rule 41), an IPv4 address within IPv6 is IPv4.
pub fn parse_address(text: &str) -> Result<IpAddr, AddressError> {
    let parsed = text.parse::<IpAddr>().ok().map(|addr| addr.to_canonical());
    parsed
        .or_else(|| with_leading_zeros(text).filter(|_| !mutant!("rule-41-zeros")))
        .ok_or_else(|| AddressError::Invalid(text.to_owned()))
}

/// The same, and not one of those that no Service or endpoint can have.
pub fn parse_usable_address(text: &str) -> Result<IpAddr, AddressError> {
    let addr = parse_address(text)?;
    let what = match addr {
        _ if addr.is_unspecified() => "the unspecified address",
        _ if addr.is_loopback() => "a loopback address",
        _ if addr.is_multicast() => "a multicast address",
        IpAddr::V4(Ipv4Addr::BROADCAST) => "the broadcast address",
        _ => return Ok(addr),
    };
    Err(AddressError::Unusable { addr, what })
}

/// Text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network; write it like 192.0.2.0/24 or 2001:db8::/32")]
pub struct NetworkError(String);

/// Reads a network as Kubernetes does: leading zeros are decimal, and bits behind the prefix do not count (rule 41).
pub fn parse_network(text: &str) -> Result<IpNet, NetworkError> {
    let bad = || NetworkError(text.to_owned());
    let (addr, prefix) = text.split_once('/').ok_or_else(bad)?;
    let mapped = addr.contains(':');
    let addr = parse_address(addr).map_err(|_| bad())?;
    // A network of IPv4 written as one of IPv6 belongs to neither family.
    let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
    if !digits || (mapped && addr.is_ipv4()) {
        return Err(bad());
    }
    let prefix = prefix.parse().map_err(|_| bad())?;
    Ok(IpNet::new(addr, prefix).map_err(|_| bad())?.trunc())
}

fn with_leading_zeros(text: &str) -> Option<IpAddr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next().filter(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))?;
        *octet = part
            .trim_start_matches('0')
            .parse()
            .or_else(|e| if part.bytes().all(|b| b == b'0') { Ok(0) } else { Err(e) })
            .ok()?;
    }
    parts.next().is_none().then_some(IpAddr::from(octets))
}

/// A port as Kubernetes has it: 1 to 65535.
pub(crate) fn parse_port(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// What is wrong with a port's name, if anything: it becomes part of a key.
pub(crate) fn check_port_name(name: &str) -> Result<(), String> {
    let fits = name.len() <= 63 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if fits { Ok(()) } else { Err(format!("{name:?} is no port name: up to 63 letters, digits or '-'")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_41_leading_zeros_are_decimal() {
        for (text, addr) in [
            ("10.180.00.001", "10.180.0.1"),
            ("010.096.000.010", "10.96.0.10"),
            ("192.168.1.2", "192.168.1.2"),
            ("000.0.0.0001", "0.0.0.1"),
            ("FD00:0:0::0010", "fd00::10"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
        ] {
            assert_eq!(parse_address(text).map(|a| a.to_string()).as_deref(), Ok(addr), "{text}");
        }
    }

    #[test]
    fn rule_41_networks_are_read_as_sloppily() {
        for (text, net) in [
            ("203.0.113.0/25", "203.0.113.0/25"),
            ("203.0.113.9/25", "203.0.113.0/25"),
            ("010.00.000.001/08", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:DB8::1/32", "2001:db8::/32"),
        ] {
            assert_eq!(parse_network(text).map(|n| n.to_string()).as_deref(), Ok(net), "{text}");
        }
        for text in
            ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0.0/8/8", "x/8", "::ffff:10.0.0.0/104"]
        {
            assert_eq!(parse_network(text), Err(NetworkError(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "10.0.0", "10.0.0.0.1", "10.0.0.256", "10.0.0.+1", "10..0.1", "web", "10.0.0.1:80", "fd00:::1"]
        {
            assert_eq!(parse_address(text), Err(AddressError::Invalid(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_nobody_can_be_reached_at_is_refused() {
        for text in ["0.0.0.0", "::", "127.0.0.1", "::1", "224.0.0.1", "ff02::1", "255.255.255.255"] {
            assert!(matches!(parse_usable_address(text), Err(AddressError::Unusable { .. })), "{text}");
        }
    }
}
