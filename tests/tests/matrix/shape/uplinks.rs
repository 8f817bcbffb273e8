//! A second uplink, which pods use, as the AWS VPC CNI has it: policy routing by the pod's address, and marks that lead the
//! replies to what came in on the first uplink back to it. The network beyond drops what leaves by the wrong one.

use std::net::IpAddr;

use anyhow::Result;
use fairlead_lab::{Lab, topology::UPLINK};
use fairlead_tests::{
    nodes::Nodes,
    second_uplink::{self, SECOND},
};

/// The node's table for it.
const TABLE: u32 = 2;

/// The address of a host on the second network.
fn address(number: u8, v6: bool) -> IpAddr {
    if v6 { [0xfd00, 0x192, 0x168, 0x60, 0, 0, 0, u16::from(number)].into() } else { [192, 168, 60, number].into() }
}

/// The node's address on the second network.
pub(crate) fn second(lab: &Lab, v6: bool) -> IpAddr {
    address(host(lab), v6)
}

fn host(lab: &Lab) -> u8 {
    9 + lab.number
}

pub(super) fn wire(nodes: &Nodes) -> Result<()> {
    let ext = &nodes.labs[0].ext.ns;
    let mut lines = format!("link add name {SECOND} type bridge forward_delay 0\nlink set {SECOND} up\n");
    for (v6, length, nodad) in [(false, 24, ""), (true, 64, "nodad")] {
        lines += &format!("addr add {}/{length} dev {SECOND} {nodad}\n", address(1, v6));
    }
    ext.ip_batch(&lines)?;
    let [one, two] = &nodes.labs;
    for (lab, other) in [(one, two), (two, one)] {
        let far = format!("second-{}", lab.number);
        second_uplink::plug(lab, &far)?;
        lab.ext.ns.ip_batch(&format!("link set {far} master {SECOND}\n"))?;
        wire_node(lab, other)?;
    }
    nodes.labs.iter().try_for_each(Lab::wait_until_wired)?;
    for lab in &nodes.labs {
        let to = |v6: bool| {
            format!("route replace {} via {} dev {SECOND}\n", lab.pod_cidrs()[usize::from(v6)], second(lab, v6))
        };
        lab.ext.ns.ip_batch(&(to(false) + &to(true)))?;
    }
    // It routes between both networks,
    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        // A network of a cloud does not tell who else is on it.
        ("net.ipv4.conf.all.send_redirects", "0"),
        (&format!("net.ipv4.conf.{UPLINK}.send_redirects"), "0"),
        (&format!("net.ipv4.conf.{SECOND}.send_redirects"), "0"),
    ] {
        ext.sysctl(key, value)?;
    }
    // and who sends with an address that is not the uplink's own, or a pod's, is not heard.
    ext.nft(&format!(
        "table inet checked {{\n chain prerouting {{ type filter hook prerouting priority -400;\n\
         iifname {SECOND} ip saddr 192.168.50.0/24 drop\n iifname {SECOND} ip6 saddr fd00:192:168:50::/64 drop\n\
         iifname {UPLINK} ip saddr 10.244.0.0/16 drop\n iifname {UPLINK} ip6 saddr fd00:10:244::/48 drop\n }}\n}}\n"
    ))
}

fn wire_node(lab: &Lab, other: &Lab) -> Result<()> {
    let node = &lab.node.ns;
    let mut lines = String::new();
    for (v6, length, nodad) in [(false, 24, ""), (true, 64, "nodad")] {
        lines += &format!("addr add {}/{length} dev {SECOND} {nodad}\n", second(lab, v6));
        // Its network is known to its own table alone: what the node itself sends leaves by the first uplink.
        let on_link = if v6 { "fd00:192:168:60::/64" } else { "192.168.60.0/24" };
        lines += &format!(
            "route del {on_link} dev {SECOND}\nroute add {on_link} dev {SECOND} table {TABLE}\n\
             route add default via {} dev {SECOND} table {TABLE}\n",
            address(1, v6)
        );
        // Whose pods are where, only the network beyond knows.
        let to = &other.pod_cidrs()[usize::from(v6)];
        lines += &format!("route replace {to} via {} dev {UPLINK}\n", lab.ext.ip(v6));
    }
    node.ip_batch(&lines)?;
    second_uplink::rules(lab, TABLE, Some("0x80/0x80"))?;
    node.nft(&format!(
        "table inet aws {{\n chain prerouting {{ type filter hook prerouting priority mangle;\n\
         iifname {UPLINK} fib daddr . iif type local ct mark set ct mark or 0x80\n\
         iifname \"veth-*\" ct mark & 0x80 == 0x80 meta mark set mark or 0x80\n }}\n}}\n"
    ))
}
