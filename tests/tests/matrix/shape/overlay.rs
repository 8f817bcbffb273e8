//! Nodes that reach each other's pods through a tunnel.

use std::net::IpAddr;

use anyhow::Result;
use fairlead_lab::{Lab, Pod, netns, topology::UPLINK, tun::TunPair};
use fairlead_tests::nodes::Nodes;

/// All pods of the cluster.
const CLUSTER: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// A tunnel's device has the first address of its node's pods.
pub(super) fn own(lab: &Lab, v6: bool) -> IpAddr {
    let cidr = &lab.pod_cidrs()[usize::from(v6)];
    cidr.split('/').next().and_then(|ip| ip.parse().ok()).unwrap_or_else(|| panic!("{cidr} is no network"))
}

/// flannel: the ports of its bridge send back what came in by them, as its configuration asks for.
pub(super) fn flannel(nodes: &Nodes) -> Result<()> {
    vxlan(nodes, "flannel")?;
    for lab in &nodes.labs {
        let hairpin = |pod: &Pod| format!("link set {} type bridge_slave hairpin on\n", pod.node_device);
        lab.node.ns.ip_batch(&lab.all_pods().map(hairpin).collect::<String>())?;
        lab.node.ns.nft(&masquerade(lab))?;
    }
    Ok(())
}

/// Calico in its VXLAN mode.
pub(super) fn calico(nodes: &Nodes) -> Result<()> {
    vxlan(nodes, "vxlan")?;
    nodes.labs.iter().try_for_each(nat_outgoing)
}

/// One device for each family; neighbours and forwarding entries are written by the CNI's daemon.
fn vxlan(nodes: &Nodes, name: &str) -> Result<()> {
    let [first, second] = &nodes.labs;
    for (lab, other) in [(first, second), (second, first)] {
        let mac = |lab: &Lab, v6: bool| format!("0a:58:f1:a7:{:02x}:{:02x}", lab.number, u8::from(v6));
        let (mut lines, mut forwarding) = (String::new(), String::new());
        // Of one network identifier there is one device a port.
        for (v6, device, port) in [(false, format!("{name}.4"), 4789), (true, format!("{name}.6"), 4790)] {
            let (length, nodad) = if v6 { (128, "nodad") } else { (32, "") };
            let (to, via, peer) = (&other.pod_cidrs()[usize::from(v6)], own(other, v6), mac(other, v6));
            lines += &format!(
                "link add {device} address {} type vxlan id 1 local {} dev {UPLINK} nolearning dstport {port}\n\
                 addr add {}/{length} dev {device} {nodad}\nlink set {device} up\n\
                 neigh replace {via} lladdr {peer} dev {device} nud permanent\n\
                 route del {to}\nroute add {to} via {via} dev {device} onlink\n",
                mac(lab, v6),
                lab.node.ip(v6),
                own(lab, v6),
            );
            forwarding += &format!("fdb append {peer} dev {device} dst {}\n", other.node.ip(v6));
        }
        lab.node.ns.ip_batch(&lines)?;
        netns::feed(lab.node.ns.command("bridge").args(["-batch", "-"]), &forwarding)?;
    }
    Ok(())
}

/// Calico's `natOutgoing`: what pods send to others than pods leaves with the node's address.
fn nat_outgoing(lab: &Lab) -> Result<()> {
    let [v4, v6] = CLUSTER;
    lab.node.ns.nft(&format!(
        "table inet nat_outgoing {{\n chain postrouting {{ type nat hook postrouting priority srcnat;\n\
         ip saddr {v4} ip daddr != {v4} masquerade\n ip6 saddr {v6} ip6 daddr != {v6} masquerade\n }}\n}}\n"
    ))
}

/// What flannel adds to POSTROUTING.
fn masquerade(lab: &Lab) -> String {
    let mut text = String::new();
    for (v6, family, multicast) in [(false, "ip", "224.0.0.0/4"), (true, "ip6", "ff00::/8")] {
        let (all, own) = (CLUSTER[usize::from(v6)], &lab.pod_cidrs()[usize::from(v6)]);
        text += &format!(
            "table {family} flannel {{\n chain postrouting {{ type nat hook postrouting priority srcnat;\n\
             meta mark & 0x4000 == 0x4000 return\n\
             {family} saddr {own} {family} daddr {all} return\n\
             {family} saddr {all} {family} daddr {own} return\n\
             {family} saddr != {all} {family} daddr {own} return\n\
             {family} saddr {all} {family} daddr != {multicast} masquerade fully-random\n\
             {family} saddr != {all} {family} daddr {all} masquerade fully-random\n }}\n}}\n"
        );
    }
    text
}

/// A tunnel whose packets begin with their IP header, as those of IPIP and WireGuard do, with Calico's rule.
pub(super) fn tun(nodes: &Nodes) -> Result<TunPair> {
    let [first, second] = &nodes.labs;
    let tunnel = TunPair::new((&first.node.ns, "tun0"), (&second.node.ns, "tun0"))?;
    for (lab, other) in [(first, second), (second, first)] {
        let mut lines = "link set tun0 mtu 1480 up\n".to_owned();
        for v6 in [false, true] {
            let (length, nodad) = if v6 { (128, "nodad") } else { (32, "") };
            lines += &format!(
                "addr add {}/{length} dev tun0 {nodad}\nroute replace {} dev tun0 src {}\n",
                own(lab, v6),
                other.pod_cidrs()[usize::from(v6)],
                own(lab, v6)
            );
        }
        lab.node.ns.ip_batch(&lines)?;
        nat_outgoing(lab)?;
    }
    Ok(tunnel)
}
