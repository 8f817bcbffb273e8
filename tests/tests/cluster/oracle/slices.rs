//! The EndpointSlices of a generated Service.

use std::net::IpAddr;

use fairlead_lab::manifest::{NODE_NAME, OTHER_NODE};
use serde_json::{Value, json};

use super::{
    generate::{Chance, LABEL, Port},
    probe::Proto,
    world::place,
};

/// Where an endpoint can be, and on which node that is.
const PLACES: [(&str, &str); 6] = [
    ("pod-a", NODE_NAME),
    ("pod-b", NODE_NAME),
    ("node", NODE_NAME),
    ("remote-a", OTHER_NODE),
    ("remote-b", OTHER_NODE),
    ("other node", OTHER_NODE),
];
/// More endpoints would take more packets to find.
const ENDPOINTS: usize = 4;

/// Whose hints a Service's endpoints carry.
#[derive(Clone, Copy)]
enum Hints {
    None,
    Zones,
    Nodes,
    Both,
}

/// The slices of one family: none, one or two.
pub(super) fn of(chance: &mut Chance, service: &str, ports: &[Port], v6: bool) -> Vec<Value> {
    let count = chance.one(&[0, 1, 1, 1, 2, 2]);
    let hints = chance.one(&[Hints::None, Hints::None, Hints::Zones, Hints::Nodes, Hints::Both]);
    let mut known: Vec<(&str, Value)> = Vec::new();
    let mut slice = |n: usize| {
        let mut endpoints = Vec::new();
        for _ in 0..chance.one(&[0, 1, 2, 2, 3, 3]) {
            let (at, node) = chance.one(&PLACES);
            let known_at = known.iter().position(|(place, _)| *place == at);
            match known_at {
                Some(known_at) => endpoints.push(again(chance, &mut known[known_at].1)),
                None if known.len() == ENDPOINTS => {}
                None => {
                    let made = endpoint(chance, place(at, v6), node, hints);
                    known.push((at, made.clone()));
                    endpoints.push(made);
                }
            }
        }
        let mut labels = json!({LABEL: "yes", "kubernetes.io/service-name": service});
        if chance.percent(4) {
            labels["service.kubernetes.io/headless"] = json!("");
        }
        let (family, name) = if v6 { ("IPv6", "v6") } else { ("IPv4", "v4") };
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{service}-{name}-{n}"), "namespace": "default", "labels": labels},
            "addressType": family,
            "endpoints": endpoints,
            "ports": slice_ports(chance, ports),
        })
    };
    (0..count).map(&mut slice).collect()
}

/// An address that stands somewhere already. Which of two entries counts is not defined, unless one is terminating and the other
/// is not (rule 45): so it is the same again, or turns from the one into the other and stays so.
fn again(chance: &mut Chance, known: &mut Value) -> Value {
    if known["conditions"]["terminating"] == true && chance.percent(50) {
        let conditions = [json!({"ready": true}), json!({"ready": false, "serving": true, "terminating": false})];
        known["conditions"] = chance.one(&conditions);
    }
    known.clone()
}

/// The Service's ports; now and then one is missing, has no number, or is of another protocol.
fn slice_ports(chance: &mut Chance, ports: &[Port]) -> Vec<Value> {
    let mut found = Vec::new();
    for (n, port) in ports.iter().enumerate() {
        let (mut proto, mut number) = (port.proto, json!(8080 + n));
        match chance.below(40) {
            0 => continue,
            1 => proto = chance.one(&Proto::ALL),
            2 => number = Value::Null,
            _ => {}
        }
        found.push(json!({"name": port.name, "port": number, "protocol": proto.name()}));
    }
    found
}

fn endpoint(chance: &mut Chance, address: IpAddr, node: &str, hints: Hints) -> Value {
    let conditions = chance.one(&[
        json!({"ready": true}),
        json!({"ready": true}),
        json!({"ready": true, "serving": true, "terminating": false}),
        json!({}),
        json!({"ready": false, "serving": true, "terminating": true}),
        json!({"ready": false, "serving": true, "terminating": true}),
        json!({"ready": false, "serving": false, "terminating": true}),
        json!({"ready": false, "serving": true, "terminating": false}),
        json!({"ready": false, "terminating": true}),
        json!({"ready": false}),
        json!({"ready": true, "serving": true, "terminating": true}),
    ]);
    let mut endpoint = json!({"addresses": [address], "conditions": conditions});
    if !chance.percent(8) {
        endpoint["nodeName"] = json!(node);
    }
    // One endpoint without hints is as good as none with (rule 56).
    if chance.percent(95) {
        let zones = chance.one(&[&["zone-a"][..], &["zone-a"], &["zone-b"], &["zone-b", "zone-a"]]);
        let zones: Vec<_> = zones.iter().map(|zone| json!({"name": zone})).collect();
        let nodes = [json!({"name": node})];
        match hints {
            Hints::None => {}
            Hints::Zones => endpoint["hints"] = json!({"forZones": zones}),
            Hints::Nodes => endpoint["hints"] = json!({"forNodes": nodes}),
            Hints::Both => endpoint["hints"] = json!({"forZones": zones, "forNodes": nodes}),
        }
    }
    endpoint
}
