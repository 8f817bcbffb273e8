//! Devices whose packets begin with the IP header: a tun as the uplink, and a tun as the way to pods of other nodes.
//!
//! The cases are those of the other files: who asks need not know what the packets travel in.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use fairlead_lab::{
    AgentOptions, Ask, Capture, Host, Lab, Load, LoadPlan, Proto, server::wait_until, topology::OVERLAY, tun::TunPair,
};
use fairlead_tests::listed;
use proxy_common::{ABI_VERSION, Outcome};

use crate::cell::{Cell, Cluster, Combo, PATIENCE, TARGET, answered, eventually};

/// Tests of cases of other files, in these cells.
macro_rules! cells {
    ($($module:ident::$case:ident: $($cell:ident)+;)+) => {
        $(mod $case {
            use crate::cell::Cell;
            $(#[test]
            fn $cell() {
                Cell::named(stringify!($cell)).run(crate::$module::$case);
            })+
        })+
    };
}

cells! {
    cluster_ip::a_pod_reaches_remote_endpoints: tun_uplink_invalid_drop tun_overlay_conntrack;
    cluster_ip::a_node_process_reaches_local_endpoints: tun_uplink_plain tun_uplink_invalid_drop;
    cluster_ip::pitfall_p1_3_a_node_process_reaches_remote_endpoints: tun_uplink_plain tun_overlay_conntrack tun_overlay_invalid_drop;
    cluster_ip::a_node_process_hears_its_answers_where_the_node_is_an_endpoint: tun_uplink_invalid_drop;
    cluster_ip::an_external_host_reaches_a_cluster_ip_through_the_node: tun_uplink_invalid_drop;
    node_port::a_local_node_port_keeps_the_clients_address: tun_uplink_invalid_drop;
    node_port::rule_92_a_process_of_the_node_reaches_its_own_node_port: tun_uplink_plain tun_overlay_conntrack;
    masquerade::rule_68_a_client_outside_is_masqueraded_to_every_endpoint: tun_uplink_plain tun_overlay_conntrack
        tun_overlay_invalid_drop;
    masquerade::a_datagram_in_fragments_arrives_both_ways: tun_uplink_plain tun_uplink_invalid_drop;
    masquerade::pitfall_p1_4_a_narrow_link_to_the_endpoint_is_told_to_the_client: tun_uplink_invalid_drop;
    reject::rule_54_a_service_without_endpoints_is_refused_at_once: tun_uplink_plain tun_uplink_invalid_drop;
    payload::large_transfers_arrive_whole: tun_uplink_invalid_drop;
    flat::a_narrow_overlay_is_told_to_the_client: tun_overlay_conntrack;
    flat::a_remote_pod_asks_through_the_overlay: tun_overlay_conntrack;
}

/// The overlay's MTU is smaller than everybody else's.
pub(crate) fn a_narrow_overlay_is_told_to_the_client(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    const SIZE: usize = 1 << 18;
    if proto == Proto::Udp {
        return Ok(());
    }
    let (service, lab) = (cluster.masqueraded_service("narrow-overlay"), &cluster.lab);
    service.serve(&service.remotes(), &lab.ext.ns, Ask::new(proto, service.node_port(v6)))?;
    let before = cluster.outcomes();
    let ways: [(&Host, SocketAddr); 4] = [
        (&lab.client, service.vip(v6)),
        (&lab.client, service.node_port(v6)),
        (&lab.ext, service.node_port(v6)),
        (&lab.node, service.vip(v6)),
    ];
    // Narrower than the endpoints know it to be.
    let set = |mtu: &str| lab.node.ns.output("ip", &["link", "set", OVERLAY, "mtu", mtu]);
    set("1300")?;
    let done = ways.into_iter().try_for_each(|(from, to)| {
        let opened = Ask::new(proto, to).open(&from.ns)?;
        let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", from.name))?;
        let attempt = conversation.ask_bulk(SIZE, SIZE);
        ensure!(attempt.outcome.answer_at_last().is_some(), "{} → {to}: {attempt}", from.name);
        Ok(())
    });
    set("1400")?;
    done?;
    let told = cluster.outcomes_since(&before);
    ensure!(told.contains(Outcome::IcmpError.name()), "nobody was told: {told}");
    Ok(())
}

/// A request that arrives by the overlay: for a pod of the node, and for the very pod that asks.
pub(crate) fn a_remote_pod_asks_through_the_overlay(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, ext) = (cluster.service("from-overlay"), &cluster.lab.ext.ns);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &cluster.lab.client.ns, ask)?;
    let (remote, vip) = (Lab::remote_pods(v6)[0], service.vip(v6).ip().to_string());
    let ask = ask.from(SocketAddr::new(remote, 0));
    ext.output("ip", &["route", "add", &vip, "dev", OVERLAY])?;
    ensure!(answered(ext, ask)?.server == "pod-a");
    service.endpoints(&service.remotes().into_iter().filter(|e| e.ip == remote).collect::<Vec<_>>())?;
    let seen = eventually("an answer of the pod itself", ext, ask, |a| a.outcome.server() == Some("remote-0"))?;
    let own = cluster.lab.ip_towards_remote_pods(v6);
    ensure!(seen.outcome.answer().is_some_and(|answer| answer.peer.ip() == own), "{seen}");
    ext.output("ip", &["route", "del", &vip, "dev", OVERLAY]).map(drop)
}

/// A pod's device may be a tun, where `--devices` says so: what the pod sends to itself goes straight back without a frame.
#[test]
fn a_pod_behind_a_tun_reaches_itself_past_the_stack() {
    let args = vec![format!("--devices={OVERLAY}=pod").into()];
    let cluster = Cluster::own(Cell::named("tun_overlay_conntrack"), AgentOptions { args, ..AgentOptions::default() });
    let (service, ext) = (cluster.service("behind-a-tun"), &cluster.lab.ext.ns);
    for Combo { v6, proto } in Combo::ALL {
        let pod = Lab::remote_pods(v6)[0];
        let ask = Ask::new(proto, service.vip(v6)).from(SocketAddr::new(pod, 0));
        ext.output("ip", &["route", "replace", &ask.to.ip().to_string(), "dev", OVERLAY]).expect("a route");
        let itself: Vec<_> = service.remotes().into_iter().filter(|endpoint| endpoint.ip == pod).collect();
        service.serve(&itself, ext, ask).expect("an answer of the pod itself");
        let capture = Capture::start(ext, OVERLAY).expect("a capture");
        let answer = answered(ext, ask).expect("another answer");
        assert_eq!(answer.peer.ip(), cluster.lab.ip_towards_remote_pods(v6), "{proto:?} v6={v6}");
        let packets = capture.stop();
        let came = packets.iter().filter(|p| !p.outgoing && p.sockets().is_some_and(|(_, to)| to.port() == TARGET));
        let hops: Vec<_> = came.map(|packet| packet.ttl).collect();
        assert!(!hops.is_empty() && hops.iter().all(|ttl| *ttl == 64), "{proto:?} v6={v6}: routed, with {hops:?}");
    }
}

#[test]
fn connections_over_a_tun_outlive_restarts() {
    let cluster = Cluster::own(Cell::named("tun_uplink_invalid_drop"), AgentOptions::default());
    let (service, ext) = (cluster.masqueraded_service("restarts"), &cluster.lab.ext.ns);
    let to = service.node_port(true);
    let endpoints = [service.pods(&[0]), service.remotes()].concat();
    service.serve(&endpoints, ext, Ask::new(Proto::Tcp, to)).expect("a NodePort");
    let plan = |fresh| {
        let (workers, pause) = (1, Duration::from_micros(500));
        LoadPlan { fresh, workers, pause, ..LoadPlan::new(Proto::Tcp, to) }
    };
    let loads = [false, true].map(|fresh| Load::start(ext, plan(fresh)).expect("a load"));
    for _ in 0..3 {
        let mut agent = cluster.agent.lock().expect("no other case uses this cluster");
        agent.stop().expect("it ends");
        agent.restart(&cluster.lab).expect("it starts again");
        drop(agent);
        assert!(loads.iter().all(Load::turn_over), "a request hangs");
    }
    for report in loads.map(Load::stop) {
        // A thread carries the packets, on a machine that verifies programs meanwhile.
        assert!(report.unanswered().is_empty(), "{report}\n{}", cluster.agent_log_tail());
    }
    // A clean-up leaves nothing behind: what the tun brings is nobody's.
    let mut agent = cluster.agent.lock().expect("no other case uses this cluster");
    agent.stop().expect("it ends");
    let said = agent.fairlead(&["cleanup"]).expect("it cleans up");
    assert!(said.contains("flat_ingress_stub") && said.contains("PROGRAMS_FLAT"), "{said}");
    assert!(!agent.pin_path.exists(), "{} is left", agent.pin_path.display());
    // The kernel takes a link down some time after its last pin has gone.
    eventually("a refusal", ext, Ask::new(Proto::Tcp, to), |a| a.outcome == fairlead_lab::Outcome::Refused)
        .expect("nobody serves after a clean-up");
    agent.restart(&cluster.lab).expect("it starts again");
    drop(agent);
    eventually("an answer after a new start", ext, Ask::new(Proto::Tcp, to), |a| a.outcome.answer().is_some())
        .expect("an answer");
}

/// Programs for flat devices are loaded when the first one comes, and serve those that come after it.
#[test]
fn pitfall_p1_11_a_tun_that_comes_and_goes_is_served_each_time() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let (node, ext) = (&cluster.lab.node.ns, &cluster.lab.ext.ns);
    let said = |what: &str| {
        let agent = cluster.agent.lock().expect("no other case uses this cluster");
        agent.log_text().contains(what)
    };
    let served = |wanted: bool| {
        let agent = cluster.agent.lock().expect("no other case uses this cluster");
        let row = listed::device(&agent, "come").expect("a list");
        row.is_some_and(|row| row["ingress"] != "none" && row["egress"] != "none" && row["role"] == "tunnel") == wanted
    };
    assert!(!said("without an Ethernet header"), "programs that nobody needs yet");
    for round in 0..2 {
        let tun = TunPair::new((node, "come"), (ext, "come")).expect("a pair of tun devices");
        node.output("ip", &["link", "set", "come", "up"]).expect("it comes up");
        assert!(wait_until(PATIENCE, || served(true)), "round {round}: not served\n{}", cluster.agent_log_tail());
        assert!(said("without an Ethernet header"));
        drop(tun);
        assert!(wait_until(PATIENCE, || served(false)), "round {round}: still listed\n{}", cluster.agent_log_tail());
    }
}

/// The place of one of their pins is taken: the programs do not load, which is told once, until they do.
#[test]
fn programs_that_do_not_load_for_a_tun_are_tried_again() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let pin_path = cluster.agent.lock().expect("no other case uses this cluster").pin_path.clone();
    let taken = pin_path.join(format!("v{ABI_VERSION}/programs/flat_ingress_stub"));
    std::fs::create_dir(&taken).expect("its place is taken");
    cluster.lab.node.ns.output("ip", &["tuntap", "add", "dev", "flat0", "mode", "tun"]).expect("a tun");
    cluster.lab.node.ns.output("ip", &["link", "set", "flat0", "up"]).expect("it is up");
    let said = |what: &str| {
        let agent = cluster.agent.lock().expect("no other case uses this cluster");
        agent.log_text().lines().filter(|line| line.contains(what)).count()
    };
    let (cause, effect) = ("Ethernet header do not load; they are tried again", "cannot attach at ingress of flat0");
    assert!(wait_until(PATIENCE, || said(cause) == 1 && said(effect) == 1), "{}", cluster.agent_log_tail());
    // Each second the device is tried again, and the programs after five.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!((said(cause), said(effect)), (1, 1), "{}", cluster.agent_log_tail());
    std::fs::remove_dir(&taken).expect("its place is free");
    assert!(wait_until(PATIENCE, || said("device served device=flat0") == 1), "{}", cluster.agent_log_tail());
}
