//! Which of the node's addresses answer NodePorts: kube-proxy's rules 85, 86 and 140.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proxy_common::abi::NodeAddr;

use crate::index::Index;

/// What decides it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodePorts {
    /// The bits of the addresses, as the flags have it.
    Given,
    /// The same, where there is a Node that decides other things: its zone which endpoints are near (rule 57), its IPs who
    /// may use a load balancer's addresses (rule 21).
    GivenBesideNode,
    /// The node's IPs, as its Node object has them.
    OfNode,
    /// The same, and the bits while there is no Node: manifests need not have one.
    #[default]
    OfNodeOrGiven,
}

/// Where the answer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// From the bits.
    Given,
    /// From these IPs of the Node; none if it is not known, or has none.
    Node(Vec<IpAddr>),
}

impl NodePorts {
    /// Where the answer comes from now.
    pub fn answer(self, index: &Index) -> Answer {
        match (self, index.node()) {
            (Self::Given | Self::GivenBesideNode, _) | (Self::OfNodeOrGiven, None) => Answer::Given,
            (_, node) => Answer::Node(node.map(|node| node.addresses.clone()).unwrap_or_default()),
        }
    }

    /// True while the Node should still tell.
    pub fn waits(self, index: &Index) -> bool {
        match self {
            Self::Given | Self::OfNodeOrGiven => false,
            Self::GivenBesideNode => index.node().is_none(),
            Self::OfNode => index.node().is_none_or(|node| node.addresses.is_empty()),
        }
    }
}

impl Answer {
    /// The node's addresses with their bits.
    pub fn apply(&self, addrs: &BTreeMap<IpAddr, u32>) -> BTreeMap<IpAddr, u32> {
        let Self::Node(ips) = self else { return addrs.clone() };
        let bits = |addr: &IpAddr, bits: &u32| {
            if is_primary(*addr, ips) { bits | NodeAddr::NODE_PORTS } else { bits & !NodeAddr::NODE_PORTS }
        };
        addrs.iter().map(|(addr, old)| (*addr, bits(addr, old))).collect()
    }
}

/// True if the address is one of `primary`. A family of which none is known answers at all of its addresses (rule 86).
pub fn is_primary(addr: IpAddr, primary: &[IpAddr]) -> bool {
    !primary.iter().any(|other| other.is_ipv4() == addr.is_ipv4()) && !mutant!("rule-86-primary")
        || primary.contains(&addr)
        || mutant!("rule-85-node")
}
