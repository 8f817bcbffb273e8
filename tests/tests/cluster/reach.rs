//! What is written to the API becomes reachable, and what is taken away is refused.

use fairlead_lab::{Ask, Outcome, Proto};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

use crate::{
    fixture::{SOON, Vips},
    objects,
    upstream::world,
};

#[test]
fn a_service_and_its_slices_make_it_reachable_and_a_deleted_endpoint_is_refused() {
    let cluster = world();
    let vips = cluster.create_service("reached");
    cluster.refused(&vips, SOON);
    cluster.create_slices("reached", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);

    cluster.set_endpoints("reached", &["pod-a", "pod-b"]);
    cluster.ask_until(SOON, Proto::Tcp, vips.v4, "answered by pod-b now and then", |outcome| {
        outcome.server() == Some("pod-b")
    });
    // Both are chosen by chance: of 100 questions each answers some, or the coin is not fair.
    let servers: Vec<_> = (0..100).map(|_| cluster.ask(Proto::Tcp, vips.v4).server().map(str::to_owned)).collect();
    for pod in ["pod-a", "pod-b"] {
        let share = servers.iter().filter(|server| server.as_deref() == Some(pod)).count();
        assert!(share >= 20, "{pod} answered {share} of 100 questions: {servers:?}");
    }

    // One that was none before: its first answer shows that the others are out.
    cluster.set_endpoints("reached", &["pod-c"]);
    cluster.served_by(&vips, "pod-c", SOON);
    for (proto, to) in vips.all() {
        for _ in 0..20 {
            let outcome = cluster.ask(proto, to);
            assert_eq!(outcome.server(), Some("pod-c"), "{to}/{proto}: {outcome}");
        }
    }

    cluster.set_endpoints("reached", &[]);
    cluster.refused(&vips, SOON);
    cluster.set_endpoints("reached", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);

    for v6 in [false, true] {
        cluster.api.delete::<EndpointSlice>("default", &objects::slice_name("reached", v6)).unwrap();
    }
    cluster.refused(&vips, SOON);
    cluster.api.delete::<Service>("default", "reached").unwrap();
    cluster.create_slices("reached", &["pod-a"]);
    cluster.gone(&vips, SOON);
}

#[test]
fn rule_47_slices_that_come_before_their_service_are_used_as_soon_as_it_comes() {
    let cluster = world();
    cluster.create_slices("after-its-slices", &["pod-b"]);
    // A Service that is written after them shows that the agent has seen them.
    let marker = cluster.create_service("after-the-slices");
    cluster.create_slices("after-the-slices", &["pod-a"]);
    cluster.served_by(&marker, "pod-a", SOON);

    let vips = cluster.create_service("after-its-slices");
    cluster.served_by(&vips, "pod-b", SOON);
}

#[test]
fn the_nodes_own_processes_reach_a_service_of_the_api() {
    let cluster = world();
    let vips = cluster.create_service("node-to-pod");
    cluster.create_slices("node-to-pod", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);
    for (proto, to) in vips.all() {
        let outcome = Ask::new(proto, to).once(&cluster.lab.node.ns).unwrap().outcome;
        assert_eq!(outcome.server(), Some("pod-a"), "{to}/{proto} from the node: {outcome}");
    }
}

#[test]
fn rule_10_a_service_that_becomes_an_external_name_loses_its_addresses() {
    let cluster = world();
    let vips = cluster.create_service("becomes-external");
    cluster.create_slices("becomes-external", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);
    let patch = serde_json::json!({"spec": {
        "type": "ExternalName", "externalName": "elsewhere.example.org",
        "clusterIP": null, "clusterIPs": null, "ipFamilies": null, "ipFamilyPolicy": null,
    }});
    let patched = cluster.api.patch::<Service>("default", "becomes-external", patch).unwrap();
    assert_eq!(patched.spec.unwrap().cluster_ip.unwrap_or_default(), "", "the API server kept the address");
    cluster.gone(&vips, SOON);

    let back = serde_json::json!({"spec": {
        "type": "ClusterIP", "externalName": null, "ipFamilyPolicy": "RequireDualStack",
    }});
    let vips = Vips::of(&cluster.api.patch::<Service>("default", "becomes-external", back).unwrap());
    cluster.served_by(&vips, "pod-a", SOON);
}

#[test]
fn rule_42_a_pod_that_stops_being_ready_is_left_and_found_again() {
    let cluster = world();
    let vips = cluster.create_service("in-and-out");
    cluster.create_slices("in-and-out", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);
    let ready = |ready: bool| {
        for v6 in [false, true] {
            let mut slice = objects::slice("in-and-out", v6, &cluster.addresses(&["pod-a"], v6));
            for endpoint in &mut slice.endpoints {
                endpoint.conditions.get_or_insert_default().ready = Some(ready);
            }
            cluster.api.replace(&slice).unwrap();
        }
    };
    ready(false);
    cluster.refused(&vips, SOON);
    ready(true);
    cluster.served_by(&vips, "pod-a", SOON);
    assert_ne!(cluster.ask(Proto::Udp, vips.v6), Outcome::Refused);
}
