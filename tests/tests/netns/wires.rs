//! Devices that not every kernel can make: bonds, VLANs, IPIP, WireGuard, Geneve, macvlan, ipvlan, netkit. A case whose devices
//! this kernel lacks is not run, and says so; Debian's kernels, which the kernels tier boots, have them all (netkit from 6.8).

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    AgentOptions, Ask, Host, Lab, Namespace, Outcome, janitor,
    topology::{POD_CIDRS, REMOTE_CIDRS, UPLINK},
};
use fairlead_tests::{listed, not_run};

use crate::cell::{Cell, Cluster, Combo, answered, eventually};

/// True if the kernel makes devices of these kinds; else the test is not run.
fn can_make(kinds: &[&str]) -> bool {
    static PROBES: AtomicU32 = AtomicU32::new(0);
    let name = format!("{}probe-{}", janitor::own_prefix(), PROBES.fetch_add(1, Ordering::Relaxed));
    let ns = Namespace::create(&name).expect("a namespace");
    let lacking: Vec<_> = kinds
        .iter()
        .filter(|kind| {
            // What is wrong beside the kind is said after it.
            let made = ns.output("ip", &["link", "add", "name", "probe", "type", kind]);
            ns.output("ip", &["link", "del", "probe"]).ok();
            made.is_err_and(|error| format!("{error:#}").contains("Unknown device type"))
        })
        .copied()
        .collect();
    ns.delete();
    if !lacking.is_empty() {
        not_run::because(&format!("needs {}, which this kernel does not make", lacking.join(" and ")));
    }
    lacking.is_empty()
}

/// A Service of pods here and elsewhere is asked by everybody, and each endpoint answers.
fn is_served(cluster: &Cluster) -> Result<()> {
    is_served_to(cluster, Reach::Everybody)
}

/// Whose packets the node gets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Whatever is routed to it.
    Everybody,
    /// From outside, what is addressed to the node itself.
    OwnAddress,
}

fn is_served_to(cluster: &Cluster, reach: Reach) -> Result<()> {
    let lab = &cluster.lab;
    for Combo { v6, proto } in Combo::ALL {
        for (what, remote) in [("here", false), ("there", true)] {
            let service = cluster.masqueraded_service(what);
            let endpoints = if remote { service.remotes() } else { service.pods(&[0]) };
            let (vip, port) = (Ask::new(proto, service.vip(v6)), Ask::new(proto, service.node_port(v6)));
            service.serve(&endpoints, &lab.ext.ns, port)?;
            let mut ways: Vec<(&Host, Ask)> = vec![(&lab.ext, port), (&lab.node, vip)];
            if reach == Reach::Everybody {
                ways.push((&lab.ext, vip));
            }
            // Its reply is addressed to the pod.
            if reach == Reach::Everybody || !remote {
                ways.push((&lab.client, vip));
            }
            for (from, ask) in ways {
                answered(&from.ns, ask).with_context(|| format!("{what}, v6={v6} {proto}, by {}", from.name))?;
            }
        }
    }
    Ok(())
}

/// Roles by name, and why.
fn roles(cluster: &Cluster) -> Result<BTreeMap<String, (String, String)>> {
    let agent = cluster.agent.lock().expect("no other case uses this cluster");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let rows = listed::rows(&agent, "devices")?.into_iter();
    Ok(rows.map(|row| (text(&row["name"]), (text(&row["role"]), text(&row["why"])))).collect())
}

fn has_role(cluster: &Cluster, device: &str, role: &str) -> Result<()> {
    let roles = roles(cluster)?;
    ensure!(roles.get(device).is_some_and(|(found, _)| found == role), "{device} is no {role}: {roles:?}");
    Ok(())
}

fn run(cell: &str, wire: impl FnOnce(&Lab) -> Result<()>, case: impl FnOnce(&Cluster) -> Result<()>) {
    run_with(&[], cell, wire, case);
}

fn run_with(
    args: &[&str],
    cell: &str,
    wire: impl FnOnce(&Lab) -> Result<()>,
    case: impl FnOnce(&Cluster) -> Result<()>,
) {
    let options = AgentOptions { args: args.iter().map(Into::into).collect(), ..AgentOptions::default() };
    let cluster = Cluster::rewired(Cell::named(cell), options, wire);
    let before = cluster.outcomes();
    if let Err(error) = case(&cluster) {
        panic!("{error:#}\n    outcomes: {}\n{}", cluster.outcomes_since(&before), cluster.agent_log_tail());
    }
}

/// The uplink becomes a bond, and a VLAN on it leads to the pods of other nodes.
fn bond_and_vlan(lab: &Lab) -> Result<()> {
    let (node, ext) = (&lab.node, &lab.ext);
    let vlan = |n: u8, to: &[&str; 2], via: u8| {
        format!(
            "link add link {UPLINK} name vlan7 type vlan id 7\nlink set vlan7 up\n\
             addr add 192.168.51.{n}/24 dev vlan7\naddr add fd00:192:168:51::{n}/64 dev vlan7 nodad\n\
             route replace {} via 192.168.51.{via}\nroute replace {} via fd00:192:168:51::{via}\n",
            to[0], to[1]
        )
    };
    node.ns.ip_batch(&format!(
        "addr flush dev {UPLINK}\nlink set {UPLINK} down\nlink set {UPLINK} name port0\n\
         link add {UPLINK} type bond mode active-backup\nlink set port0 master {UPLINK}\nlink set {UPLINK} up\n\
         link set port0 up\naddr add {}/24 dev {UPLINK}\naddr add {}/64 dev {UPLINK} nodad\n\
         route add default via {}\nroute add default via {}\n{}",
        node.v4,
        node.v6,
        ext.v4,
        ext.v6,
        vlan(10, &REMOTE_CIDRS, 1)
    ))?;
    ext.ns.ip_batch(&vlan(1, &POD_CIDRS, 10))
}

#[test]
fn a_bond_carries_the_programs_for_its_members_and_a_vlan_its_own() {
    if !can_make(&["bond", "vlan"]) {
        return;
    }
    run("routed_conntrack", bond_and_vlan, |cluster| {
        is_served(cluster)?;
        let roles = roles(cluster)?;
        let role = |name: &str| roles.get(name).map(|(role, why)| (role.as_str(), why.as_str()));
        ensure!(role(UPLINK).is_some_and(|(role, _)| role == "uplink"), "{roles:?}");
        ensure!(role("vlan7").is_some_and(|(role, _)| role == "uplink"), "{roles:?}");
        ensure!(role("port0") == Some(("none", "member of eth0, which carries the programs")), "{roles:?}");
        Ok(())
    });
}

/// Calico's way to pods of other nodes: one IPIP device for all of them, the other end told by the route.
fn ipip(lab: &Lab) -> Result<()> {
    let ends = [(&lab.node, &lab.ext, 1, REMOTE_CIDRS), (&lab.ext, &lab.node, 2, POD_CIDRS)];
    for (here, there, n, to) in ends {
        here.ns.ip_batch(&format!(
            "link add tunnel4 type ipip local {0}\nlink set tunnel4 up\naddr add 10.244.{n}.0/32 dev tunnel4\n\
             route replace {2} via {1} dev tunnel4 onlink src 10.244.{n}.0\n\
             link add tunnel6 type sit local {0} remote {1}\nlink set tunnel6 up\n\
             addr add fd00:10:244:{n}::/128 dev tunnel6 nodad\n\
             route replace {3} dev tunnel6 src fd00:10:244:{n}::\n",
            here.v4, there.v4, to[0], to[1]
        ))?;
    }
    Ok(())
}

#[test]
fn an_ipip_device_for_all_nodes_is_served_and_answers_where_nobody_serves() {
    if !can_make(&["ipip", "sit"]) {
        return;
    }
    run("routed_invalid_drop", ipip, |cluster| {
        is_served(cluster)?;
        let (lab, nobody) = (&cluster.lab, cluster.service("nobody"));
        for Combo { v6, proto } in Combo::ALL {
            let ask = Ask::new(proto, nobody.vip(v6));
            nobody.serve(&nobody.pods(&[0]), &lab.client.ns, ask)?;
            nobody.endpoints(&[])?;
            // What is asked through the tunnel is answered through it: the kernel must find the other end again.
            let vip = nobody.vip(v6).ip().to_string();
            let (node, way) = (lab.node.v4.to_string(), ["route", "replace", &vip]);
            let by: &[&str] = if v6 { &["dev", "tunnel6"] } else { &["via", &node, "dev", "tunnel4", "onlink"] };
            lab.ext.ns.output("ip", &[&way[..], by].concat())?;
            let ask = ask.from(SocketAddr::new(Lab::remote_pods(v6)[0], 0));
            eventually("a refusal", &lab.ext.ns, ask, |attempt| attempt.outcome == Outcome::Refused)?;
        }
        ["tunnel4", "tunnel6"].into_iter().try_for_each(|name| has_role(cluster, name, "tunnel"))
    });
}

/// Pods behind netkit in place of veth, as the kernel makes it by default: layer 3, and no program of its own.
fn netkit(lab: &Lab) -> Result<()> {
    for pod in lab.all_pods() {
        let (device, node) = (&*pod.node_device, &lab.node.ns);
        node.output("ip", &["link", "del", device])?;
        node.output("ip", &["link", "add", device, "type", "netkit"])?;
        let listing = node.output("ip", &["-json", "link", "show", "dev", device])?;
        let links: serde_json::Value = serde_json::from_str(&listing)?;
        let peer = links[0]["link"].as_str().context("the other end of netkit")?.to_owned();
        node.output("ip", &["link", "set", &peer, "netns", pod.ns.name(), "name", "eth0"])?;
        pod.ns.ip_batch(&format!(
            "link set eth0 up\naddr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad\n\
             route add default dev eth0\nroute add ::/0 dev eth0\n",
            pod.v4, pod.v6
        ))?;
        node.ip_batch(&format!(
            "link set {device} up\nroute add {}/32 dev {device}\nroute add {}/128 dev {device}\n",
            pod.v4, pod.v6
        ))?;
    }
    Ok(())
}

#[test]
fn pods_behind_netkit_are_served() {
    if !can_make(&["netkit"]) {
        return;
    }
    run("routed_invalid_drop", netkit, |cluster| {
        is_served(cluster)?;
        has_role(cluster, &cluster.lab.client.node_device, "pod")
    });
}

/// Calico's and flannel's encrypted way to pods of other nodes.
fn wireguard(lab: &Lab) -> Result<()> {
    let key = |n: u8| lab.node.ns.output("sh", &["-c", &format!("printf '%032d' {n} | base64")]);
    let public = |private: &str| lab.node.ns.output("sh", &["-c", &format!("echo {private} | wg pubkey")]);
    let keys = [key(1)?, key(2)?].map(|key| key.trim().to_owned());
    let ends = [(&lab.node, &lab.ext, 1, REMOTE_CIDRS), (&lab.ext, &lab.node, 2, POD_CIDRS)];
    for (here, there, n, to) in ends {
        let (own, other) = (&keys[n - 1], public(&keys[2 - n])?);
        here.ns.output("ip", &["link", "add", "wg0", "type", "wireguard"])?;
        let end = format!("{}:51820", there.v4);
        let peer = ["peer", other.trim(), "endpoint", &end, "allowed-ips", &to.join(",")].join(" ");
        let file = std::env::temp_dir().join(format!("{}-wg{n}", lab.id));
        let file = file.display();
        let set = format!("echo {own} > {file}; wg set wg0 listen-port 51820 private-key {file} {peer}; rm {file}");
        here.ns.output("sh", &["-e", "-c", &set])?;
        here.ns.ip_batch(&format!(
            "link set wg0 up\naddr add 10.244.{n}.0/32 dev wg0\naddr add fd00:10:244:{n}::/128 dev wg0 nodad\n\
             route replace {} dev wg0 src 10.244.{n}.0\nroute replace {} dev wg0 src fd00:10:244:{n}::\n",
            to[0], to[1]
        ))?;
    }
    Ok(())
}

#[test]
fn a_wireguard_device_is_served_as_a_tunnel() {
    if !can_make(&["wireguard"]) {
        return;
    }
    run("routed_invalid_drop", wireguard, |cluster| {
        is_served(cluster)?;
        has_role(cluster, "wg0", "tunnel")
    });
}

/// Antrea's and OVN's overlay, with a network of its own between the nodes.
fn geneve(lab: &Lab) -> Result<()> {
    let ends = [(&lab.node, &lab.ext, [1, 2], REMOTE_CIDRS), (&lab.ext, &lab.node, [2, 1], POD_CIDRS)];
    for (here, there, [n, other], to) in ends {
        here.ns.ip_batch(&format!(
            "link add gnv0 type geneve id 7 remote {}\nlink set gnv0 up\naddr add 10.245.0.{n}/24 dev gnv0\n\
             addr add fd00:10:245::{n}/64 dev gnv0 nodad\nroute replace {} via 10.245.0.{other}\n\
             route replace {} via fd00:10:245::{other}\n",
            there.v4, to[0], to[1]
        ))?;
    }
    Ok(())
}

#[test]
fn a_geneve_device_is_served_as_a_tunnel() {
    if !can_make(&["geneve"]) {
        return;
    }
    run("bridge_invalid_drop", geneve, |cluster| {
        is_served(cluster)?;
        has_role(cluster, "gnv0", "tunnel")
    });
}

/// The node itself uses a child of its device, as hosts do whose containers share the wire.
fn on_a_child(lab: &Lab, kind: &str) -> Result<()> {
    let (node, ext) = (&lab.node, &lab.ext);
    let [v4, v6] = REMOTE_CIDRS;
    let routes = |to: &str, via: &dyn std::fmt::Display| format!("route replace {to} via {via} dev child0\n");
    node.ns.ip_batch(&format!(
        "addr flush dev {UPLINK}\nlink add link {UPLINK} name child0 type {kind}\nlink set child0 up\n\
         addr add {}/24 dev child0\naddr add {}/64 dev child0 nodad\n{}{}{}{}",
        node.v4,
        node.v6,
        routes("default", &ext.v4),
        routes(v4, &ext.v4),
        routes("default", &ext.v6),
        routes(v6, &ext.v6)
    ))
}

fn a_child_is_the_uplink(kind: &str, mode: &str, reach: Reach) {
    if !can_make(&[kind]) {
        return;
    }
    // The lab's card is a veth, which without an address of its own would pass for a pod's.
    let parent = format!("--devices=!{UPLINK}");
    run_with(
        &[&parent],
        "routed_conntrack",
        |lab| on_a_child(lab, &format!("{kind} mode {mode}")),
        |cluster| {
            is_served_to(cluster, reach)?;
            has_role(cluster, "child0", "uplink")
        },
    );
}

#[test]
fn a_macvlan_child_with_the_nodes_address_is_its_uplink() {
    a_child_is_the_uplink("macvlan", "bridge", Reach::Everybody);
}

/// It shares its parent's MAC, so it gets what is addressed to its own addresses, and nothing that is routed to it.
#[test]
fn an_ipvlan_child_with_the_nodes_address_is_its_uplink() {
    a_child_is_the_uplink("ipvlan", "l2", Reach::OwnAddress);
}
