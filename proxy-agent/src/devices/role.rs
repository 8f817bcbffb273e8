//! Which programs a device gets, and why: its role, from kind, master, addresses and routes. Pure.

use std::borrow::Cow;
use std::net::IpAddr;

use proxy_common::abi::Role;

use super::inventory::{Address, Device, Framing, Inventory, Kind};
use super::select::{Selected, Selection};

/// A reason, for people.
pub type Why = Cow<'static, str>;

/// What is done with a device, and the rule that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Its role; none where it is left alone.
    pub role: Option<Role>,
    /// Why.
    pub why: Why,
}

impl Decision {
    /// True if the device carries programs: a bridge of pods does not, its ports do.
    pub const fn carries_programs(&self) -> bool {
        matches!(self.role, Some(Role::Uplink | Role::Pod | Role::BridgePort | Role::Tunnel | Role::Loopback))
    }
}

fn serve(role: Role, why: impl Into<Why>) -> Decision {
    Decision { role: Some(role), why: why.into() }
}

fn skip(why: impl Into<Why>) -> Decision {
    Decision { role: None, why: why.into() }
}

/// Decides on a device.
pub fn decide(inventory: &Inventory, device: &Device, selection: &Selection) -> Decision {
    let link = &device.link;
    let given = match selection.of(&link.name) {
        Selected::Not => return skip("not among --devices"),
        Selected::Given(None) => return skip("left alone by --devices"),
        _ if link.loopback => return serve(Role::Loopback, "the node's processes meet its own addresses here"),
        Selected::Given(role) => role,
        Selected::Found => None,
    };
    if link.framing == Framing::Other {
        return skip("its packets begin neither with an Ethernet nor with an IP header");
    }
    // Every namespace has a tunl0 and a sit0 once the kernel has their modules, and nobody uses most of them.
    if link.framing == Framing::Flat && !link.up {
        return skip("down: its programs are loaded when it comes up");
    }
    if let Some(role) = given {
        return serve(role, "given by --devices");
    }
    if link.name.starts_with("cilium_") {
        return skip("belongs to Cilium");
    }
    let by_master = if link.kind == Kind::Inert { None } else { by_master(inventory, device) };
    by_master.unwrap_or_else(|| by_kind(inventory, device))
}

/// The role of a member of a bridge or bond. A VRF changes routing only, and an unknown master nothing that we know.
fn by_master(inventory: &Inventory, device: &Device) -> Option<Decision> {
    let master = inventory.device(device.link.master?)?;
    let name = &master.link.name;
    match master.link.kind {
        // A program on a member would see a packet before the bond does, and once more there.
        Kind::Aggregate => Some(skip(format!("member of {name}, which carries the programs"))),
        Kind::Bridge => {
            let pods = matches!(device.link.kind, Kind::Veth | Kind::Netkit | Kind::Tun);
            // A bridge over the node's own network card is an uplink: packets from outside meet the programs there.
            if !pods && bridge_role(inventory, master) == Role::Uplink {
                Some(skip(format!("port of {name}, which carries the programs")))
            } else {
                Some(serve(Role::BridgePort, format!("port of {name}")))
            }
        }
        _ => None,
    }
}

fn by_kind(inventory: &Inventory, device: &Device) -> Decision {
    let beyond = inventory.routes_beyond(device.link.index);
    match device.link.kind {
        Kind::Bridge if beyond => serve(Role::Uplink, BEYOND),
        Kind::Bridge => serve(Role::Bridge, "its ports carry the programs: no route beyond the node goes through it"),
        Kind::Tunnel => serve(Role::Tunnel, "the inner device of an overlay"),
        // No pod has one; as a VPN's it may be the way out.
        Kind::Tun if device.link.framing == Framing::Flat => match beyond {
            true => serve(Role::Uplink, BEYOND),
            false => serve(Role::Tunnel, "tun without a route beyond the node"),
        },
        // A veth may be a pod's or, in a container that plays a node, the way out. A pod's end has no address, or one
        // of host length (the gateway that every pod sees), and only host routes.
        Kind::Veth | Kind::Netkit | Kind::Tun => match device.addresses.iter().find(|a| spans_a_network(a)) {
            _ if beyond => serve(Role::Uplink, BEYOND),
            Some(address) => serve(Role::Uplink, carries(address)),
            None => serve(Role::Pod, "no network of its own, and no route beyond the node goes through it"),
        },
        Kind::Physical | Kind::Aggregate | Kind::Other => match device.addresses.iter().find(|a| a.global) {
            Some(address) => serve(Role::Uplink, carries(address)),
            None if beyond => serve(Role::Uplink, BEYOND),
            None => skip("no address"),
        },
        Kind::Inert => skip("no packet enters or leaves here"),
    }
}

const BEYOND: &str = "a route beyond the node goes through it";

fn carries(address: &Address) -> String {
    format!("carries {}/{}", address.addr, address.prefix)
}

fn bridge_role(inventory: &Inventory, bridge: &Device) -> Role {
    if inventory.routes_beyond(bridge.link.index) { Role::Uplink } else { Role::Bridge }
}

fn spans_a_network(address: &Address) -> bool {
    let host_like = match address.addr {
        IpAddr::V4(_) => 31,
        IpAddr::V6(_) => 127,
    };
    address.global && address.prefix < host_like
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::inventory::tests::{address, inventory, link, route};
    use crate::devices::inventory::{Event, Link};

    fn decide_in(inv: &Inventory, index: u32) -> Decision {
        decide(inv, inv.device(index).unwrap(), &Selection::default())
    }

    fn role_in(inv: &Inventory, index: u32) -> Option<Role> {
        decide_in(inv, index).role
    }

    fn port(index: u32, name: &str, kind: Kind, master: u32) -> Link {
        Link { master: Some(master), ..link(index, name, kind) }
    }

    #[test]
    fn an_uplink_carries_an_address() {
        for kind in [Kind::Physical, Kind::Aggregate, Kind::Other] {
            let mut inv = inventory([Event::Link(link(2, "eth0", kind))]);
            assert_eq!(decide_in(&inv, 2), skip("no address"));
            inv.apply(Event::Address(2, address("fe80::1/64")));
            assert_eq!(decide_in(&inv, 2), skip("no address"), "link-local alone");
            inv.apply(Event::Address(2, address("192.0.2.1/24")));
            assert_eq!(role_in(&inv, 2), Some(Role::Uplink));
        }
    }

    #[test]
    fn a_new_veth_is_a_pods_at_once() {
        let inv = inventory([Event::Link(link(9, "cali1", Kind::Veth))]);
        assert_eq!(role_in(&inv, 9), Some(Role::Pod));
    }

    #[test]
    fn a_veth_with_a_gateway_address_and_host_routes_stays_a_pods() {
        let inv = inventory([
            Event::Link(link(9, "veth9", Kind::Veth)),
            Event::Address(9, address("10.244.0.1/32")),
            route("10.244.0.7/32", 9, false, None),
        ]);
        assert_eq!(role_in(&inv, 9), Some(Role::Pod));
    }

    #[test]
    fn a_veth_with_a_network_or_a_router_behind_it_is_an_uplink() {
        let base = [Event::Link(link(2, "eth0", Kind::Veth)), Event::Address(2, address("172.18.0.2/16"))];
        assert_eq!(role_in(&inventory(base.clone()), 2), Some(Role::Uplink));
        let routed = [base[0].clone(), route("0.0.0.0/0", 2, true, None)];
        assert_eq!(role_in(&inventory(routed), 2), Some(Role::Uplink));
    }

    #[test]
    fn ports_of_a_pod_bridge_carry_the_programs_and_the_bridge_does_not() {
        let inv = inventory([
            Event::Link(link(3, "cni0", Kind::Bridge)),
            Event::Address(3, address("10.244.0.1/24")),
            Event::Link(port(4, "veth4", Kind::Veth, 3)),
            Event::Link(port(5, "tap5", Kind::Tun, 3)),
        ]);
        assert_eq!(role_in(&inv, 3), Some(Role::Bridge));
        assert!(!decide_in(&inv, 3).carries_programs());
        assert_eq!(role_in(&inv, 4), Some(Role::BridgePort));
        assert_eq!(role_in(&inv, 5), Some(Role::BridgePort));
        assert!(decide_in(&inv, 4).carries_programs());
    }

    #[test]
    fn a_bridge_with_the_way_out_is_an_uplink_and_its_card_is_not() {
        let inv = inventory([
            Event::Link(link(3, "br0", Kind::Bridge)),
            Event::Address(3, address("192.0.2.1/24")),
            route("0.0.0.0/0", 3, true, None),
            Event::Link(port(2, "eth0", Kind::Physical, 3)),
            Event::Link(port(4, "veth4", Kind::Veth, 3)),
        ]);
        assert_eq!(role_in(&inv, 3), Some(Role::Uplink));
        assert_eq!(decide_in(&inv, 2), skip("port of br0, which carries the programs"));
        assert_eq!(role_in(&inv, 4), Some(Role::BridgePort));
    }

    #[test]
    fn a_bond_carries_the_programs_for_its_members() {
        let inv = inventory([
            Event::Link(link(3, "bond0", Kind::Aggregate)),
            Event::Address(3, address("192.0.2.1/24")),
            Event::Link(port(2, "eth0", Kind::Physical, 3)),
        ]);
        assert_eq!(role_in(&inv, 3), Some(Role::Uplink));
        assert_eq!(decide_in(&inv, 2), skip("member of bond0, which carries the programs"));
    }

    #[test]
    fn a_vrf_is_no_bridge() {
        let inv = inventory([
            Event::Link(link(3, "vrf0", Kind::Inert)),
            Event::Link(port(2, "eth0", Kind::Physical, 3)),
            Event::Address(2, address("192.0.2.1/24")),
        ]);
        assert_eq!(role_in(&inv, 2), Some(Role::Uplink));
    }

    #[test]
    fn a_tunnel_may_do_without_an_ethernet_header() {
        let framed = |index, name, kind, framing| Event::Link(Link { framing, ..link(index, name, kind) });
        let mut inv = inventory([
            framed(4, "flannel.1", Kind::Tunnel, Framing::Ethernet),
            framed(5, "tunl0", Kind::Tunnel, Framing::Flat),
            framed(6, "gre0", Kind::Tunnel, Framing::Other),
            framed(7, "tun0", Kind::Tun, Framing::Flat),
            framed(8, "ib0", Kind::Physical, Framing::Other),
            Event::Address(7, address("10.8.0.2/24")),
        ]);
        assert_eq!([4, 5, 7].map(|index| role_in(&inv, index)), [Some(Role::Tunnel); 3]);
        assert_eq!([6, 8].map(|index| role_in(&inv, index)), [None; 2]);
        inv.apply(route("0.0.0.0/0", 7, false, None));
        assert_eq!(role_in(&inv, 7), Some(Role::Uplink));
        let tunnel = Link { framing: Framing::Flat, ..link(5, "tunl0", Kind::Tunnel) };
        for up in [false, true] {
            inv.apply(Event::Link(Link { up, ..tunnel.clone() }));
            assert_eq!(role_in(&inv, 5), up.then_some(Role::Tunnel));
        }
    }

    #[test]
    fn the_rule_that_decided_is_told() {
        let mut inv = inventory([
            Event::Link(link(2, "eth0", Kind::Physical)),
            Event::Address(2, address("192.0.2.1/24")),
            Event::Link(link(3, "cni0", Kind::Bridge)),
            Event::Link(port(4, "veth4", Kind::Veth, 3)),
            Event::Link(link(5, "nk5", Kind::Netkit)),
        ]);
        assert_eq!(decide_in(&inv, 2).why, "carries 192.0.2.1/24");
        assert_eq!(decide_in(&inv, 4).why, "port of cni0");
        assert_eq!(
            decide_in(&inv, 5),
            serve(Role::Pod, "no network of its own, and no route beyond the node goes through it")
        );
        inv.apply(route("0.0.0.0/0", 5, true, None));
        assert_eq!(decide_in(&inv, 5).why, BEYOND);
    }

    #[test]
    fn loopback_is_served_for_the_nodes_own_processes_unless_left_out() {
        let inv = inventory([Event::Link(link(1, "lo", Kind::Physical)), Event::Address(1, address("203.0.113.9/32"))]);
        let of = |items: &[&str]| {
            let items: Vec<_> = items.iter().map(|item| (*item).to_owned()).collect();
            decide(&inv, inv.device(1).unwrap(), &Selection::parse(&items).unwrap())
        };
        assert_eq!(of(&[]).role, Some(Role::Loopback));
        assert_eq!(of(&["*=uplink"]).role, Some(Role::Loopback), "it has no other role");
        assert_eq!(of(&["lo=none"]), skip("left alone by --devices"));
        assert_eq!(of(&["eth*"]), skip("not among --devices"));
    }

    #[test]
    fn cilium_and_inert_devices_are_left_alone() {
        let inv = inventory([
            Event::Link(link(2, "cilium_host", Kind::Veth)),
            Event::Link(link(3, "nodelocaldns", Kind::Inert)),
            Event::Address(3, address("169.254.20.10/32")),
        ]);
        assert_eq!([2, 3].map(|index| role_in(&inv, index)), [None; 2]);
    }

    #[test]
    fn a_given_role_wins_where_packets_can_be_read() {
        let framed = |index, name, framing| Event::Link(Link { framing, ..link(index, name, Kind::Tunnel) });
        let inv = inventory([
            Event::Link(link(2, "cilium_host", Kind::Veth)),
            framed(5, "tunl0", Framing::Flat),
            framed(6, "gre0", Framing::Other),
        ]);
        let selection = Selection::parse(&["*=uplink".to_owned()]).unwrap();
        let of = |index| decide(&inv, inv.device(index).unwrap(), &selection).role;
        assert_eq!([2, 5, 6].map(of), [Some(Role::Uplink), Some(Role::Uplink), None]);
    }
}
