//! A Service is edited: its type, and everything else.

use std::time::Duration;

use fairlead_lab::{Ask, Load, LoadPlan, Outcome, Proto};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::{SOON, world};
use crate::fixture::Vips;

/// The fields that a type without a ClusterIP must not have.
fn external() -> Value {
    json!({
        "type": "ExternalName", "externalName": "elsewhere.example.org", "externalTrafficPolicy": null,
        "clusterIP": null, "clusterIPs": null, "ipFamilies": null, "ipFamilyPolicy": null,
        "internalTrafficPolicy": null, "allocateLoadBalancerNodePorts": null,
    })
}

/// e2e 13 to 16: to each type and back. The CNAME of an external name is the business of the cluster's DNS.
#[test]
fn e2e_13_to_16_a_service_becomes_an_external_name_and_something_else_again() {
    let world = world();
    let mut service = world.service("moving", json!({}));
    world.run_pod("moving", "pod-a");
    let kinds = [
        json!({"type": "ClusterIP"}),
        json!({"type": "NodePort"}),
        json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}),
    ];
    for kind in kinds.iter().chain(&kinds[..1]) {
        let vips = Vips::of(&service);
        world.answered(&vips, &["pod-a"]);
        world.edit("moving", &external());
        world.gone(&vips, SOON);
        let mut back = kind.clone();
        back["externalName"] = Value::Null;
        back["ipFamilyPolicy"] = json!("RequireDualStack");
        service = world.edit("moving", &back);
        world.answered(&Vips::of(&service), &["pod-a"]);
        if kind["type"] != "ClusterIP" {
            world.answered_from(&world.lab.ext.ns, &world.node_ports(&service), &["pod-a"]);
        }
    }
}

/// The types that have a ClusterIP, there and back under traffic; the NodePorts go with the type.
#[test]
fn a_cluster_ip_is_kept_and_served_through_every_edit_without_a_lost_request() {
    let world = world();
    let created = world.service("edited", json!({}));
    let vips = Vips::of(&created);
    let pods = ["pod-a", "pod-b"].map(|server| world.run_pod("edited", server));
    // For selectors to be edited.
    for pod in &pods {
        pod.label(&world.api, &json!({"tier": "front"}));
    }
    world.answered(&vips, &["pod-a", "pod-b"]);
    let mut established =
        Ask::new(Proto::Tcp, vips.v6).open(&world.lab.client.ns).expect("the namespace").expect("open");
    let loads = vips.all().map(|(proto, to)| {
        let plan = LoadPlan { workers: 1, pause: Duration::from_millis(1), ..LoadPlan::new(proto, to) };
        Load::start(&world.lab.client.ns, plan).expect("a load")
    });
    let others = [super::port("extra", 81, Proto::Tcp, 8081), super::port("extra-udp", 81, Proto::Udp, 8081)];
    let own = json!(created.spec.as_ref().and_then(|spec| spec.ports.clone()));
    let with = |others: &[Value]| json!([own.as_array().cloned().unwrap_or_default(), others.to_vec()].concat());
    let renamed: Value = own
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            let mut port = port.clone();
            port["name"] = json!(format!("new-{}", port["name"].as_str().unwrap_or_default()));
            port
        })
        .collect();
    let edits = [
        json!({"metadata": {"labels": {"edited": "yes"}, "annotations": {"edited": "yes"}}}),
        json!({"spec": {"ports": with(&others)}}),
        json!({"spec": {"ports": with(&others[..1])}}),
        json!({"spec": {"ports": own}}),
        json!({"spec": {"selector": {"tier": "front"}}}),
        json!({"spec": {"selector": {"app": "edited", "tier": null}}}),
        json!({"spec": {"sessionAffinity": "ClientIP"}}),
        json!({"spec": {"sessionAffinity": "None", "sessionAffinityConfig": null}}),
        json!({"spec": {"internalTrafficPolicy": "Local"}}),
        json!({"spec": {"internalTrafficPolicy": "Cluster"}}),
        json!({"spec": {"publishNotReadyAddresses": true}}),
        json!({"spec": {"publishNotReadyAddresses": false}}),
        json!({"spec": {"externalIPs": ["198.51.100.250"]}}),
        json!({"spec": {"externalIPs": null}}),
        json!({"spec": {"type": "NodePort"}}),
        json!({"spec": {"externalTrafficPolicy": "Local"}}),
        json!({"spec": {"externalTrafficPolicy": "Cluster"}}),
        json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}}),
        json!({"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.251"}]}}}),
        json!({"spec": {"externalTrafficPolicy": "Cluster"}}),
        json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}}),
        json!({"spec": {"type": "ClusterIP", "externalTrafficPolicy": null}}),
        json!({"spec": {"trafficDistribution": "PreferClose"}}),
        json!({"spec": {"trafficDistribution": null}}),
    ];
    for edit in &edits {
        let edited = match edit.get("status") {
            Some(_) => world.api.patch_status::<Service>("default", "edited", edit.clone()),
            None => world.api.patch::<Service>("default", "edited", edit.clone()),
        };
        let edited = edited.expect("the edit");
        assert_eq!(Vips::of(&edited).all(), vips.all(), "{edit}");
        let before = loads.each_ref().map(Load::done);
        let passed = fairlead_lab::server::wait_until(SOON, || {
            loads.iter().zip(before).all(|(load, before)| load.done() >= before + 10)
        });
        assert!(passed, "no answers after {edit}");
    }
    let outcome = established.ask().outcome;
    assert!(outcome.answer().is_some(), "an established connection: {outcome}");
    for load in loads {
        let report = load.stop();
        assert!(report.failures().is_empty(), "{report}");
        assert!(report.by_server().len() == 2, "{report}");
    }
    world.answered(&vips, &["pod-a", "pod-b"]);

    // A port of another name is another port: kube-proxy and Fairlead refuse until its endpoints are written.
    world.edit("edited", &json!({"ports": renamed}));
    world.answered(&vips, &["pod-a", "pod-b"]);
    // Its NodePorts went with the type.
    for ip in world.ips("node") {
        let ports =
            world.node_ports(&world.edit("edited", &json!({"type": "NodePort", "externalTrafficPolicy": "Local"})));
        world.answered_from(&world.lab.ext.ns, &ports, &["pod-a", "pod-b"]);
        world.edit("edited", &json!({"type": "ClusterIP", "externalTrafficPolicy": null}));
        for (proto, to) in ports.into_iter().filter(|(_, to)| to.ip() == ip) {
            world.ask_from_until(&world.lab.ext.ns, SOON, proto, to, "refused", |outcome| *outcome == Outcome::Refused);
        }
    }
}
