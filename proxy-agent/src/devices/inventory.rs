//! What the kernel says of this network namespace: links, addresses and routes, kept from events. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::dataplane::attach::standing::Filters;

/// What kind of device it is, as far as its role depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No kind in the kernel's sense: hardware, virtio and the like.
    Physical,
    /// One end of a veth pair.
    Veth,
    /// A bridge.
    Bridge,
    /// A bond or team: its members' traffic passes it.
    Aggregate,
    /// VXLAN, Geneve, IP-in-IP, GRE, WireGuard: the inner device of an overlay.
    Tunnel,
    /// tun or tap.
    Tun,
    /// netkit.
    Netkit,
    /// dummy, ifb, vrf, monitors: no packet enters or leaves the node here.
    Inert,
    /// VLAN, macvlan, ipvlan and whatever else may carry an address.
    Other,
}

/// What a device's packets begin with, at the hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// An Ethernet header.
    Ethernet,
    /// The IP header: tun, IPIP, SIT, GRE, WireGuard.
    Flat,
    /// Something else: InfiniBand, PPP, GRE without a remote end.
    Other,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// ifindex.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: Kind,
    /// True for lo.
    pub loopback: bool,
    /// What packets begin with.
    pub framing: Framing,
    /// Hardware address, zero without one.
    pub mac: [u8; 6],
    /// ifindex of the bridge, bond or VRF it belongs to.
    pub master: Option<u32>,
    /// Administratively up.
    pub up: bool,
}

/// An address on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub addr: IpAddr,
    /// Length of its network's prefix.
    pub prefix: u8,
    /// Neither link-local nor host scope.
    pub global: bool,
    /// A second address of the same network, deprecated or tentative: never a preferred source.
    pub secondary: bool,
}

/// A route's identity: the kernel holds one entry per network, table and metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    /// Destination.
    pub dst: IpNet,
    /// Table.
    pub table: u32,
    /// Metric.
    pub metric: u32,
}

/// One way of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    /// Output device.
    pub oif: u32,
    /// Goes through a router.
    pub gateway: bool,
    /// Preferred source.
    pub source: Option<IpAddr>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Identity.
    pub key: RouteKey,
    /// Ways.
    pub hops: Vec<Hop>,
}

/// The main table's number.
pub const MAIN_TABLE: u32 = 254;

/// A change in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device is there, or changed.
    Link(Link),
    /// A device went away.
    LinkGone(u32),
    /// An address is there, or changed.
    Address(u32, Address),
    /// An address went away.
    AddressGone(u32, IpAddr),
    /// A route is there; `replace` says that it took its predecessor's place.
    Route {
        /// The route.
        route: Route,
        /// Took the place of the one with the same identity.
        replace: bool,
    },
    /// A route went away.
    RouteGone(Route),
    /// The clsact filters of this device are these now.
    Filters {
        /// ifindex.
        index: u32,
        /// All of them.
        filters: Filters,
    },
}

/// A device with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The link.
    pub link: Link,
    /// Addresses in the kernel's order.
    pub addresses: Vec<Address>,
    /// Counts how often the ifindex was given anew, so that a re-created device is not taken for the old one.
    pub epoch: u32,
    /// Its clsact filters.
    pub filters: Filters,
}

/// Links, addresses and routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    devices: BTreeMap<u32, Device>,
    routes: BTreeMap<RouteKey, BTreeSet<Hop>>,
    /// Survives the device, because it tells the next one with its ifindex apart.
    epochs: BTreeMap<u32, u32>,
}

impl Inventory {
    /// Devices in order of their ifindex.
    pub fn devices(&self) -> impl Iterator<Item = &Device> {
        self.devices.values()
    }

    /// The device with this ifindex.
    pub fn device(&self, index: u32) -> Option<&Device> {
        self.devices.get(&index)
    }

    /// Ways of all routes, with the route that each belongs to.
    pub fn hops(&self) -> impl Iterator<Item = (&RouteKey, &Hop)> {
        self.routes.iter().flat_map(|(key, hops)| hops.iter().map(move |hop| (key, hop)))
    }

    /// True if a router is reached through this device, or everything unknown goes there.
    pub fn routes_beyond(&self, index: u32) -> bool {
        self.hops().any(|(key, hop)| hop.oif == index && (hop.gateway || key.dst.prefix_len() == 0))
    }

    /// Takes a change in.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Link(link) => self.set_link(link),
            Event::LinkGone(index) => self.drop_link(index),
            Event::Address(index, address) => self.set_address(index, address),
            Event::AddressGone(index, addr) => {
                if let Some(device) = self.devices.get_mut(&index) {
                    device.addresses.retain(|a| a.addr != addr);
                }
                // The kernel removes IPv4 routes that prefer this source without saying so.
                self.retain_hops(|_, hop| hop.source != Some(addr));
            }
            Event::Route { route, replace } => {
                let hops = self.routes.entry(route.key).or_default();
                if replace {
                    hops.clear();
                }
                hops.extend(route.hops);
            }
            Event::RouteGone(route) => {
                if let Some(hops) = self.routes.get_mut(&route.key) {
                    hops.retain(|hop| !route.hops.contains(hop));
                    if hops.is_empty() {
                        self.routes.remove(&route.key);
                    }
                }
            }
            Event::Filters { index, filters } => {
                if let Some(device) = self.devices.get_mut(&index) {
                    device.filters = filters;
                }
            }
        }
    }

    /// Takes over a fresh reading, keeping what only events tell: which ifindex was given anew.
    pub fn replace(&mut self, events: impl IntoIterator<Item = Event>) {
        let old = std::mem::take(self);
        for (index, epoch) in &old.epochs {
            self.epochs.insert(*index, *epoch);
        }
        for event in events {
            self.apply(event);
        }
        for (index, device) in &old.devices {
            match self.devices.get_mut(index) {
                // Another name and another MAC at once: not the device it was, though no event said so.
                Some(now) if now.link.name != device.link.name && now.link.mac != device.link.mac => {
                    now.epoch = device.epoch + 1;
                    self.epochs.insert(*index, now.epoch);
                }
                Some(_) => {}
                None => {
                    self.epochs.insert(*index, device.epoch + 1);
                }
            }
        }
    }

    fn set_link(&mut self, link: Link) {
        let index = link.index;
        if !link.up {
            // So does the kernel, silently for IPv4.
            self.retain_hops(|_, hop| hop.oif != index);
        }
        let epoch = self.epochs.get(&index).copied().unwrap_or(0);
        match self.devices.get_mut(&index) {
            Some(device) => device.link = link,
            None => {
                self.devices.insert(index, Device { link, addresses: Vec::new(), epoch, filters: Filters::default() });
            }
        }
    }

    fn drop_link(&mut self, index: u32) {
        if let Some(device) = self.devices.remove(&index) {
            self.epochs.insert(index, device.epoch + 1);
        }
        self.retain_hops(|_, hop| hop.oif != index);
    }

    fn set_address(&mut self, index: u32, address: Address) {
        let Some(device) = self.devices.get_mut(&index) else { return };
        match device.addresses.iter_mut().find(|a| a.addr == address.addr) {
            Some(known) => *known = address,
            None => device.addresses.push(address),
        }
    }

    fn retain_hops(&mut self, keep: impl Fn(&RouteKey, &Hop) -> bool) {
        self.routes.retain(|key, hops| {
            hops.retain(|hop| keep(key, hop));
            !hops.is_empty()
        });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn link(index: u32, name: &str, kind: Kind) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind,
            loopback: name == "lo",
            framing: Framing::Ethernet,
            mac: [2, 0, 0, 0, 0, index as u8],
            master: None,
            up: true,
        }
    }

    pub(crate) fn address(text: &str) -> Address {
        let net: IpNet = text.parse().unwrap();
        let addr = net.addr();
        let global = match addr {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        };
        Address { addr, prefix: net.prefix_len(), global, secondary: false }
    }

    pub(crate) fn route(dst: &str, oif: u32, gateway: bool, source: Option<&str>) -> Event {
        let key = RouteKey { dst: dst.parse().unwrap(), table: MAIN_TABLE, metric: 0 };
        let hop = Hop { oif, gateway, source: source.map(|s| s.parse().unwrap()) };
        Event::Route { route: Route { key, hops: vec![hop] }, replace: false }
    }

    pub(crate) fn inventory(events: impl IntoIterator<Item = Event>) -> Inventory {
        let mut inventory = Inventory::default();
        for event in events {
            inventory.apply(event);
        }
        inventory
    }

    #[test]
    fn a_device_that_was_made_anew_has_another_epoch() {
        let mut inv = inventory([Event::Link(link(7, "veth7", Kind::Veth))]);
        let before = inv.device(7).unwrap().epoch;
        inv.apply(Event::LinkGone(7));
        assert!(inv.device(7).is_none());
        inv.apply(Event::Link(link(7, "veth7", Kind::Veth)));
        assert_ne!(inv.device(7).unwrap().epoch, before);
    }

    #[test]
    fn a_fresh_reading_forgets_what_is_gone_and_keeps_epochs() {
        let mut inv = inventory([
            Event::Link(link(7, "a", Kind::Veth)),
            Event::Link(link(8, "b", Kind::Veth)),
            route("::/0", 7, true, None),
        ]);
        inv.apply(Event::LinkGone(7));
        inv.replace([Event::Link(link(7, "a", Kind::Veth))]);
        assert_eq!(inv.device(7).unwrap().epoch, 1);
        assert!(inv.device(8).is_none());
        assert_eq!(inv.hops().count(), 0);
        inv.replace([Event::Link(link(8, "b", Kind::Veth))]);
        assert_eq!(inv.device(8).unwrap().epoch, 1, "it was away for a reading");
        let mut other = link(8, "c", Kind::Veth);
        other.mac = [9; 6];
        inv.replace([Event::Link(other)]);
        assert_eq!(inv.device(8).unwrap().epoch, 2, "neither name nor MAC are the same");
    }

    #[test]
    fn routes_go_with_their_device_their_source_and_their_successor() {
        let base = || {
            inventory([
                Event::Link(link(2, "eth0", Kind::Physical)),
                Event::Address(2, address("192.0.2.1/24")),
                route("0.0.0.0/0", 2, true, Some("192.0.2.1")),
            ])
        };
        let mut inv = base();
        assert!(inv.routes_beyond(2));
        inv.apply(Event::AddressGone(2, "192.0.2.1".parse().unwrap()));
        assert!(!inv.routes_beyond(2));

        let mut inv = base();
        let mut down = link(2, "eth0", Kind::Physical);
        down.up = false;
        inv.apply(Event::Link(down));
        assert!(!inv.routes_beyond(2));
        assert_eq!(inv.device(2).unwrap().addresses.len(), 1);

        let mut inv = base();
        let Event::Route { route: successor, .. } = route("0.0.0.0/0", 3, true, None) else { unreachable!() };
        inv.apply(Event::Route { route: successor.clone(), replace: true });
        assert!(!inv.routes_beyond(2) && inv.routes_beyond(3));
        inv.apply(Event::RouteGone(successor));
        assert!(!inv.routes_beyond(3));
    }
}
