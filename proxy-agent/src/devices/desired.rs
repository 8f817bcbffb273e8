//! From the inventory to what the maps and hooks should hold: devices with roles and sources, addresses. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_common::abi::{self, NodeAddr, Role};

use super::inventory::{Device, Framing, Inventory, MAIN_TABLE};
use super::replies::{self, ReplyMark, Rule};
use super::role::{Why, decide};
use super::select::Selection;
use crate::config::{LocalDevices, NodePortAddresses};
use crate::dataplane::attach::standing::Filters;

/// A device as it should be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Name, for people.
    pub name: String,
    /// Tells a re-created device from its predecessor.
    pub epoch: u32,
    /// The entry of `DEVICES`.
    pub entry: abi::Device,
    /// The role in `entry`.
    pub role: Role,
    /// The rule that gave it.
    pub why: Why,
    /// Packets begin with the IP header.
    pub flat: bool,
    /// Whether programs are attached here.
    pub programs: bool,
    /// A foreign clsact filter stands at egress: ours must stand behind it.
    pub foreign_egress: bool,
    /// Every clsact filter.
    pub filters: Filters,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// By ifindex.
    pub devices: BTreeMap<u32, Served>,
    /// The node's addresses, with the bits of [`NodeAddr`].
    pub addresses: BTreeMap<IpAddr, u32>,
    /// Devices left alone, with the reason.
    pub skipped: BTreeMap<u32, (String, Why)>,
    /// The node's rules for replies.
    pub rules: BTreeSet<Rule>,
}

/// What the flags say.
#[derive(Clone, Debug)]
pub struct Wishes {
    /// `--devices`.
    pub selection: Selection,
    /// `--nodeport-addresses`.
    pub nodeport_addresses: NodePortAddresses,
    /// `--detect-local-mode`, where devices tell who is a pod of this node.
    pub pods: Option<LocalDevices>,
    /// `--reply-mark`.
    pub replies: Option<ReplyMark>,
}

/// Computes what should be.
pub fn desired(inventory: &Inventory, wishes: &Wishes) -> Desired {
    let primary = primary_addresses(inventory);
    let mut desired = Desired::default();
    for device in inventory.devices() {
        let decision = decide(inventory, device, &wishes.selection);
        match decision.role {
            None => {
                desired.skipped.insert(device.link.index, (device.link.name.clone(), decision.why));
            }
            Some(role) => {
                let served = Served {
                    name: device.link.name.clone(),
                    epoch: device.epoch,
                    entry: entry(inventory, device, role, wishes),
                    role,
                    flat: device.link.framing == Framing::Flat,
                    programs: decision.carries_programs(),
                    foreign_egress: device.filters.foreign_egress(),
                    filters: device.filters.clone(),
                    why: decision.why,
                };
                desired.devices.insert(device.link.index, served);
            }
        }
        for address in device.addresses.iter().filter(|a| !a.addr.is_loopback()) {
            let node_port = wishes.nodeport_addresses.accepts(address.addr, &primary);
            let flags = NodeAddr::LOCAL | if node_port { NodeAddr::NODE_PORTS } else { 0 };
            *desired.addresses.entry(address.addr).or_default() |= flags;
        }
    }
    if let Some(wish) = wishes.replies {
        let roles = desired.devices.iter().map(|(index, device)| (*index, device.role)).collect();
        let marks = replies::marks(&roles, inventory, wish);
        for (index, mark) in &marks {
            desired.devices.entry(*index).and_modify(|device| device.entry.reply_mark = *mark);
        }
        desired.rules = replies::rules(&marks, inventory, wish);
    }
    desired
}

fn entry(inventory: &Inventory, device: &Device, role: Role, wishes: &Wishes) -> abi::Device {
    let master = device.link.master.and_then(|index| inventory.device(index));
    let source = |v4: bool| preferred_source(inventory, device, v4);
    abi::Device {
        role: role as u8,
        flags: if pods_send_on(device, master, role, wishes.pods.as_ref()) { abi::Device::PODS } else { 0 },
        mac: device.link.mac,
        master: master.map_or(0, |m| m.link.index),
        master_mac: master.map_or([0; 6], |m| m.link.mac),
        _pad: 0,
        source_v4: match source(true) {
            Some(IpAddr::V4(addr)) => addr.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        },
        source_v6: match source(false) {
            Some(IpAddr::V6(addr)) => addr.into(),
            _ => Ipv6Addr::UNSPECIFIED.into(),
        },
        reply_mark: 0,
        ifindex: device.link.index,
    }
}

/// True if what arrives on the device comes from pods of this node (rule 71).
fn pods_send_on(device: &Device, master: Option<&Device>, role: Role, pods: Option<&LocalDevices>) -> bool {
    let mut names = [Some(device), master].into_iter().flatten().map(|device| device.link.name.as_str());
    match pods {
        None => false,
        Some(_) if role == Role::Loopback => false,
        Some(LocalDevices::Found) => matches!(role, Role::Pod | Role::BridgePort) && !mutant!("rule-71-devices"),
        Some(LocalDevices::Bridge(bridge)) => names.any(|name| name == bridge),
        Some(LocalDevices::Prefix(prefix)) => names.any(|name| name.starts_with(prefix)),
    }
}

/// The address that the kernel would give a packet of the node's own on this device: what a route through it prefers,
/// else the device's own, else (for a bridge's port) its master's, else that of the first other device that has one
/// (`inet_select_addr` walks the devices in this order).
fn preferred_source(inventory: &Inventory, device: &Device, v4: bool) -> Option<IpAddr> {
    let index = device.link.index;
    let through = |oif: u32| {
        inventory.hops().filter(|(_, hop)| hop.oif == oif).find_map(|(_, hop)| hop.source.filter(|s| s.is_ipv4() == v4))
    };
    let master = device.link.master.and_then(|m| inventory.device(m));
    own_address(device, v4)
        .filter(|_| through(index).is_none())
        .or_else(|| through(index))
        .or_else(|| master.and_then(|m| own_address(m, v4)))
        .or_else(|| inventory.devices().filter(|d| d.link.index != index).find_map(|d| own_address(d, v4)))
}

fn own_address(device: &Device, v4: bool) -> Option<IpAddr> {
    device.addresses.iter().find(|a| a.global && !a.secondary && a.addr.is_ipv4() == v4).map(|a| a.addr)
}

/// The node's primary address of each family: what the default route with the lowest metric prefers or the first
/// address of its device; without a default route, the first device's address.
pub fn primary_addresses(inventory: &Inventory) -> Vec<IpAddr> {
    [true, false].into_iter().filter_map(|v4| primary_address(inventory, v4)).collect()
}

fn primary_address(inventory: &Inventory, v4: bool) -> Option<IpAddr> {
    let default = inventory
        .hops()
        .filter(|(key, _)| key.table == MAIN_TABLE && key.dst.prefix_len() == 0 && key.dst.addr().is_ipv4() == v4)
        .min_by_key(|(key, _)| key.metric);
    let by_route = default.and_then(|(_, hop)| {
        hop.source.or_else(|| inventory.device(hop.oif).and_then(|device| own_address(device, v4)))
    });
    by_route.or_else(|| inventory.devices().find_map(|device| own_address(device, v4)))
}

/// One step from what is to what should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Detach from the device and forget it.
    Forget(u32),
    /// Write the device's entry.
    Describe(u32),
    /// Attach to the device, or put the programs into their right places there.
    Attach(u32),
    /// Detach, but keep the entry.
    Detach(u32),
}

/// The steps, in an order in which every packet finds what it needs: a device's entry stands before its programs do.
pub fn steps(now: &Desired, next: &Desired) -> Vec<Step> {
    let mut steps = Vec::new();
    for (index, old) in &now.devices {
        match next.devices.get(index) {
            Some(new) if new.epoch == old.epoch => {
                if old.programs && !new.programs {
                    steps.push(Step::Detach(*index));
                }
            }
            _ => steps.push(Step::Forget(*index)),
        }
    }
    // Those without Ethernet last: the first of them waits for programs of their kind.
    let (flat, ethernet): (Vec<_>, Vec<_>) = next.devices.iter().partition(|(_, new)| new.flat);
    for (index, new) in ethernet.into_iter().chain(flat) {
        let old = now.devices.get(index).filter(|old| old.epoch == new.epoch);
        if old.is_none_or(|old| old.entry != new.entry) {
            steps.push(Step::Describe(*index));
        }
        let placed =
            old.is_some_and(|old| old.programs && old.foreign_egress == new.foreign_egress && old.flat == new.flat);
        if new.programs && !placed {
            steps.push(Step::Attach(*index));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::attach::standing::Filter;
    use crate::devices::inventory::tests::{address, inventory, link, route};
    use crate::devices::inventory::{Address, Event, Kind, Link};

    fn wishes() -> Wishes {
        Wishes {
            selection: Selection::default(),
            nodeport_addresses: NodePortAddresses::Primary,
            pods: None,
            replies: None,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn v4(entry: &abi::Device) -> IpAddr {
        entry.source_v4.into()
    }

    fn node() -> Inventory {
        inventory([
            Event::Link(link(1, "lo", Kind::Physical)),
            Event::Address(1, address("127.0.0.1/8")),
            Event::Link(link(2, "eth0", Kind::Physical)),
            Event::Address(2, address("192.0.2.1/24")),
            Event::Address(2, Address { secondary: true, ..address("192.0.2.2/24") }),
            Event::Address(2, address("2001:db8::1/64")),
            Event::Address(2, address("fe80::1/64")),
            route("0.0.0.0/0", 2, true, None),
            Event::Link(link(5, "cali5", Kind::Veth)),
        ])
    }

    #[test]
    fn addresses_carry_what_they_are_good_for() {
        let desired = desired(&node(), &wishes());
        let both = NodeAddr::LOCAL | NodeAddr::NODE_PORTS;
        let expected =
            [("192.0.2.1", both), ("192.0.2.2", NodeAddr::LOCAL), ("2001:db8::1", both), ("fe80::1", NodeAddr::LOCAL)];
        assert_eq!(desired.addresses, expected.map(|(a, f)| (ip(a), f)).into());
    }

    #[test]
    fn a_routed_pod_gets_the_source_that_the_kernel_would_choose() {
        let mut inv = node();
        let of = |inv: &Inventory| v4(&desired(inv, &wishes()).devices[&5].entry);
        assert_eq!(of(&inv), ip("192.0.2.1"), "the first other device's");
        inv.apply(Event::Address(5, address("169.254.1.1/32")));
        assert_eq!(of(&inv), ip("192.0.2.1"), "a link-local one is no source");
        inv.apply(Event::Address(5, address("10.244.0.1/32")));
        assert_eq!(of(&inv), ip("10.244.0.1"), "its own");
        inv.apply(route("10.244.0.9/32", 5, false, Some("192.0.2.2")));
        assert_eq!(of(&inv), ip("192.0.2.2"), "what its route prefers");
    }

    #[test]
    fn a_bridge_port_gets_its_bridges_source_and_mac() {
        let mut inv = node();
        inv.apply(Event::Link(link(7, "cni0", Kind::Bridge)));
        inv.apply(Event::Address(7, address("10.244.1.1/24")));
        inv.apply(Event::Link(Link { master: Some(7), ..link(8, "veth8", Kind::Veth) }));
        let desired = desired(&inv, &wishes());
        let entry = desired.devices[&8].entry;
        assert_eq!((entry.master, entry.master_mac, v4(&entry)), (7, [2, 0, 0, 0, 0, 7], ip("10.244.1.1")));
        assert!(desired.devices[&8].programs && !desired.devices[&7].programs);
    }

    #[test]
    fn rule_71_devices_of_pods_are_told_by_role_bridge_or_name() {
        let mut inv = node();
        inv.apply(Event::Link(link(7, "cni0", Kind::Bridge)));
        inv.apply(Event::Link(Link { master: Some(7), ..link(8, "veth8", Kind::Veth) }));
        inv.apply(Event::Link(Link { master: Some(7), ..link(9, "vxlan9", Kind::Tunnel) }));
        let of = |pods: Option<LocalDevices>| {
            let devices = desired(&inv, &Wishes { pods, ..wishes() }).devices;
            let pods = devices.values().filter(|device| device.entry.flags & abi::Device::PODS != 0);
            pods.map(|device| device.name.clone()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of(None), "");
        assert_eq!(of(Some(LocalDevices::Found)), "cali5 veth8 vxlan9");
        assert_eq!(of(Some(LocalDevices::Bridge("cni0".to_owned()))), "cni0 veth8 vxlan9");
        assert_eq!(of(Some(LocalDevices::Prefix("cali".to_owned()))), "cali5");
        assert_eq!(of(Some(LocalDevices::Prefix("cni".to_owned()))), "cni0 veth8 vxlan9", "by its master's name");
    }

    #[test]
    fn the_default_route_with_the_lowest_metric_names_the_primary_address() {
        let mut inv = node();
        inv.apply(Event::Link(link(3, "eth1", Kind::Physical)));
        inv.apply(Event::Address(3, address("198.51.100.1/24")));
        assert_eq!(primary_addresses(&inv), [ip("192.0.2.1"), ip("2001:db8::1")]);
        inv.apply(Event::AddressGone(2, ip("192.0.2.1")));
        assert_eq!(primary_addresses(&inv)[0], ip("198.51.100.1"), "a secondary one is never primary");
    }

    #[test]
    fn steps_describe_before_they_attach_and_forget_what_is_gone() {
        let first = desired(&node(), &wishes());
        let from_nothing = steps(&Desired::default(), &first);
        let at = |step: Step| from_nothing.iter().position(|s| *s == step).unwrap();
        assert!(at(Step::Describe(5)) < at(Step::Attach(5)));
        assert!(steps(&first, &first).is_empty());

        let mut inv = node();
        inv.apply(Event::LinkGone(5));
        assert_eq!(steps(&first, &desired(&inv, &wishes())), [Step::Forget(5)]);
        inv.apply(Event::Link(link(5, "cali5", Kind::Veth)));
        let again = steps(&first, &desired(&inv, &wishes()));
        assert_eq!(again, [Step::Forget(5), Step::Describe(5), Step::Attach(5)], "made anew under the same ifindex");
    }

    #[test]
    fn an_uplink_has_the_mark_of_its_replies() {
        let replies = Some(ReplyMark { mask: 0x1000, priority: 60 });
        let marked = desired(&node(), &Wishes { replies, ..wishes() });
        assert_eq!((marked.devices[&2].entry.reply_mark, marked.devices[&5].entry.reply_mark), (0x1000, 0));
        assert_eq!(marked.rules.len(), 2);
        let unmarked = desired(&node(), &wishes());
        assert_eq!((unmarked.devices[&2].entry.reply_mark, unmarked.rules.len()), (0, 0));
        assert_eq!(steps(&unmarked, &marked), [Step::Describe(2)]);
    }

    #[test]
    fn a_foreign_filter_moves_the_egress_program() {
        let mut inv = node();
        let first = desired(&inv, &wishes());
        let filter = Filter { priority: 77, handle: 1, name: "policy".to_owned(), program: 7 };
        inv.apply(Event::Filters { index: 2, filters: Filters { egress: vec![filter], ..Filters::default() } });
        assert_eq!(steps(&first, &desired(&inv, &wishes())), [Step::Attach(2)]);
    }

    #[test]
    fn a_device_that_becomes_a_bond_member_loses_its_programs() {
        let mut inv = node();
        let first = desired(&inv, &wishes());
        inv.apply(Event::Link(link(6, "bond0", Kind::Aggregate)));
        inv.apply(Event::Link(Link { master: Some(6), ..link(2, "eth0", Kind::Physical) }));
        assert!(steps(&first, &desired(&inv, &wishes())).contains(&Step::Forget(2)));
    }
}
