//! The API server goes away and comes back; so does the agent.

use std::time::{Duration, Instant};

use fairlead_lab::{Ask, Load, Outcome, Proto, load::LoadPlan};

use crate::{
    agent::{ms, throughout},
    fixture::{AFTER_BACKOFF, Cluster, SOON},
};

#[test]
fn nothing_that_worked_stops_while_the_api_server_is_down_and_changes_are_applied_after() {
    let mut cluster = Cluster::start();
    let vips = cluster.create_service("web");
    cluster.create_slices("web", &["pod-a"]);
    let other = cluster.create_service("other");
    cluster.create_slices("other", &["pod-c"]);
    cluster.served_by(&vips, "pod-a", SOON);
    cluster.served_by(&other, "pod-c", SOON);
    let mut established = Ask::new(Proto::Tcp, vips.v4).open(&cluster.lab.client.ns).unwrap().unwrap();
    assert_eq!(established.ask().outcome.server(), Some("pod-a"));
    let loads = [Proto::Tcp, Proto::Udp].map(|proto| {
        let plan = LoadPlan { workers: 1, pause: Duration::from_millis(5), ..LoadPlan::new(proto, other.v6) };
        Load::start(&cluster.lab.client.ns, plan).unwrap()
    });

    for polite in [true, false] {
        if polite {
            cluster.plane.stop().unwrap();
        } else {
            cluster.plane.crash();
        }
        throughout(Duration::from_secs(2), || {
            let outcome = established.ask().outcome;
            assert_eq!(outcome.server(), Some("pod-a"), "an established connection, without an API server: {outcome}");
            for (proto, to) in vips.all() {
                let outcome = cluster.ask(proto, to);
                assert_eq!(outcome.server(), Some("pod-a"), "{to}/{proto} without an API server: {outcome}");
            }
        });
        assert!(cluster.agent.is_running(), "the agent ended with its API server:\n{}", cluster.agent.log_tail());
        cluster.plane.resume().unwrap();
        cluster.api = cluster.plane.api().unwrap();

        let changed = Instant::now();
        cluster.set_endpoints("web", &["pod-b"]);
        cluster.served_by(&vips, "pod-b", AFTER_BACKOFF);
        println!("in step {} after the first write to the new API server", ms(changed.elapsed()));
        cluster.set_endpoints("web", &["pod-a"]);
        cluster.served_by(&vips, "pod-a", SOON);
    }
    // Its endpoint left and came back meanwhile: TCP goes on with it as long as it lives.
    assert_eq!(established.ask().outcome.server(), Some("pod-a"));
    for load in loads {
        let report = load.stop();
        assert!(report.failures().is_empty(), "a Service that nobody touched was disturbed: {report}");
    }
}

#[test]
fn an_agent_that_starts_without_an_api_server_waits_for_it() {
    let mut cluster = Cluster::start();
    let vips = cluster.create_service("web");
    cluster.create_slices("web", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);

    assert!(cluster.agent.stop(), "the agent did not end after SIGTERM");
    cluster.relay.cut();
    cluster.agent.launch();
    throughout(Duration::from_secs(2), || {
        assert!(cluster.agent.is_running(), "the agent gave up:\n{}", cluster.agent.log_tail());
        assert!(!cluster.agent.has_synced(), "the agent says that it is in step with a server that it cannot reach");
    });
    cluster.relay.heal();
    cluster.agent.wait_synced(AFTER_BACKOFF);
    for (proto, to) in vips.all() {
        let outcome = cluster.ask(proto, to);
        assert_ne!(outcome, Outcome::Timeout, "{to}/{proto} after the first sync");
        assert_eq!(outcome.server(), Some("pod-a"), "{to}/{proto} after the first sync: {outcome}");
    }
}
