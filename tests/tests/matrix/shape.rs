//! The shapes: what becomes of two nodes until they look as some CNI leaves them.

use std::any::Any;

use anyhow::Result;
use fairlead_lab::{LabConfig, Netfilter, Shape};
use fairlead_tests::nodes::Nodes;

use crate::tracked;

mod filter;
mod foreign;
mod overlay;
mod plugins;
mod uplinks;

pub(crate) use filter::{policed, refused_by_policy};
pub(crate) use plugins::host_ports_answer;
pub(crate) use uplinks::second;

/// How pods are wired, and their nodes to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wiring {
    /// A veth and a host route for each pod, as Calico has it; nodes route to each other.
    Routed,
    /// Ports of a bridge, whose packets netfilter does not see.
    Bridge,
    /// Ports of a bridge, whose packets pass netfilter.
    BridgeNf,
    /// The `bridge` plugin with its masquerade, `host-local` and `portmap`.
    PluginBridge,
    /// The `ptp` plugin with its masquerade, `host-local` and `portmap`.
    PluginPtp,
    /// flannel: a bridge, VXLAN to the other node, and flannel's rules.
    Vxlan,
    /// Calico: routed, and VXLAN to the other node.
    RoutedVxlan,
    /// A device without Ethernet to the other node.
    Tun,
    /// Pods use a second uplink, as on AWS.
    TwoUplinks,
    /// A stateful policy program on each pod's device, by tcx.
    ForeignTcx,
    /// The same by clsact.
    ForeignClsact,
}

/// What netfilter does in the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    /// Nothing.
    None,
    /// Tracks connections.
    Conntrack,
    /// Drops packets of state INVALID.
    InvalidDrop,
    /// Forwards between a client and an endpoint that a policy allows, by their addresses, and nothing else.
    Policy,
}

impl Filter {
    pub(crate) const ALL: [Self; 4] = [Self::None, Self::Conntrack, Self::InvalidDrop, Self::Policy];

    /// As its tests are named.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Conntrack => "conntrack",
            Self::InvalidDrop => "invalid_drop",
            Self::Policy => "policy",
        }
    }
}

/// One test's nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Topology {
    /// Its test's name.
    pub(crate) name: &'static str,
    pub(crate) wiring: Wiring,
    pub(crate) filter: Filter,
}

/// The wiring of a shape's name.
pub(crate) fn wiring(shape: &str) -> Wiring {
    let found = crate::SHAPES.iter().find(|(name, _)| *name == shape);
    found.map_or_else(|| panic!("no shape is called {shape}"), |(_, wiring)| *wiring)
}

/// What a shape has beside namespaces and rules: threads, links. It goes before the nodes do.
pub(crate) type Parts = Vec<Box<dyn Any + Send>>;

impl Topology {
    fn config(&self) -> LabConfig {
        let shape = match self.wiring {
            Wiring::Bridge => Shape::Bridge { br_netfilter: false },
            Wiring::BridgeNf | Wiring::Vxlan | Wiring::ForeignClsact => Shape::Bridge { br_netfilter: true },
            Wiring::PluginBridge | Wiring::PluginPtp => Shape::Unwired,
            Wiring::Routed | Wiring::RoutedVxlan | Wiring::Tun | Wiring::TwoUplinks | Wiring::ForeignTcx => {
                Shape::Routed
            }
        };
        let netfilter = match self.filter {
            Filter::None => Netfilter::None,
            Filter::Conntrack | Filter::Policy => Netfilter::Conntrack,
            Filter::InvalidDrop => Netfilter::InvalidDrop,
        };
        // A second pod that no policy allows anything.
        let config = LabConfig { pods: 2, switch: true, ..LabConfig::new(shape, netfilter) };
        match self.wiring {
            // Requests and replies may pass different uplinks: AWS sets this too.
            Wiring::TwoUplinks => LabConfig { rp_filter: 2, ..config },
            _ => config,
        }
    }

    /// Builds the nodes, with servers in place.
    pub(crate) fn build(&self) -> Result<(Parts, Nodes)> {
        let mut nodes = Nodes::new(self.config())?;
        if self.filter != Filter::None {
            nodes.labs.iter().try_for_each(|lab| tracked::remember(&lab.node.ns))?;
        }
        let mut parts = Parts::new();
        match self.wiring {
            Wiring::Routed | Wiring::Bridge | Wiring::BridgeNf => {}
            Wiring::PluginBridge => plugins::wire(&mut nodes, plugins::bridge)?,
            Wiring::PluginPtp => plugins::wire(&mut nodes, plugins::ptp)?,
            Wiring::Vxlan => overlay::flannel(&nodes)?,
            Wiring::RoutedVxlan => overlay::calico(&nodes)?,
            Wiring::Tun => parts.push(Box::new(overlay::tun(&nodes)?)),
            Wiring::TwoUplinks => uplinks::wire(&nodes)?,
            Wiring::ForeignTcx => parts.push(Box::new(foreign::tcx(&nodes)?)),
            Wiring::ForeignClsact => parts.push(Box::new(foreign::clsact(&nodes)?)),
        }
        nodes.serve()?;
        nodes.everybody_reaches_every_server()?;
        if self.filter == Filter::Policy {
            filter::police(&nodes)?;
        }
        Ok((parts, nodes))
    }

    /// Further arguments that the agents need for this shape.
    pub(crate) const fn agent_args(&self) -> &'static [&'static str] {
        match self.wiring {
            Wiring::TwoUplinks => &["--reply-mark=0x1000"],
            _ => &[],
        }
    }
}
