//! Thousands of Services at once.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use fairlead_lab::{Ask, Load, LoadPlan, Outcome, Proto, schedule::Preferred};
use futures::StreamExt as _;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::api::{DeleteParams, ListParams, PostParams};

use super::{
    Quiet,
    latency::{a_hundred_changes, insist},
};
use crate::{
    fixture::{Cluster, SOON},
    objects,
};

/// Services of one burst, as many as upstream allows in a namespace.
const MANY: usize = 5_000;
/// An agent may take this long to serve the last one after the API server has answered for it.
const CAUGHT_UP: Duration = Duration::from_secs(5);
/// What else is asked meanwhile is answered within this, but for one request in a thousand: the machine is busy with all of
/// it. None of them fails, or needs a packet sent again.
const DELAYED: Duration = Duration::from_millis(250);
/// Whoever is not served yet is not answered at all: the address is one of a ServiceCIDR.
const ANSWERED: Duration = Duration::from_millis(50);
/// What a Service with its slice may cost the agent in resident memory, KiB.
const COSTS: u64 = 12;

/// Creates this many Services with one endpoint each, sixteen requests at a time, and says which ClusterIPs they got. Each is
/// of one family, and half of them of either: with every Service the API server counts the addresses of its family twice. All
/// carry the name of the burst.
fn create(cluster: &Cluster, count: usize, name: &'static str) -> Vec<IpAddr> {
    let pod = cluster.lab.pod("pod-a").expect("pod-a");
    let ips = [false, true].map(|v6| pod.ip(v6));
    let objects: Vec<_> = (0..count)
        .map(|number| {
            let v6 = number % 2 == 1;
            let labels = [("burst", name), ("half", if number < count / 2 { "first" } else { "second" })];
            let name = format!("{name}-{number}");
            let mut service = objects::service(&name);
            let spec = service.spec.get_or_insert_default();
            spec.ip_family_policy = Some("SingleStack".to_owned());
            spec.ip_families = Some(vec![if v6 { "IPv6" } else { "IPv4" }.to_owned()]);
            let mut slice = objects::slice(&name, v6, &[ips[usize::from(v6)]]);
            for labelled in
                [service.metadata.labels.get_or_insert_default(), slice.metadata.labels.get_or_insert_default()]
            {
                labelled.extend(labels.map(|(key, value)| (key.to_owned(), value.to_owned())));
            }
            (service, slice)
        })
        .collect();
    cluster.api.call(async move |client| {
        let services = kube::Api::<Service>::namespaced(client.clone(), "default");
        let slices = kube::Api::<EndpointSlice>::namespaced(client, "default");
        let create = async |(service, slice): &(Service, EndpointSlice)| {
            let params = PostParams::default();
            insist(async || slices.create(&params, slice).await).await;
            insist(async || services.create(&params, service).await).await;
        };
        let mut pending = futures::stream::iter(&objects).map(create).buffer_unordered(16);
        while pending.next().await.is_some() {}
        drop(pending);
        burst(&services, &format!("burst={name}")).await
    })
}

/// The ClusterIPs of the Services that carry this label.
async fn burst(services: &kube::Api<Service>, label: &str) -> Vec<IpAddr> {
    let all = services.list(&ListParams::default().labels(label)).await.expect("the Services");
    let ip = |service: &Service| service.spec.as_ref()?.cluster_ip.as_ref()?.parse().ok();
    all.items.iter().filter_map(ip).collect()
}

/// 5,000 at once: all are served, and nothing else waits for it. There are no controllers, which would have nothing to do
/// here but to read all of it.
#[test]
fn five_thousand_services_at_once_are_all_served_and_delay_nothing_else() {
    let cluster = Quiet::wait();
    let vips = cluster.create_service("bystander");
    cluster.create_slices("bystander", &["pod-b"]);
    cluster.served_by(&vips, "pod-b", SOON);
    let plan = LoadPlan { workers: 1, pause: Duration::from_millis(1), ..LoadPlan::new(Proto::Tcp, vips.v4) };
    let load = Load::start(&cluster.lab.client.ns, plan).expect("a load");
    let before = resident(&cluster);

    let began = Instant::now();
    let clusters = create(&cluster, MANY, "many");
    let created = Instant::now();
    assert_eq!(clusters.len(), MANY);
    // Each by a question; whoever is late is asked again until the bound.
    let mut waiting: Vec<_> = clusters.iter().map(|ip| SocketAddr::new(*ip, objects::PORT)).collect();
    while !waiting.is_empty() {
        assert!(created.elapsed() < CAUGHT_UP * 4, "{} of {MANY} are not served", waiting.len());
        waiting = cluster
            .lab
            .client
            .ns
            .run(|| {
                waiting
                    .into_iter()
                    .filter(|&to| Ask::new(Proto::Udp, to).timeout(ANSWERED).here().outcome.server() != Some("pod-a"))
                    .collect()
            })
            .expect("the namespace");
    }
    let (took, asked) = (created - began, created.elapsed());
    let report = load.stop();
    let resident = [before, resident(&cluster)];
    println!(
        "{MANY} Services created within {:.1} s, and each had answered {:.1} s later; beside them {report}; \
         the agent had {} MiB, then {} MiB",
        took.as_secs_f64(),
        asked.as_secs_f64(),
        resident[0],
        resident[1]
    );
    assert!(report.failures().is_empty(), "{report}");
    let late = report.samples.iter().filter(|sample| sample.attempt.elapsed > DELAYED).count();
    assert!(late <= report.samples.len() / 1000, "{late} requests took longer than {DELAYED:?}: {report}");
    assert!(asked < CAUGHT_UP, "the last was served {asked:?} after it was created");
    let grown = (resident[1] - resident[0]) * 1024 / MANY as u64;
    assert!(grown <= COSTS, "a Service costs {grown} KiB");

    // A change among them, and the end of half of their endpoints.
    cluster.set_endpoints("bystander", &["pod-c"]);
    cluster.served_by(&vips, "pod-c", CAUGHT_UP);
    let [gone, kept] = ["burst=many,half=first", "burst=many,half=second"]
        .map(|half| cluster.api.call(async move |client| burst(&kube::Api::namespaced(client, "default"), half).await));
    assert_eq!([gone.len(), kept.len()], [MANY / 2; 2]);
    cluster.api.call(async |client| {
        let (params, half) = (DeleteParams::default(), ListParams::default().labels("burst=many,half=first"));
        let slices = kube::Api::<EndpointSlice>::namespaced(client, "default");
        // A server that is short of time gets through some of them with each request.
        for attempt in 1.. {
            match slices.delete_collection(&params, &half).await {
                Ok(_) => return,
                Err(error) => assert!(attempt < 20, "not deleted by {attempt} attempts: {error}"),
            }
        }
    });
    let to = |ip: &IpAddr| SocketAddr::new(*ip, objects::PORT);
    for ip in gone.iter().step_by(249) {
        cluster.ask_until(SOON, Proto::Udp, to(ip), "refused", |outcome| *outcome == Outcome::Refused);
    }
    for ip in kept.iter().step_by(249) {
        assert_eq!(cluster.ask(Proto::Udp, to(ip)).server(), Some("pod-a"), "{ip}");
    }
}

/// Those that the case before has left, or as many of its own.
#[test]
fn hundred_changes_among_five_thousand_services_are_no_slower() {
    let _first = Preferred::new();
    let cluster = Quiet::wait();
    let there = cluster.api.call(async |client| burst(&kube::Api::namespaced(client, "default"), "burst=many").await);
    let among = if there.is_empty() { create(&cluster, MANY, "more") } else { there };
    assert_eq!(among.len(), MANY);
    a_hundred_changes(&cluster, "one-of-many");
}

/// Resident memory of the agent, MiB.
fn resident(cluster: &Cluster) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", cluster.agent.pid())).expect("the agent runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") / 1024
}
