//! Who asks.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use fairlead_lab::{Ask, Host, Namespace, Proto};

/// A namespace and, where it has several addresses, one of them for each family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client<'a> {
    pub(crate) ns: &'a Namespace,
    pub(crate) at: Option<[IpAddr; 2]>,
}

impl Client<'_> {
    /// A question of this client.
    pub(crate) fn ask(&self, proto: Proto, to: SocketAddr) -> Ask {
        let ask = Ask::new(proto, to);
        self.at.map_or(ask, |ips| ask.from(SocketAddr::new(ips[usize::from(to.is_ipv6())], 0)))
    }
}

impl<'a> From<&'a Namespace> for Client<'a> {
    fn from(ns: &'a Namespace) -> Self {
        Self { ns, at: None }
    }
}

impl<'a> From<&'a Host> for Client<'a> {
    fn from(host: &'a Host) -> Self {
        Self { ns: &host.ns, at: None }
    }
}

impl fmt::Display for Client<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.ns.name())?;
        self.at.map_or(Ok(()), |[v4, v6]| write!(f, " at {v4} or {v6}"))
    }
}
