//! Devices that not every kernel can make: bonds, VLANs, IPIP, netkit. A case whose devices this kernel lacks is not run, and
//! says so; Debian's kernels, which the kernels tier boots, have them all (netkit from 6.8).

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
            let on: &[&str] = if **kind == "vlan" { &["link", "lo"] } else { &[] };
            let id: &[&str] = if **kind == "vlan" { &["id", "7"] } else { &[] };
            let words = [&["link", "add"], on, &["name", "probe", "type", kind], id].concat();
            let made = ns.output("ip", &words);
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
    let lab = &cluster.lab;
    for Combo { v6, proto } in Combo::ALL {
        for (what, remote) in [("here", false), ("there", true)] {
            let service = cluster.masqueraded_service(what);
            let endpoints = if remote { service.remotes() } else { service.pods(&[0]) };
            let (vip, port) = (Ask::new(proto, service.vip(v6)), Ask::new(proto, service.node_port(v6)));
            service.serve(&endpoints, &lab.client.ns, vip)?;
            let ways: [(&Host, Ask); 4] = [(&lab.client, vip), (&lab.node, vip), (&lab.ext, vip), (&lab.ext, port)];
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

fn run(cell: &str, wire: impl FnOnce(&Lab) -> Result<()>, case: impl FnOnce(&Cluster) -> Result<()>) {
    let cluster = Cluster::rewired(Cell::named(cell), AgentOptions::default(), wire);
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
        let roles = roles(cluster)?;
        for name in ["tunnel4", "tunnel6"] {
            ensure!(roles.get(name).is_some_and(|(role, _)| role == "tunnel"), "{roles:?}");
        }
        Ok(())
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
        let client = &cluster.lab.client;
        let roles = roles(cluster)?;
        ensure!(roles.get(&client.node_device).is_some_and(|(role, _)| role == "pod"), "{roles:?}");
        Ok(())
    });
}
