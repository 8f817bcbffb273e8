//! Somebody else masquerades as well: rules as ip-masq-agent writes them, for whatever leaves the pods' networks. They come
//! before ours in a packet's path, before or after ours in time.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{AgentOptions, Ask, Host, Server, manifest::EndpointSpec};

use crate::cell::{Cell, Cluster, Combo, TARGET, answered, eventually};

/// Its chain: what goes to the node itself or to a pod, here or elsewhere, keeps its source.
const RULES: &str = "table inet ip_masq_agent {
 chain masq {
  type nat hook postrouting priority srcnat
  fib daddr type local return
  ip daddr 10.244.0.0/16 return
  ip6 daddr fd00:10:244::/48 return
  masquerade
 }
}
";

/// Who answers outside of the pods' networks.
const OUTSIDE: &str = "outside";

#[test]
fn pitfall_p1_4_rules_of_a_masquerading_agent_that_were_there_first() {
    both_masquerade("routed_invalid_drop", true);
}

#[test]
fn pitfall_p1_4_rules_of_a_masquerading_agent_that_come_later() {
    both_masquerade("bridge_nf_invalid_drop", false);
}

fn both_masquerade(cell: &str, first: bool) {
    let rules = |cluster: &fairlead_lab::Lab| cluster.node.ns.nft(RULES);
    let cluster =
        Cluster::rewired(Cell::named(cell), AgentOptions::default(), |lab| if first { rules(lab) } else { Ok(()) });
    for combo in Combo::ALL {
        if !first {
            // A connection of before goes on under rules that concern it as well.
            sources(&cluster, combo, false).unwrap_or_else(|error| panic!("[{cell}] without them: {error:#}"));
            rules(&cluster.lab).expect("rules");
        }
        sources(&cluster, combo, true).unwrap_or_else(|error| panic!("[{cell}] with them: {error:#}"));
        if !first {
            cluster.lab.node.ns.nft("delete table inet ip_masq_agent\n").expect("no rules");
        }
    }
}

/// What each endpoint sees of each client. `rules`: whether they are there.
fn sources(cluster: &Cluster, Combo { v6, proto }: Combo, rules: bool) -> Result<()> {
    let lab = &cluster.lab;
    let outside = if v6 { lab.ext.v6.into() } else { lab.ext.v4.into() };
    let _server = Server::start(&lab.ext.ns, OUTSIDE, &[(proto, SocketAddr::new(outside, TARGET))])?;
    let before = lab.invalid_packets()?;
    let service = cluster.masqueraded_service("both");
    let (vip, port) = (Ask::new(proto, service.vip(v6)), Ask::new(proto, service.node_port(v6)));
    let client = if v6 { lab.client.v6.into() } else { lab.client.v4.into() };
    let node = lab.ip_towards_remote_pods(v6);
    let remote = service.remotes()[if v6 { 2 } else { 0 }].ip;
    let ways: [(&str, &Host, Ask, _, _); 4] = [
        // The agent's rules alone: a pod is not masqueraded on its way to a ClusterIP.
        ("a pod to the outside", &lab.client, vip, outside, if rules { node } else { client }),
        ("a pod to a pod", &lab.client, vip, remote, client),
        // Ours alone.
        ("a NodePort to a pod", &lab.ext, port, remote, node),
        // Both would: once is enough.
        ("a NodePort to the outside", &lab.ext, port, outside, node),
    ];
    for (what, from, ask, endpoint, seen) in ways {
        service.serve(&[EndpointSpec::elsewhere(endpoint)], &from.ns, ask).context(what)?;
        let server = if endpoint == remote { "remote-0" } else { OUTSIDE };
        eventually(what, &from.ns, ask, |attempt| attempt.outcome.server() == Some(server))?;
        for _ in 0..3 {
            let answer = answered(&from.ns, ask).context(what)?;
            ensure!(answer.peer.ip() == seen, "{what}: {} saw {}, not {seen}", answer.server, answer.peer);
        }
    }
    let invalid = lab.invalid_packets()? - before;
    ensure!(invalid == 0, "netfilter saw {invalid} INVALID packets");
    Ok(())
}
