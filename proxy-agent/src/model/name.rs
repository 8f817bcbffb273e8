//! Names of things: Services, their ports, families and protocols.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use proxy_common::abi;
use proxy_common::algo::timeout::{SCTP, TCP, UDP};

/// `namespace/name` of a Service or EndpointSlice, or the name of something that is in no namespace. Cheap to clone: an
/// index holds each several times.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// One allocation for both parts; neither can contain a slash.
    joined: Arc<str>,
}

/// A part of a name that Kubernetes would not accept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is no name: 1 to {max} letters, digits, '-' or '.', beginning and ending with a letter or digit")]
pub struct NameError {
    part: String,
    max: usize,
}

impl ObjectName {
    /// Longest part of a Service's name, a DNS label.
    pub const MAX_LABEL: usize = 63;

    /// Joins the two parts. They are not checked here: see [`Self::checked`].
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { joined: Arc::from(format!("{namespace}/{name}")) }
    }

    /// Joins the two parts if each could be an object's name of at most `max` bytes.
    pub fn checked(namespace: &str, name: &str, max: usize) -> Result<Self, NameError> {
        check_part(namespace, Self::MAX_LABEL)?;
        check_part(name, max)?;
        Ok(Self::new(namespace, name))
    }

    /// The same for an object that is in no namespace.
    pub fn checked_cluster_wide(name: &str, max: usize) -> Result<Self, NameError> {
        check_part(name, max)?;
        Ok(Self::new("", name))
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.joined.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The name within the namespace.
    pub fn name(&self) -> &str {
        self.joined.split_once('/').map_or(&self.joined, |(_, name)| name)
    }

    /// `namespace/name`.
    pub fn as_str(&self) -> &str {
        &self.joined
    }
}

fn check_part(part: &str, max: usize) -> Result<(), NameError> {
    let bytes = part.as_bytes();
    let inner = bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    let ends = [bytes.first(), bytes.last()].into_iter().all(|b| b.is_some_and(u8::is_ascii_alphanumeric));
    if inner && ends && bytes.len() <= max { Ok(()) } else { Err(NameError { part: part.to_owned(), max }) }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.joined.trim_start_matches('/'))
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.joined)
    }
}

/// An address family at run time; `proxy_common::Family` is the same thing as a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both families.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub const fn of(addr: &IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The all-zero address, under which NodePorts stand.
    pub const fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        }
    }

    /// 4 or 6, as `NAMES` has it.
    pub const fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

impl fmt::Display for IpFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IPv{}", self.number())
    }
}

/// Some of the families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    /// None.
    pub const NONE: Self = Self { v4: false, v6: false };
    /// Both.
    pub const BOTH: Self = Self { v4: true, v6: true };

    /// One.
    pub const fn one(family: IpFamily) -> Self {
        Self { v4: matches!(family, IpFamily::V4), v6: matches!(family, IpFamily::V6) }
    }

    /// Those of either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self { v4: self.v4 || other.v4, v6: self.v6 || other.v6 }
    }

    /// Those of this that are not in the other.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self { v4: self.v4 && !other.v4, v6: self.v6 && !other.v6 }
    }

    /// True if the family is one of them.
    pub const fn has(self, family: IpFamily) -> bool {
        match family {
            IpFamily::V4 => self.v4,
            IpFamily::V6 => self.v6,
        }
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = IpFamily> {
        IpFamily::ALL.into_iter().filter(move |family| self.has(*family))
    }
}

/// A protocol that a Service port may have (rule 16).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    /// TCP, the default.
    Tcp = TCP,
    /// UDP.
    Udp = UDP,
    /// SCTP.
    Sctp = SCTP,
}

impl Protocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The protocol with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            TCP => Some(Self::Tcp),
            UDP => Some(Self::Udp),
            SCTP => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The protocol of this name, spelled as Kubernetes spells it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" if !mutant!("rule-16") => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// What has a port id of its own: a Service's port by name, protocol (rule 12) and family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// The Service.
    pub service: ObjectName,
    /// Name of the port; empty if it has none.
    pub port: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The family of its addresses and endpoints.
    pub family: IpFamily,
}

impl PortKey {
    /// The value that `NAMES` holds for it.
    pub fn to_name(&self) -> abi::Name {
        abi::Name::new(&format!("{}:{}", self.service, self.port), self.protocol.number(), self.family.number())
    }

    /// Reads a value of `NAMES` back; `None` if it names no port.
    pub fn from_name(name: &abi::Name) -> Option<Self> {
        let (service, port) = name.as_str().rsplit_once(':')?;
        let (namespace, service) = service.split_once('/')?;
        let family = IpFamily::ALL.into_iter().find(|family| family.number() == name.family)?;
        Some(Self {
            service: ObjectName::new(namespace, service),
            port: Arc::from(port),
            protocol: Protocol::from_number(name.proto)?,
            family,
        })
    }
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{} {}", self.service, self.port, self.protocol, self.family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_key_survives_the_names_map() {
        for (port, protocol, family) in [
            ("", Protocol::Tcp, IpFamily::V4),
            ("dns", Protocol::Udp, IpFamily::V6),
            ("x", Protocol::Sctp, IpFamily::V4),
        ] {
            let key = PortKey { service: ObjectName::new("ns", "web"), port: port.into(), protocol, family };
            assert_eq!(PortKey::from_name(&key.to_name()), Some(key));
        }
    }

    #[test]
    fn a_foreign_name_is_no_port_key() {
        for (text, proto, family) in
            [("", 6, 4), ("web:http", 6, 4), ("ns/web", 6, 4), ("ns/web:a", 1, 4), ("ns/web:a", 6, 5)]
        {
            assert_eq!(PortKey::from_name(&abi::Name::new(text, proto, family)), None, "{text} {proto} {family}");
        }
    }

    #[test]
    fn names_are_checked() {
        assert_eq!(ObjectName::checked("default", "web-1", 63).unwrap().to_string(), "default/web-1");
        for bad in ["", "-a", "a-", "a/b", "a b", "a:b", &"x".repeat(64)] {
            assert!(ObjectName::checked("default", bad, 63).is_err(), "{bad:?} passed");
            assert!(ObjectName::checked(bad, "web", 63).is_err(), "{bad:?} passed");
        }
    }
}
