//! Endpoints that come and go under load: no failure that a surviving endpoint could have served.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fairlead_lab::{AgentOptions, Ask, Load, LoadPlan, Proto, Report, Server, Shape};

use crate::cell::{Cell, Cluster, TARGET};

/// Connections of one run.
const CONNECTIONS: u64 = 10_000;
/// Time between two changes: ten a second.
const BEAT: Duration = Duration::from_millis(100);

/// pod-a always serves; pod-b and pod-c go and come back by turns, ten changes a second. A pod that went answers what
/// it was given before for another half beat and until nobody is sent there, as a terminating pod does, then its server dies; it is up again before
/// it is listed again.
fn churn(cell: &str, v6: bool, proto: Proto) {
    let cluster = Cluster::own(Cell::named(cell), AgentOptions::default());
    let service = cluster.service("churn");
    let (lab, target) = (&cluster.lab, TARGET + 1);
    let mut spec = service.spec.clone();
    spec.ports.iter_mut().for_each(|port| port.target = target);
    let start = |n: usize| {
        let pod = &lab.pods[n];
        Server::both(&pod.ns, &pod.name, &[SocketAddr::new(pod.ip(v6), target)]).unwrap()
    };
    let _survivor = start(0);
    cluster.manifests.apply(&spec, &service.pods(&[0])).unwrap();
    let ask = Ask::new(proto, service.vip(v6));
    crate::cell::eventually("the first answer", &lab.client.ns, ask, |attempt| attempt.outcome.answer().is_some())
        .unwrap();

    let plan = LoadPlan { workers: 4, pause: Duration::from_millis(2), ..LoadPlan::new(proto, service.vip(v6)) };
    let load = Load::start(&lab.client.ns, plan).unwrap();
    let begun = Instant::now();
    let mut changes = 0u32;
    while load.done() < CONNECTIONS && begun.elapsed() < Duration::from_secs(300) {
        let n = 1 + (changes as usize / 2) % 2;
        let server = start(n);
        cluster.manifests.endpoints(&spec, &service.pods(&[0, n])).unwrap();
        std::thread::sleep(BEAT);
        cluster.manifests.endpoints(&spec, &service.pods(&[0])).unwrap();
        std::thread::sleep(BEAT / 2);
        // However busy the machine is: the agent has heard of it, and who was given the pod has its answer.
        cluster.wait_for_endpoints(&spec, &[0]).unwrap();
        assert!(load.turn_over(), "a request hangs");
        drop(server);
        std::thread::sleep(BEAT / 2);
        changes += 2;
    }
    let report = load.stop();
    let shown = format!("[{cell} v6={v6} {proto}] {changes} changes in {:?}: {report}", begun.elapsed());
    println!("{shown}");
    judge(&report, &shown, &cluster);
}

fn judge(report: &Report, shown: &str, cluster: &Cluster) {
    assert!(report.samples.len() as u64 >= CONNECTIONS, "too few connections: {shown}");
    assert!(report.failures().is_empty(), "{shown}\n{}", cluster.agent_log_tail());
    let servers = report.by_server();
    assert!(
        ["pod-a", "pod-b", "pod-c"].iter().all(|pod| servers.contains_key(*pod)),
        "the churn did not take part: {shown}"
    );
}

#[test]
fn ten_thousand_connections_over_routed_veths_survive_endpoint_churn() {
    churn("routed_conntrack", false, Proto::Tcp);
}

#[test]
fn ten_thousand_connections_over_a_bridge_survive_endpoint_churn() {
    churn("bridge_invalid_drop", true, Proto::Tcp);
}

#[test]
fn ten_thousand_udp_exchanges_survive_endpoint_churn() {
    churn("bridge_nf_invalid_drop", false, Proto::Udp);
    assert_eq!(Cell::named("bridge_nf_invalid_drop").shape, Shape::Bridge { br_netfilter: true });
}
