//! Services by chance: every field that kube-proxy reads, in combinations that the API server accepts.
//!
//! A Service follows from the seed of its round and its number alone, so that one can be asked for by itself.

use std::net::IpAddr;

use proptest::{
    prelude::Rng as _,
    test_runner::{RngAlgorithm, TestRng},
};
use serde_json::{Value, json};

use super::{
    probe::Proto,
    slices,
    world::{Client, place, second},
};

/// The label by which all of a round's objects are removed.
pub(super) const LABEL: &str = "oracle";

/// Objects of one Service, as JSON, and what they ask for.
#[derive(Clone, Debug)]
pub(super) struct Generated {
    pub(super) name: String,
    pub(super) service: Value,
    /// `status.loadBalancer`, which is written by itself.
    pub(super) balancer: Option<Value>,
    pub(super) slices: Vec<Value>,
    /// A change of its spec, after its creation.
    pub(super) edit: Option<Value>,
    pub(super) ports: Vec<Port>,
    /// Addresses for which the Service asks beside its ClusterIPs.
    pub(super) external: Vec<IpAddr>,
    pub(super) balanced: Vec<IpAddr>,
    pub(super) sticky: bool,
}

/// A port of the Service.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) proto: Proto,
    pub(super) number: u16,
    pub(super) node_port: Option<u16>,
}

/// What decides.
pub(super) struct Chance(TestRng);

impl Chance {
    fn of(seed: u64, number: usize) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&(number as u64).to_le_bytes());
        Self(TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
    }

    /// True so many times of a hundred.
    pub(super) fn percent(&mut self, chance: u32) -> bool {
        self.0.next_u32() % 100 < chance
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0.next_u64() as usize % limit
    }

    pub(super) fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// The `number`th Service of a round.
pub(super) fn service(seed: u64, number: usize) -> Generated {
    let chance = &mut Chance::of(seed, number);
    let name = format!("svc-{number}");
    let families = chance.one(&[vec!["IPv4"], vec!["IPv6"], vec!["IPv4", "IPv6"], vec!["IPv6", "IPv4"]]);
    let headless = chance.percent(4);
    let types = ["ClusterIP", "ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"];
    let kind = if headless { "ClusterIP" } else { chance.one(&types) };
    let external = if chance.percent(40) { addresses(chance, 0) } else { Vec::new() };
    let mut ports = ports(chance, number);
    let allocated = kind == "NodePort" || kind == "LoadBalancer" && chance.percent(85);
    for port in ports.iter_mut().filter(|_| !allocated) {
        port.node_port = None;
    }
    let port = |port: &Port| {
        let (proto, node_port) = (port.proto.name(), port.node_port);
        json!({"name": port.name, "port": port.number, "protocol": proto, "nodePort": node_port})
    };
    let mut spec = json!({
        "type": kind,
        "ipFamilies": families,
        "ipFamilyPolicy": if families.len() == 2 { "RequireDualStack" } else { "SingleStack" },
        "externalIPs": external,
        "internalTrafficPolicy": chance.one(&["Cluster", "Cluster", "Local"]),
        "ports": ports.iter().map(port).collect::<Vec<_>>(),
    });
    if headless {
        spec["clusterIP"] = json!("None");
    }
    let sticky = !headless && chance.percent(25);
    if sticky {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 600}});
    }
    let is_external = kind != "ClusterIP" || !external.is_empty();
    if is_external && !headless && chance.percent(50) {
        spec["externalTrafficPolicy"] = json!("Local");
        if kind == "LoadBalancer" {
            spec["healthCheckNodePort"] = json!(32_000 + number);
        }
    }
    let (mut balancer, mut balanced) = (None, Vec::new());
    if kind == "LoadBalancer" {
        spec["allocateLoadBalancerNodePorts"] = json!(allocated);
        if chance.percent(50) {
            spec["loadBalancerSourceRanges"] = json!(source_ranges(chance));
        }
        balanced = addresses(chance, 1);
        balancer = Some(ingress(chance, &balanced));
    }
    let mut labels = json!({LABEL: "yes"});
    if chance.percent(5) {
        labels["service.kubernetes.io/service-proxy-name"] = json!(chance.one(&["other", ""]));
    }
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": spec,
    });
    let slices = [false, true].into_iter().flat_map(|v6| slices::of(chance, &name, &ports, v6)).collect();
    Generated { name, service, balancer, slices, edit: None, ports, external, balanced, sticky }
}

/// The same Service a while later: with other slices, another status, other policies, as far as they can be changed.
pub(super) fn later(seed: u64, number: usize, before: &Generated) -> Generated {
    let chance = &mut Chance::of(!seed, number);
    let mut after = before.clone();
    if chance.percent(30) {
        return after;
    }
    after.slices =
        [false, true].into_iter().flat_map(|v6| slices::of(chance, &before.name, &before.ports, v6)).collect();
    let mut spec = json!({"internalTrafficPolicy": chance.one(&["Cluster", "Local"])});
    if before.service["spec"]["type"] == "NodePort" {
        spec["externalTrafficPolicy"] = json!(chance.one(&["Cluster", "Local"]));
    }
    if before.balancer.is_some() {
        after.balanced = addresses(chance, 1);
        after.balancer = Some(ingress(chance, &after.balanced));
        let ranges = if chance.percent(50) { json!(source_ranges(chance)) } else { Value::Null };
        // What `service` says is the Service as it is now.
        after.service["spec"]["loadBalancerSourceRanges"] = ranges.clone();
        spec["loadBalancerSourceRanges"] = ranges;
    }
    after.edit = Some(json!({"spec": spec}));
    after
}

/// Numbers that no other Service has: what two Services claim is another matter (rule 32).
fn ports(chance: &mut Chance, number: usize) -> Vec<Port> {
    const LIKELY: [Proto; 5] = [Proto::Tcp, Proto::Tcp, Proto::Udp, Proto::Udp, Proto::Sctp];
    let count = chance.one(&[1, 1, 2, 3]);
    // One number for several protocols, of the NodePort as well.
    let shared = chance.percent(30);
    let own = 8 * number as u16;
    let mut ports = Vec::new();
    for n in 0..count {
        let proto = if shared { Proto::ALL[n] } else { chance.one(&LIKELY) };
        let offset = own + if shared { 0 } else { n as u16 };
        let name = if count == 1 && chance.percent(50) { String::new() } else { format!("p{n}") };
        ports.push(Port { name, proto, number: 10_000 + offset, node_port: Some(30_000 + offset) });
    }
    ports
}

/// Addresses of both families for externalIPs (0) or load balancers (1): a few that several Services share, now and then one
/// of the node's.
fn addresses(chance: &mut Chance, which: u16) -> Vec<IpAddr> {
    let count = chance.one(&[1, 2, 2, 3]);
    let mut found: Vec<IpAddr> = Vec::new();
    for _ in 0..count {
        let (v6, n) = (chance.percent(50), 1 + chance.below(6) as u16);
        let ip = match (chance.below(12), v6) {
            (0, _) => second(v6),
            (1, _) => place("node", v6),
            (_, false) => [198, 51, 100 + which as u8, n as u8].into(),
            (_, true) => [0x2001, 0xdb8, 0xe + which, 0, 0, 0, 0, n].into(),
        };
        if !found.contains(&ip) {
            found.push(ip);
        }
    }
    found
}

/// What a cloud would write into the status (rule 19).
fn ingress(chance: &mut Chance, addresses: &[IpAddr]) -> Value {
    let entry = |ip: &IpAddr| match chance.below(5) {
        0 => json!({"ip": ip, "ipMode": "Proxy"}),
        1 => json!({"ip": ip, "hostname": "balancer.example"}),
        _ => json!({"ip": ip, "ipMode": "VIP"}),
    };
    let mut entries: Vec<Value> = addresses.iter().map(entry).collect();
    if chance.percent(15) {
        entries.push(json!({"hostname": "other.example"}));
    }
    json!({"ingress": entries})
}

/// Source ranges: networks of the clients, single addresses, wider ones, spaces, all there is (rule 21).
fn source_ranges(chance: &mut Chance) -> Vec<String> {
    let count = chance.one(&[1, 2, 3]);
    let mut range = || {
        let v6 = chance.percent(50);
        let range = match (chance.below(12), v6) {
            (0, false) => "0.0.0.0/0",
            (0, true) => "::/0",
            (1, false) => " 10.0.0.0/8",
            (1, true) => " fd00::/8 ",
            (2, false) => "192.168.0.0/16",
            (2, true) => "fd00:192:168::/48",
            _ => chance.one(&Client::ALL).network(v6),
        };
        range.to_owned()
    };
    (0..count).map(|_| range()).collect()
}
