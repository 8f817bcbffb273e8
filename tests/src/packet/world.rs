//! The fixed surroundings of every packet test: the node's devices, and who lives where.
//!
//! ```text
//!  client 198.51.100.7 ── gateway ── uplink0 ┐
//!  pod on another node 10.244.2.20 ── node-b ┘ the node ┬ pod1, pod2: routed pods 10.244.1.10, .11
//!                                                       └ cni0: bridge with ports port1, port2: pods 10.245.1.10, .11
//! ```

use std::net::IpAddr;

use proxy_agent::model::IpFamily;

use super::build::Mac;

/// A device of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name.
    pub name: &'static str,
    /// Index.
    pub ifindex: u32,
    /// Its own MAC.
    pub mac: Mac,
    /// Who is on the other side.
    pub peer: Mac,
}

const fn mac(last: u8) -> Mac {
    [2, 0, 0, 0, 0, last]
}

/// The node's own: what leaves by it arrives on it. Its index is the same in every network namespace.
pub const LOOPBACK: Device = Device { name: "lo", ifindex: 1, mac: [0; 6], peer: [0; 6] };
/// The way out; its peer is the gateway.
pub const UPLINK: Device = Device { name: "uplink0", ifindex: 11, mac: mac(0x11), peer: mac(0xfe) };
/// The host's end of the first routed pod.
pub const POD1: Device = Device { name: "pod1", ifindex: 21, mac: mac(0x21), peer: mac(0xa1) };
/// The host's end of the second routed pod.
pub const POD2: Device = Device { name: "pod2", ifindex: 22, mac: mac(0x22), peer: mac(0xa2) };
/// The bridge.
pub const BRIDGE: Device = Device { name: "cni0", ifindex: 30, mac: mac(0x30), peer: mac(0x30) };
/// The host's end of the first bridged pod.
pub const PORT1: Device = Device { name: "port1", ifindex: 31, mac: mac(0x31), peer: mac(0xb1) };
/// The host's end of the second bridged pod.
pub const PORT2: Device = Device { name: "port2", ifindex: 32, mac: mac(0x32), peer: mac(0xb2) };
/// The MAC of the other node, reached by the uplink.
pub const NODE_B_MAC: Mac = mac(0x0b);
/// A station on the bridge that is neither a pod's nor the host's.
pub const STRANGER_MAC: Mac = mac(0xee);
/// This node's name in manifests.
pub const NODE_NAME: &str = "node-a";
/// The other node's.
pub const OTHER_NODE: &str = "node-b";

macro_rules! addresses {
    ($($(#[doc = $doc:literal])+ $name:ident = $v4:literal, $v6:literal;)+) => { $(
        $(#[doc = $doc])+
        pub fn $name(family: IpFamily) -> IpAddr {
            let text = match family {
                IpFamily::V4 => $v4,
                IpFamily::V6 => $v6,
            };
            text.parse().expect("the addresses of the test world are well-formed")
        }
    )+ };
}

addresses! {
    /// The Service's ClusterIP.
    vip = "10.96.0.10", "fd00:10:96::10";
    /// Another Service's ClusterIP.
    other_vip = "10.96.0.20", "fd00:10:96::20";
    /// A client outside the cluster.
    client = "198.51.100.7", "2001:db8:51::7";
    /// The node, on its uplink.
    node = "192.0.2.1", "2001:db8::1";
    /// The routed pods, and the node's address on their devices.
    pod1 = "10.244.1.10", "fd00:10:244:1::10";
    /// The second.
    pod2 = "10.244.1.11", "fd00:10:244:1::11";
    /// A pod on the other node.
    remote = "10.244.2.20", "fd00:10:244:2::20";
    /// A second one.
    remote2 = "10.244.2.21", "fd00:10:244:2::21";
    /// The bridge's own address.
    bridge = "10.245.1.1", "fd00:10:245:1::1";
    /// The first bridged pod.
    port1 = "10.245.1.10", "fd00:10:245:1::10";
    /// The second.
    port2 = "10.245.1.11", "fd00:10:245:1::11";
    /// An address on the bridge's network of which the node knows no MAC.
    silent = "10.245.1.99", "fd00:10:245:1::99";
    /// An address that no route leads to.
    nowhere = "203.0.113.9", "2001:db8:dead::9";
}

/// The commands of `ip -batch` that make the node.
pub(super) fn commands() -> String {
    let mut lines = vec!["link set lo up".to_owned()];
    let show = |mac: Mac| mac.map(|b| format!("{b:02x}")).join(":");
    for device in [UPLINK, POD1, POD2, BRIDGE, PORT1, PORT2] {
        let Device { name, ifindex, mac, .. } = device;
        // The other end of a cable only keeps the carrier: no packet is ever sent.
        let kind = if device == BRIDGE { "bridge".to_owned() } else { format!("veth peer name {name}-far") };
        lines.push(format!("link add {name} index {ifindex} address {} type {kind}", show(mac)));
    }
    for port in [PORT1, PORT2] {
        lines.push(format!("link set {} master {}", port.name, BRIDGE.name));
    }
    for device in [UPLINK, POD1, POD2, BRIDGE, PORT1, PORT2] {
        lines.push(format!("link set {} up", device.name));
        if device != BRIDGE {
            lines.push(format!("link set {}-far up", device.name));
        }
    }
    for family in IpFamily::ALL {
        let v4 = family == IpFamily::V4;
        let (network, host) = if v4 { (24, 32) } else { (64, 128) };
        let nodad = if v4 { "" } else { " nodad" };
        lines.push(format!("address add {}/{network} dev {}{nodad}", node(family), UPLINK.name));
        lines.push(format!("address add {}/{network} dev {}{nodad}", bridge(family), BRIDGE.name));
        let gateway = if v4 { "192.0.2.254" } else { "2001:db8::fe" };
        let node_b = if v4 { "192.0.2.2" } else { "2001:db8::2" };
        // No default route: a test needs somewhere that nothing leads to.
        let outside = if v4 { "198.51.100.0/24" } else { "2001:db8:51::/64" };
        let there = if v4 { "10.244.2.0/24" } else { "fd00:10:244:2::/64" };
        for (addr, device, mac) in [
            (gateway.to_owned(), UPLINK, UPLINK.peer),
            (node_b.to_owned(), UPLINK, NODE_B_MAC),
            (pod1(family).to_string(), POD1, POD1.peer),
            (pod2(family).to_string(), POD2, POD2.peer),
            (port1(family).to_string(), BRIDGE, PORT1.peer),
            (port2(family).to_string(), BRIDGE, PORT2.peer),
        ] {
            lines.push(format!("neigh add {addr} lladdr {} dev {} nud permanent", show(mac), device.name));
        }
        lines.push(format!("route add {outside} via {gateway}"));
        lines.push(format!("route add {there} via {node_b}"));
        for (addr, device) in [(pod1(family), POD1), (pod2(family), POD2)] {
            lines.push(format!("route add {addr}/{host} dev {} src {}", device.name, node(family)));
        }
    }
    lines.join("\n")
}
