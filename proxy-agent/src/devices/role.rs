//! Which programs a device gets: its role, from kind, master, addresses and routes. Pure.

use std::net::IpAddr;

use proxy_common::abi::Role;

use super::inventory::{Device, Inventory, Kind};
use super::select::{Selected, Selection};

/// What is done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It has this role.
    Serve(Role),
    /// It is left alone, for this reason.
    Skip(&'static str),
}

impl Decision {
    /// True if the device carries programs: a bridge of pods does not, its ports do.
    pub const fn carries_programs(self) -> bool {
        matches!(self, Self::Serve(Role::Uplink | Role::Pod | Role::BridgePort | Role::Tunnel | Role::Loopback))
    }
}

/// Decides on a device.
pub fn decide(inventory: &Inventory, device: &Device, selection: &Selection) -> Decision {
    let link = &device.link;
    match selection.of(&link.name) {
        Selected::Not => return Decision::Skip("not among --devices"),
        Selected::Given(None) => return Decision::Skip("left alone by --devices"),
        // The node's processes meet its own addresses there, and nobody else does.
        _ if link.loopback => return Decision::Serve(Role::Loopback),
        Selected::Given(Some(role)) if link.ethernet => return Decision::Serve(role),
        Selected::Given(Some(_)) | Selected::Found => {}
    }
    if link.name.starts_with("cilium_") {
        return Decision::Skip("belongs to Cilium");
    }
    match link.kind {
        Kind::Inert => return Decision::Skip("no packet enters or leaves here"),
        Kind::Netkit => return Decision::Skip("netkit is not served yet"),
        _ => {}
    }
    if let Some(decision) = by_master(inventory, device) {
        return decision;
    }
    let decision = by_kind(inventory, device);
    match decision {
        Decision::Serve(_) if !link.ethernet => Decision::Skip("packets without an Ethernet header are not served yet"),
        decision => decision,
    }
}

/// The role of a member of a bridge or bond. A VRF changes routing only, and an unknown master nothing that we know.
fn by_master(inventory: &Inventory, device: &Device) -> Option<Decision> {
    let master = inventory.device(device.link.master?)?;
    match master.link.kind {
        Kind::Aggregate => Some(Decision::Skip("its bond carries the programs")),
        Kind::Bridge => {
            let pods = matches!(device.link.kind, Kind::Veth | Kind::Tun);
            // A bridge over the node's own network card is an uplink: packets from outside meet the programs there.
            if !pods && bridge_role(inventory, master) == Role::Uplink {
                Some(Decision::Skip("its bridge carries the programs"))
            } else {
                Some(Decision::Serve(Role::BridgePort))
            }
        }
        _ => None,
    }
}

fn by_kind(inventory: &Inventory, device: &Device) -> Decision {
    match device.link.kind {
        Kind::Bridge => Decision::Serve(bridge_role(inventory, device)),
        Kind::Tunnel => Decision::Serve(Role::Tunnel),
        // A veth may be a pod's or, in a container that plays a node, the way out. A pod's end has no address, or one
        // of host length (the gateway that every pod sees), and only host routes.
        Kind::Veth | Kind::Tun => {
            let uplink = inventory.routes_beyond(device.link.index) || device.addresses.iter().any(spans_a_network);
            Decision::Serve(if uplink { Role::Uplink } else { Role::Pod })
        }
        Kind::Physical | Kind::Aggregate | Kind::Other => {
            if device.addresses.iter().any(|a| a.global) || inventory.routes_beyond(device.link.index) {
                Decision::Serve(Role::Uplink)
            } else {
                Decision::Skip("no address")
            }
        }
        Kind::Inert | Kind::Netkit => Decision::Skip("not served"),
    }
}

fn bridge_role(inventory: &Inventory, bridge: &Device) -> Role {
    if inventory.routes_beyond(bridge.link.index) { Role::Uplink } else { Role::Bridge }
}

fn spans_a_network(address: &super::inventory::Address) -> bool {
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

    fn port(index: u32, name: &str, kind: Kind, master: u32) -> Link {
        Link { master: Some(master), ..link(index, name, kind) }
    }

    #[test]
    fn an_uplink_carries_an_address() {
        for kind in [Kind::Physical, Kind::Aggregate, Kind::Other] {
            let mut inv = inventory([Event::Link(link(2, "eth0", kind))]);
            assert_eq!(decide_in(&inv, 2), Decision::Skip("no address"));
            inv.apply(Event::Address(2, address("fe80::1/64")));
            assert_eq!(decide_in(&inv, 2), Decision::Skip("no address"), "link-local alone");
            inv.apply(Event::Address(2, address("192.0.2.1/24")));
            assert_eq!(decide_in(&inv, 2), Decision::Serve(Role::Uplink));
        }
    }

    #[test]
    fn a_new_veth_is_a_pods_at_once() {
        let inv = inventory([Event::Link(link(9, "cali1", Kind::Veth))]);
        assert_eq!(decide_in(&inv, 9), Decision::Serve(Role::Pod));
    }

    #[test]
    fn a_veth_with_a_gateway_address_and_host_routes_stays_a_pods() {
        let inv = inventory([
            Event::Link(link(9, "veth9", Kind::Veth)),
            Event::Address(9, address("10.244.0.1/32")),
            route("10.244.0.7/32", 9, false, None),
        ]);
        assert_eq!(decide_in(&inv, 9), Decision::Serve(Role::Pod));
    }

    #[test]
    fn a_veth_with_a_network_or_a_router_behind_it_is_an_uplink() {
        let base = [Event::Link(link(2, "eth0", Kind::Veth)), Event::Address(2, address("172.18.0.2/16"))];
        assert_eq!(decide_in(&inventory(base.clone()), 2), Decision::Serve(Role::Uplink));
        let routed = [base[0].clone(), route("0.0.0.0/0", 2, true, None)];
        assert_eq!(decide_in(&inventory(routed), 2), Decision::Serve(Role::Uplink));
    }

    #[test]
    fn ports_of_a_pod_bridge_carry_the_programs_and_the_bridge_does_not() {
        let inv = inventory([
            Event::Link(link(3, "cni0", Kind::Bridge)),
            Event::Address(3, address("10.244.0.1/24")),
            Event::Link(port(4, "veth4", Kind::Veth, 3)),
            Event::Link(port(5, "tap5", Kind::Tun, 3)),
        ]);
        assert_eq!(decide_in(&inv, 3), Decision::Serve(Role::Bridge));
        assert!(!decide_in(&inv, 3).carries_programs());
        assert_eq!(decide_in(&inv, 4), Decision::Serve(Role::BridgePort));
        assert_eq!(decide_in(&inv, 5), Decision::Serve(Role::BridgePort));
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
        assert_eq!(decide_in(&inv, 3), Decision::Serve(Role::Uplink));
        assert_eq!(decide_in(&inv, 2), Decision::Skip("its bridge carries the programs"));
        assert_eq!(decide_in(&inv, 4), Decision::Serve(Role::BridgePort));
    }

    #[test]
    fn a_bond_carries_the_programs_for_its_members() {
        let inv = inventory([
            Event::Link(link(3, "bond0", Kind::Aggregate)),
            Event::Address(3, address("192.0.2.1/24")),
            Event::Link(port(2, "eth0", Kind::Physical, 3)),
        ]);
        assert_eq!(decide_in(&inv, 3), Decision::Serve(Role::Uplink));
        assert_eq!(decide_in(&inv, 2), Decision::Skip("its bond carries the programs"));
    }

    #[test]
    fn a_vrf_is_no_bridge() {
        let inv = inventory([
            Event::Link(link(3, "vrf0", Kind::Inert)),
            Event::Link(port(2, "eth0", Kind::Physical, 3)),
            Event::Address(2, address("192.0.2.1/24")),
        ]);
        assert_eq!(decide_in(&inv, 2), Decision::Serve(Role::Uplink));
    }

    #[test]
    fn a_tunnel_needs_an_ethernet_header() {
        let mut flat = link(5, "tunl0", Kind::Tunnel);
        flat.ethernet = false;
        let inv = inventory([Event::Link(link(4, "flannel.1", Kind::Tunnel)), Event::Link(flat)]);
        assert_eq!(decide_in(&inv, 4), Decision::Serve(Role::Tunnel));
        assert_eq!(decide_in(&inv, 5), Decision::Skip("packets without an Ethernet header are not served yet"));
    }

    #[test]
    fn loopback_is_served_for_the_nodes_own_processes_unless_left_out() {
        let inv = inventory([Event::Link(link(1, "lo", Kind::Physical)), Event::Address(1, address("203.0.113.9/32"))]);
        let of = |items: &[&str]| {
            let items: Vec<_> = items.iter().map(|item| (*item).to_owned()).collect();
            decide(&inv, inv.device(1).unwrap(), &Selection::parse(&items).unwrap())
        };
        assert_eq!(of(&[]), Decision::Serve(Role::Loopback));
        assert_eq!(of(&["*=uplink"]), Decision::Serve(Role::Loopback), "it has no other role");
        assert_eq!(of(&["lo=none"]), Decision::Skip("left alone by --devices"));
        assert_eq!(of(&["eth*"]), Decision::Skip("not among --devices"));
    }

    #[test]
    fn cilium_and_inert_devices_are_left_alone() {
        let inv = inventory([
            Event::Link(link(2, "cilium_host", Kind::Veth)),
            Event::Link(link(3, "nodelocaldns", Kind::Inert)),
            Event::Address(3, address("169.254.20.10/32")),
            Event::Link(link(4, "nk0", Kind::Netkit)),
        ]);
        for index in 2..=4 {
            assert!(matches!(decide_in(&inv, index), Decision::Skip(_)), "{index}");
        }
    }

    #[test]
    fn a_given_role_wins_but_never_without_ethernet() {
        let mut flat = link(5, "tunl0", Kind::Tunnel);
        flat.ethernet = false;
        let inv = inventory([Event::Link(link(2, "cilium_host", Kind::Veth)), Event::Link(flat)]);
        let selection = Selection::parse(&["*=uplink".to_owned()]).unwrap();
        let of = |index| decide(&inv, inv.device(index).unwrap(), &selection);
        assert_eq!(of(2), Decision::Serve(Role::Uplink));
        assert!(matches!(of(5), Decision::Skip(_)));
    }
}
