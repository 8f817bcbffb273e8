//! A node of two uplinks, whose pods' packets leave by the second one as a CNI's policy rules say: the replies to what
//! came in by the first one leave by the first one with `--reply-mark`, and by the second one without.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::Result;
use fairlead_lab::{AgentOptions, Ask, Lab, Outcome, Proto, server::wait_until, topology::UPLINK};
use fairlead_tests::second_uplink::{self, SECOND};

use proxy_agent::{
    devices::{netlink, replies::Rule, rules},
    model::IpFamily,
};

use crate::cell::{Cell, Cluster, Combo, PATIENCE, answered, eventually};

const TABLE: u32 = 1001;

/// The network beyond takes no packet from the node's first address on the second wire.
fn two_uplinks(lab: &Lab) -> Result<()> {
    second_uplink::plug(lab, SECOND)?;
    second_uplink::rules(lab, TABLE, None)?;
    for (v6, (node, ext, prefix)) in
        [(false, ("198.18.1.1", "198.18.1.2", 24)), (true, ("2001:db8:1801::1", "2001:db8:1801::2", 64))]
    {
        let nodad = if v6 { " nodad" } else { "" };
        lab.node.ns.ip_batch(&format!("address add {node}/{prefix} dev {SECOND}{nodad}"))?;
        lab.ext.ns.ip_batch(&format!("address add {ext}/{prefix} dev {SECOND}{nodad}"))?;
        lab.node.ns.ip_batch(&format!("route add default via {ext} dev {SECOND} table {TABLE}"))?;
        lab.ext.ns.nft(&format!(
            "table inet asymmetry{} {{\ncounter astray {{}}\nchain in {{\ntype filter hook prerouting priority raw;\n\
             iifname {SECOND} {} saddr {} counter name astray drop\n}}\n}}",
            u8::from(v6),
            if v6 { "ip6" } else { "ip" },
            lab.node.ip(v6)
        ))?;
    }
    Ok(())
}

fn cluster(cell: &str, args: &[&str]) -> Cluster {
    let args = args.iter().map(Into::into).collect();
    Cluster::rewired(Cell::named(cell), AgentOptions { args, ..AgentOptions::default() }, two_uplinks)
}

/// Packets that the network beyond has dropped, because they came by the wrong wire.
fn astray(lab: &Lab, v6: bool) -> Result<u64> {
    lab.ext.ns.nft_counter(&format!("asymmetry{}", u8::from(v6)), "astray")
}

fn own_rules(cluster: &Cluster) -> String {
    ["-4", "-6"].map(|family| cluster.lab.node.ns.output("ip", &[family, "rule"]).unwrap_or_default()).concat()
}

fn replies_by_the_uplink_of_their_requests(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let ext = &cluster.lab.ext;
    // The reply of the second one is addressed to the node first, and is the client's only then.
    for service in [cluster.node_port_service("two-local"), cluster.masqueraded_service("two")] {
        let ask = Ask::new(proto, service.node_port(v6));
        service.serve(&service.pods(&[0]), &ext.ns, ask)?;
        for outside in Lab::external_clients(v6).into_iter().chain([ext.ip(v6)]) {
            for _ in 0..4 {
                answered(&ext.ns, ask.from(SocketAddr::new(outside, 0)))?;
            }
        }
    }
    Ok(())
}

/// At the pod's device both kinds of reverse path filter, one that asks with the mark. At the uplink it is loose, as that
/// CNI makes it: what comes in there to a pod would be answered by the other one, as far as the routes know.
#[test]
fn pitfall_p1_5_replies_leave_by_the_uplink_of_their_requests() {
    for cell in ["routed_conntrack", "bridge_nf_invalid_drop"] {
        let cluster = cluster(cell, &["--reply-mark=0x1000"]);
        let node = &cluster.lab.node.ns;
        node.sysctl(&format!("net.ipv4.conf.{UPLINK}.rp_filter"), "2").unwrap();
        for device in ["all", UPLINK, &cluster.lab.pods[0].node_device] {
            node.sysctl(&format!("net.ipv4.conf.{device}.src_valid_mark"), "1").unwrap();
        }
        for combo in Combo::ALL {
            replies_by_the_uplink_of_their_requests(&cluster, combo)
                .unwrap_or_else(|error| panic!("{cell} {combo:?}: {error:#}\n{}", cluster.agent_log_tail()));
        }
        assert_eq!(cluster.lab.invalid_packets().unwrap(), 0, "{cell}");
        assert_eq!([false, true].map(|v6| astray(&cluster.lab, v6).unwrap()), [0; 2], "{cell}: IPv4 and IPv6");
    }
}

/// What the test above would show without the option.
#[test]
fn without_a_mark_replies_go_as_routed() {
    let cluster = cluster("routed_plain", &[]);
    let (service, ext) = (cluster.node_port_service("one"), &cluster.lab.ext);
    for v6 in [false, true] {
        cluster.manifests.apply(&service.spec, &service.pods(&[0])).unwrap();
        cluster.wait_for_endpoints(&service.spec, &[0]).unwrap();
        let from = SocketAddr::new(Lab::external_clients(v6)[0], 0);
        let ask = Ask::new(Proto::Tcp, service.node_port(v6)).from(from);
        eventually("silence", &ext.ns, ask, |attempt| attempt.outcome == Outcome::Timeout).unwrap();
        // Not because nobody has answered.
        assert!(astray(&cluster.lab, v6).unwrap() > 0, "v6={v6}: no answer came by the second uplink");
    }
    assert!(!own_rules(&cluster).contains("0x1000"), "{}", own_rules(&cluster));
}

#[test]
fn the_rules_follow_the_routes_and_go_with_cleanup() {
    let cluster = cluster("routed_plain", &["--reply-mark=0x3000", "--reply-mark-priority=100"]);
    let node = &cluster.lab.node.ns;
    let count = |what: &str| own_rules(&cluster).lines().filter(|line| line.contains(what)).count();
    let both = || (count("99:"), count("100:"));
    // Two uplinks and two families, a pair of rules each.
    assert!(wait_until(PATIENCE, || both() == (4, 4)), "{}", own_rules(&cluster));
    assert_eq!(count(&format!("0x2000/0x3000 lookup {TABLE}")), 2, "{}", own_rules(&cluster));
    node.ip_batch(&format!("route del default table {TABLE}")).unwrap();
    assert!(wait_until(PATIENCE, || both() == (3, 3)), "{}", own_rules(&cluster));

    let mut agent = cluster.agent.lock().unwrap();
    let check = agent.fairlead(&["check"]).unwrap();
    assert!(check.contains("rule for replies: IPv4 100: fwmark 0x1000/0x3000 lookup 254"), "{check}");
    agent.stop().unwrap();
    assert_eq!(both(), (3, 3), "they stay while nobody runs");
    // Of somebody who has our number for another purpose.
    node.output("ip", &["rule", "add", "fwmark", "0x1000", "lookup", "77", "priority", "50"]).unwrap();
    agent.restart(&cluster.lab).unwrap();
    assert!(wait_until(PATIENCE, || both() == (3, 3)), "{}", own_rules(&cluster));
    let rival = || agent.log_text().contains("another rule reads the bits of --reply-mark");
    assert!(wait_until(PATIENCE, rival), "{}", agent.log_text());
    agent.stop().unwrap();
    assert_eq!(both(), (3, 3), "they stay while nobody runs");
    let said = agent.fairlead(&["cleanup"]).unwrap();
    assert!(said.contains("rule for replies: removed IPv4 100: fwmark 0x1000/0x3000 lookup 254"), "{said}");
    assert_eq!(both(), (0, 0), "{}", own_rules(&cluster));
    // Those of others stay.
    assert_eq!((count("512:"), count("1536:")), (2, 2), "{}", own_rules(&cluster));
}

/// The kernel takes no rule of IPv6 that asks no table.
#[test]
fn a_rule_that_the_kernel_refuses_keeps_no_other_one_back() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let rule =
        |table| Rule { family: IpFamily::V6, priority: 99, mark: 0x1000, mask: 0x1000, table, not_default: false };
    let wanted = BTreeSet::from([rule(0), rule(TABLE)]);
    let set = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async { rules::set(&netlink::questions().expect("a socket"), &wanted).await })
    };
    let changed = cluster.lab.node.ns.run(set).expect("the namespace is there").expect("rules are read");
    assert_eq!(changed.changes, [format!("added IPv6 99: fwmark 0x1000/0x1000 lookup {TABLE}")]);
    let [failed] = &changed.failed[..] else { panic!("{changed:?}") };
    assert!(failed.to_string().starts_with("cannot add the rule IPv6 99: fwmark 0x1000/0x1000 lookup 0: "), "{failed}");
    assert!(own_rules(&cluster).contains(&format!("lookup {TABLE}")), "{}", own_rules(&cluster));
}
