//! What the agent reads of its own Node.

use std::net::{IpAddr, SocketAddr};

use fairlead_lab::{Outcome, Proto, manifest::NODE_NAME};
use fairlead_tests::controlplane::node;
use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use crate::{fixture::SOON, upstream::world_for_one};

#[test]
fn rule_85_node_ports_follow_the_internal_ips_of_the_node() {
    let cluster = world_for_one();
    // Addresses that no default route prefers.
    let others: [IpAddr; 2] = ["192.168.77.1", "fd00:192:168:77::1"].map(|ip| ip.parse().unwrap());
    cluster.lab.node.ns.ip_batch(&others.map(|ip| format!("address add {ip} dev lo\n")).concat()).unwrap();
    cluster.create_service("on-the-node");
    cluster.create_slices("on-the-node", &["pod-a"]);
    let spec = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}});
    let service = cluster.api.patch::<Service>("default", "on-the-node", spec).unwrap();
    let ports = service.spec.and_then(|spec| spec.ports).unwrap();
    let port = |proto: Proto| {
        let port = ports.iter().find(|port| port.protocol.as_deref() == Some(proto.name())).unwrap();
        u16::try_from(port.node_port.unwrap()).unwrap()
    };
    let uplink = [false, true].map(|v6| cluster.lab.node.ip(v6));
    let answered_at = |ips: [IpAddr; 2], by: Option<&str>| {
        for (ip, proto) in ips.into_iter().flat_map(|ip| Proto::ALL.map(|proto| (ip, proto))) {
            let (to, wanted) =
                (SocketAddr::new(ip, port(proto)), by.map_or("refused".to_owned(), |pod| format!("answered by {pod}")));
            cluster.ask_until(SOON, proto, to, &wanted, |outcome| match by {
                Some(pod) => outcome.server() == Some(pod),
                None => *outcome == Outcome::Refused,
            });
        }
    };
    answered_at(uplink, Some("pod-a"));
    answered_at(others, None);
    let have = |ips: &[IpAddr]| node::set_addresses(&cluster.api, NODE_NAME, ips).expect("a status");
    have(&others);
    answered_at(others, Some("pod-a"));
    answered_at(uplink, None);
    // The first of each family counts.
    have(&[uplink, others].concat());
    answered_at(uplink, Some("pod-a"));
    answered_at(others, None);
    have(&uplink);
    cluster.lab.node.ns.ip_batch(&others.map(|ip| format!("address del {ip} dev lo\n")).concat()).unwrap();
}
