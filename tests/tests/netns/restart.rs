//! The programs are exchanged under full traffic: each start of an agent loads them anew and switches them in.

use std::{sync::PoisonError, time::Duration};

use fairlead_lab::{AgentOptions, Ask, Capture, Load, LoadPlan, Proto, capture};

use crate::cell::{Cell, Cluster};

/// Exchanges of one run.
const EXCHANGES: usize = 5;

fn exchange(cell: &str, v6: bool) {
    let cluster = Cluster::own(Cell::named(cell), AgentOptions::default());
    let (service, client) = (cluster.service("exchange"), &cluster.lab.client);
    let to = service.vip(v6);
    service.serve(&service.pods(&[0, 1, 2]), &client.ns, Ask::new(Proto::Tcp, to)).unwrap();
    let seen = Capture::start(&client.ns, "eth0").unwrap();
    let plan = |proto, fresh| {
        let (workers, pause) = (2, Duration::from_micros(500));
        LoadPlan { fresh, workers, pause, ..LoadPlan::new(proto, to) }
    };
    let plans = [(Proto::Tcp, true), (Proto::Tcp, false), (Proto::Udp, true), (Proto::Udp, false)];
    let loads = plans.map(|(proto, fresh)| Load::start(&client.ns, plan(proto, fresh)).unwrap());
    let reports = cluster
        .without_leak(|| {
            for _ in 0..EXCHANGES {
                std::thread::sleep(Duration::from_millis(200));
                let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
                agent.stop()?;
                agent.restart(&cluster.lab)?;
            }
            std::thread::sleep(Duration::from_millis(200));
            Ok(loads.map(Load::stop))
        })
        .unwrap();
    // Only the Service is asked: whatever comes from an endpoint's own address went untranslated.
    let untranslated: Vec<_> = seen
        .stop()
        .into_iter()
        .filter(|packet| !packet.outgoing && packet.sockets().is_some_and(|(from, _)| from != to))
        .collect();
    assert!(untranslated.is_empty(), "[{cell}] untranslated replies:\n{}", capture::show(untranslated.iter().take(20)));
    for ((proto, fresh), report) in plans.into_iter().zip(&reports) {
        let shown = format!("[{cell} v6={v6} {proto} fresh={fresh}] {EXCHANGES} exchanges: {report}");
        println!("{shown}");
        assert!(report.failures().is_empty() && report.samples.len() > 100, "{shown}\n{}", cluster.agent_log_tail());
        assert!(report.slowest() < Duration::from_millis(900), "a packet was lost and sent again: {shown}");
    }
}

#[test]
fn programs_are_exchanged_under_traffic_over_routed_veths() {
    exchange("routed_conntrack", false);
}

#[test]
fn programs_are_exchanged_under_traffic_over_a_bridge() {
    exchange("bridge_invalid_drop", true);
}
