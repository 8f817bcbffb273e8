//! A watch that breaks: what worked goes on, and what changed meanwhile is applied afterwards.

use std::time::{Duration, Instant};

use fairlead_lab::{Ask, Load, Proto, load::LoadPlan};
use fairlead_tests::controlplane::Api;
use futures::StreamExt as _;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::api::{ListParams, WatchEvent, WatchParams};

use crate::{
    agent::{ms, throughout},
    fixture::{AFTER_BACKOFF, Cluster, SOON, Vips},
    objects,
    plane::is_status,
};

/// How long a dead connection may go unnoticed. Kubernetes' own clients need 45 seconds (a ping after 30 s of silence, 15 s
/// for its answer), then a backoff.
const SILENCE: Duration = Duration::from_secs(90);

/// Four Services with one pod each: one that nobody touches, and one for each kind of change.
struct Four {
    untouched: Vips,
    moved: Vips,
    deleted: Vips,
    emptied: Vips,
}

impl Four {
    fn create(cluster: &Cluster) -> Self {
        let made = ["untouched", "moved", "deleted", "emptied"].map(|name| {
            let vips = cluster.create_service(name);
            cluster.create_slices(name, &["pod-a"]);
            vips
        });
        for vips in &made {
            cluster.served_by(vips, "pod-a", SOON);
        }
        let [untouched, moved, deleted, emptied] = made;
        Self { untouched, moved, deleted, emptied }
    }

    /// Moves one to another pod, deletes one with its slices, deletes the slices of one, and creates a fifth.
    fn change(cluster: &Cluster) -> Vips {
        cluster.set_endpoints("moved", &["pod-b"]);
        cluster.api.delete::<Service>("default", "deleted").unwrap();
        for (service, v6) in [("deleted", false), ("deleted", true), ("emptied", false), ("emptied", true)] {
            cluster.api.delete::<EndpointSlice>("default", &objects::slice_name(service, v6)).unwrap();
        }
        let created = cluster.create_service("created");
        cluster.create_slices("created", &["pod-c"]);
        created
    }

    /// Nothing of the change can be seen.
    fn unchanged(&self, cluster: &Cluster) {
        for vips in [&self.untouched, &self.moved, &self.deleted, &self.emptied] {
            for (proto, to) in vips.all() {
                let outcome = cluster.ask(proto, to);
                assert_eq!(outcome.server(), Some("pod-a"), "{to}/{proto} while the agent is cut off: {outcome}");
            }
        }
    }

    /// All of the change can be seen.
    fn changed(&self, cluster: &Cluster, created: &Vips) {
        // Services and slices are two watches, each with a backoff of its own.
        cluster.served_by(&self.moved, "pod-b", AFTER_BACKOFF);
        cluster.served_by(created, "pod-c", AFTER_BACKOFF);
        cluster.refused(&self.emptied, AFTER_BACKOFF);
        cluster.gone(&self.deleted, AFTER_BACKOFF);
        cluster.served_by(&self.untouched, "pod-a", Duration::ZERO);
    }
}

/// Requests to a Service that nobody touches, side by side with the case; none of them may fail.
fn undisturbed(cluster: &Cluster, vips: &Vips) -> [Load; 2] {
    [Proto::Tcp, Proto::Udp].map(|proto| {
        let plan = LoadPlan { workers: 1, pause: Duration::from_millis(5), ..LoadPlan::new(proto, vips.v4) };
        Load::start(&cluster.lab.client.ns, plan).unwrap()
    })
}

fn none_failed(loads: [Load; 2]) {
    for load in loads {
        let report = load.stop();
        assert!(report.samples.len() > 20, "hardly anything was asked: {report}");
        assert!(report.failures().is_empty(), "a Service that nobody touched was disturbed: {report}");
    }
}

#[test]
fn changes_made_while_the_watch_is_cut_are_applied_after() {
    let mut cluster = Cluster::start();
    let four = Four::create(&cluster);
    let load = undisturbed(&cluster, &four.untouched);

    cluster.relay.cut();
    let created = Four::change(&cluster);
    throughout(Duration::from_secs(1), || four.unchanged(&cluster));
    cluster.relay.heal();
    let healed = Instant::now();
    four.changed(&cluster, &created);
    println!("in step {} after the network was back", ms(healed.elapsed()));

    // The watch is live again, not only the list.
    cluster.set_endpoints("moved", &["pod-c"]);
    cluster.served_by(&four.moved, "pod-c", SOON);
    none_failed(load);
    assert!(cluster.agent.is_running());
}

#[test]
fn a_watch_that_is_answered_with_410_lists_again_and_finds_what_was_deleted() {
    let mut cluster = Cluster::start();
    let four = Four::create(&cluster);
    let load = undisturbed(&cluster, &four.untouched);
    let version = newest_version(&cluster.api);

    cluster.relay.cut();
    let created = Four::change(&cluster);
    // A new watch cache knows nothing of the past.
    cluster.plane.stop().unwrap();
    cluster.plane.resume().unwrap();
    cluster.api = cluster.plane.api().unwrap();
    assert!(
        is_too_old(&cluster.api, &version),
        "the API server still knows version {version}: this case shows nothing"
    );
    four.unchanged(&cluster);
    cluster.relay.heal();
    let healed = Instant::now();
    four.changed(&cluster, &created);
    println!("in step {} after the network was back, by a new list", ms(healed.elapsed()));

    cluster.set_endpoints("moved", &["pod-c"]);
    cluster.served_by(&four.moved, "pod-c", SOON);
    none_failed(load);
    assert!(cluster.agent.is_running());
}

#[test]
fn a_connection_that_dies_without_a_word_is_noticed() {
    let cluster = Cluster::start();
    let vips = cluster.create_service("web");
    cluster.create_slices("web", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);

    // As when a firewall between them has forgotten the connections: nothing arrives and nobody says so.
    let address = cluster.relay.address();
    let ports: Vec<_> = cluster.relay.clients().iter().map(|client| client.port().to_string()).collect();
    assert!(!ports.is_empty(), "the agent has no connection to the API server");
    let (port, clients) = (address.port(), ports.join(", "));
    let rules = format!(
        "table inet blackhole {{ chain input {{ type filter hook input priority 0;\n\
         tcp dport {port} tcp sport {{ {clients} }} drop\n\
         tcp sport {port} tcp dport {{ {clients} }} drop\n}}\n}}\n"
    );
    cluster.lab.node.ns.nft(&rules).unwrap();
    let dead = Instant::now();
    cluster.set_endpoints("web", &["pod-b"]);
    throughout(Duration::from_millis(200), || {
        let outcome = cluster.ask(Proto::Tcp, vips.v4);
        assert_eq!(outcome.server(), Some("pod-a"), "the connections are not dead: this case shows nothing");
    });
    cluster.served_by(&vips, "pod-b", SILENCE);
    println!("in step {} after the connections died", ms(dead.elapsed()));
}

#[test]
fn changes_made_while_the_agent_was_dead_are_applied_when_it_starts() {
    let mut cluster = Cluster::start();
    let four = Four::create(&cluster);
    let load = undisturbed(&cluster, &four.untouched);
    let mut established = Ask::new(Proto::Tcp, four.untouched.v6).open(&cluster.lab.client.ns).unwrap().unwrap();
    assert_eq!(established.ask().outcome.server(), Some("pod-a"));

    cluster.agent.crash();
    let created = Four::change(&cluster);
    throughout(Duration::from_secs(1), || four.unchanged(&cluster));
    cluster.agent.launch();
    cluster.agent.wait_synced(AFTER_BACKOFF);
    four.changed(&cluster, &created);

    cluster.set_endpoints("moved", &["pod-c"]);
    cluster.served_by(&four.moved, "pod-c", SOON);
    assert_eq!(established.ask().outcome.server(), Some("pod-a"), "an established connection outlives the agent");
    none_failed(load);
}

/// The version of the list of Services: what a watch that follows it begins from.
fn newest_version(api: &Api) -> String {
    api.call(async |client| {
        let list = kube::Api::<Service>::all(client).list(&ListParams::default()).await.unwrap();
        list.metadata.resource_version.unwrap()
    })
}

/// True where a watch from this version is answered with 410, at once or as its first event.
fn is_too_old(api: &Api, version: &str) -> bool {
    let version = version.to_owned();
    api.call(async move |client| {
        let services = kube::Api::<Service>::all(client);
        let mut events = match services.watch(&WatchParams::default().timeout(5), &version).await {
            Ok(events) => std::pin::pin!(events),
            Err(error) => return is_status(&error, 410),
        };
        match events.next().await {
            Some(Ok(WatchEvent::Error(status))) => status.code == 410,
            Some(Err(error)) => is_status(&error, 410),
            _ => false,
        }
    })
}
