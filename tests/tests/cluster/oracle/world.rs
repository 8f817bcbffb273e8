//! Two nodes that differ in nothing but who serves their Services: an agent here, kube-proxy there.

use std::net::IpAddr;

use fairlead_lab::{Host, Lab, LabConfig, Namespace, Netfilter, Shape, manifest::NODE_NAME, packet::Mac};
use fairlead_tests::controlplane::{Api, ControlPlane, KubeProxy, Passage};

use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::{
    agent::Agent,
    fixture::{Turn, create_node},
    plane::Alone,
};

/// The networks of this node's pods, and no others': pods of other nodes are not local then.
const CLUSTER_CIDR: &str = "--cluster-cidr=10.244.0.0/23,fd00:10:244:1::/64";

/// What both proxies are told.
pub(super) struct Settings {
    pub(super) name: &'static str,
    kube_proxy: &'static [&'static str],
    agent: &'static [&'static str],
}

/// Whom they take for a pod of the node (rule 71), what they masquerade, where NodePorts answer (rules 85 to 88).
pub(super) const SETTINGS: [Settings; 4] = [
    Settings { name: "pods by their network", kube_proxy: &[CLUSTER_CIDR], agent: &[CLUSTER_CIDR] },
    Settings {
        name: "pods by their devices' names, NodePorts at every address",
        kube_proxy: &[
            "--detect-local-mode=InterfaceNamePrefix",
            "--pod-interface-name-prefix=veth-",
            "--nodeport-addresses=0.0.0.0/0,::/0",
        ],
        agent: &[
            "--detect-local-mode=InterfaceNamePrefix",
            "--pod-interface-name-prefix=veth-",
            "--nodeport-addresses=0.0.0.0/0,::/0",
        ],
    },
    Settings {
        name: "every request to a ClusterIP masqueraded",
        kube_proxy: &[CLUSTER_CIDR, "--masquerade-all"],
        agent: &[CLUSTER_CIDR, "--masquerade-all"],
    },
    Settings {
        name: "pods not told from others",
        kube_proxy: &["--detect-local-mode=ClusterCIDR"],
        agent: &["--detect-local-mode=none"],
    },
];
/// Addresses of a client that is one of many, in one pass.
pub(super) const CROWD: usize = 64;
/// Passes over probes in a round, at most.
pub(super) const PASSES: usize = 6;
/// The node's second address of each family, no InternalIP of its Node: NodePorts answer there only if told to.
const SECOND: [&str; 2] = ["192.168.77.1", "fd00:192:168:77::1"];
/// Networks of external and load balancers' addresses, as the external host routes them.
const VIRTUAL: [&str; 2] = ["198.51.100.0/23", "2001:db8:e::/47"];

/// Who sends a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Client {
    /// Pods of the node that are no endpoints.
    Pod,
    /// A pod of the node that is an endpoint: `pod-a`.
    Endpoint,
    /// Hosts outside of the cluster.
    Outside,
    /// Hosts of another network outside.
    Elsewhere,
    /// A pod of another node.
    RemotePod,
    /// A process of the node.
    Node,
}

impl Client {
    pub(super) const ALL: [Self; 6] =
        [Self::Pod, Self::Endpoint, Self::Outside, Self::Elsewhere, Self::RemotePod, Self::Node];

    /// The `n`th of its addresses, of those for one pass over the probes; they repeat. A client that has asked before has an
    /// endpoint under session affinity, so every pass has clients of its own.
    pub(super) fn address(self, v6: bool, pass: usize, n: usize) -> IpAddr {
        assert!(pass < PASSES, "there are no addresses for another pass");
        let n = (pass * CROWD + n % CROWD) as u16;
        let [high, low] = n.to_be_bytes();
        let v6_of = |net: [u16; 5]| IpAddr::from([net[0], net[1], net[2], net[3], net[4], 0, 0, n + 1]);
        match (self, v6) {
            // Those of the lab's own pods are left out.
            (Self::Pod, false) if n < 256 => [10, 244, 0, low].into(),
            (Self::Pod, false) => [10, 244, 1, 128 + low].into(),
            (Self::Pod, true) => v6_of([0xfd00, 0x10, 0x244, 1, 1]),
            (Self::Outside, false) => [100, 64, high, low].into(),
            (Self::Outside, true) => v6_of([0x2001, 0xdb8, 0x113, 1, 0]),
            (Self::Elsewhere, false) => [100, 68, high, low].into(),
            (Self::Elsewhere, true) => v6_of([0x2001, 0xdb8, 0x113, 2, 0]),
            (Self::Endpoint, _) => place("pod-a", v6),
            (Self::RemotePod, _) => Lab::remote_pods(v6)[0],
            (Self::Node, _) => place("node", v6),
        }
    }

    /// The network that all of its addresses, and no other client's, lie in.
    pub(super) const fn network(self, v6: bool) -> &'static str {
        match (self, v6) {
            (Self::Pod, false) => "10.244.0.0/23",
            (Self::Pod, true) => "fd00:10:244:1:1::/80",
            (Self::Endpoint, false) => "10.244.1.10/32",
            (Self::Endpoint, true) => "fd00:10:244:1::a/128",
            (Self::Outside, false) => "100.64.0.0/22",
            (Self::Outside, true) => "2001:db8:113:1::/64",
            (Self::Elsewhere, false) => "100.68.0.0/22",
            (Self::Elsewhere, true) => "2001:db8:113:2::/64",
            (Self::RemotePod, false) => "10.244.2.0/24",
            (Self::RemotePod, true) => "fd00:10:244:2::/64",
            (Self::Node, false) => "192.168.50.10/32",
            (Self::Node, true) => "fd00:192:168:50::a/128",
        }
    }

    /// True where it is one client only, however often it asks.
    pub(super) const fn is_alone(self) -> bool {
        matches!(self, Self::Endpoint | Self::RemotePod | Self::Node)
    }
}

/// The address of a place where an endpoint can be. The lab gives them; that is checked when it is built.
pub(super) fn place(name: &str, v6: bool) -> IpAddr {
    match (name, v6) {
        ("pod-a", false) => [10, 244, 1, 10].into(),
        ("pod-a", true) => [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 10].into(),
        ("pod-b", false) => [10, 244, 1, 11].into(),
        ("pod-b", true) => [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 11].into(),
        ("node", false) => [192, 168, 50, 10].into(),
        ("node", true) => [0xfd00, 0x192, 0x168, 0x50, 0, 0, 0, 10].into(),
        ("other node", false) => [192, 168, 50, 1].into(),
        ("other node", true) => [0xfd00, 0x192, 0x168, 0x50, 0, 0, 0, 1].into(),
        ("remote-a", _) => Lab::remote_pods(v6)[0],
        ("remote-b", _) => Lab::remote_pods(v6)[1],
        _ => panic!("no place is called {name}"),
    }
}

/// The node's second address.
pub(super) fn second(v6: bool) -> IpAddr {
    SECOND[usize::from(v6)].parse().expect("a constant address")
}

/// True for the node's own addresses.
pub(super) fn is_the_nodes(ip: IpAddr) -> bool {
    ip == place("node", ip.is_ipv6()) || ip == second(ip.is_ipv6())
}

/// One of the two nodes with its neighbours.
pub(super) struct Side {
    pub(super) lab: Lab,
    /// Whom clients outside send their frames to.
    pub(super) uplink_mac: Mac,
    /// Connections have to be forgotten between batches: the kernel's table is not large.
    pub(super) tracks: bool,
}

impl Side {
    fn new(tracks: bool) -> Self {
        let config = LabConfig { pods: 2, ..LabConfig::new(Shape::Routed, Netfilter::None) };
        let lab = Lab::new(config).expect("a lab");
        for v6 in [false, true] {
            for host in lab.pods.iter().map(|pod| &pod.host).chain([&lab.node]) {
                assert_eq!(host.ip(v6), place(&host.name, v6), "{}", host.name);
            }
            assert_eq!(lab.ext.ip(v6), place("other node", v6));
        }
        wire(&lab);
        // Endpoints and clients say nothing: what is looked at is the first packet.
        for host in lab.all_pods().map(|pod| &pod.host).chain([&lab.ext]) {
            silence(&host.ns);
        }
        let shown = lab.node.ns.output("ip", &["-o", "link", "show", "eth0"]).expect("the uplink is shown");
        let mac = shown.split_ascii_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let uplink_mac = mac.and_then(|mac| mac.parse().ok()).unwrap_or_else(|| panic!("no MAC in {shown}"));
        Self { lab, uplink_mac, tracks }
    }

    /// Where this client's packets are sent.
    pub(super) fn home(&self, client: Client) -> &Host {
        match client {
            Client::Pod => &self.lab.client.host,
            Client::Endpoint => &self.lab.pods[0].host,
            Client::Outside | Client::Elsewhere | Client::RemotePod => &self.lab.ext,
            Client::Node => &self.lab.node,
        }
    }
}

/// Routes for the addresses that the lab does not know, and no limit on ICMP errors.
fn wire(lab: &Lab) {
    let (mut node, mut ext) = (String::new(), String::new());
    let (client, device) = (&lab.client, &lab.client.node_device);
    for v6 in [false, true] {
        let at = usize::from(v6);
        let (length, nodad) = if v6 { (64, "nodad") } else { (24, "") };
        node += &format!("addr add {}/{length} dev eth0 {nodad}\n", SECOND[at]);
        let nets: &[&str] = if v6 { &[Client::Pod.network(true)] } else { &["10.244.0.0/24", "10.244.1.128/25"] };
        for net in nets {
            node += &format!("route add {net} via {} dev {device} onlink\n", client.ip(v6));
        }
        for net in [VIRTUAL[at].to_owned(), format!("{}/{}", SECOND[at], if v6 { 128 } else { 32 })] {
            ext += &format!("route add {net} via {}\n", lab.node.ip(v6));
        }
    }
    lab.node.ns.ip_batch(&node).expect("the node's routes");
    lab.ext.ns.ip_batch(&ext).expect("the external host's routes");
    for (key, value) in [
        ("net.ipv4.icmp_ratemask", "0"),
        ("net.ipv6.icmp.ratelimit", "0"),
        ("net.ipv6.icmp.ratemask", "127"),
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.conf.eth0.send_redirects", "0"),
    ] {
        lab.node.ns.sysctl(key, value).expect("a setting of the node");
    }
}

/// What arrives is seen by captures and by nobody else.
fn silence(netns: &Namespace) {
    netns
        .nft(
            "table inet silent {\n chain input {\n  type filter hook input priority -400;\n\
             icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept\n drop\n }\n}\n",
        )
        .expect("a silent host");
}

/// Both nodes under one API server. Fields are dropped in their order.
pub(super) struct Twins {
    /// The agent and kube-proxy, with their settings' place in the list.
    running: Option<(usize, Agent, KubeProxy)>,
    _passage: Passage,
    pub(super) api: Api,
    plane: ControlPlane,
    pub(super) ours: Side,
    pub(super) theirs: Side,
    _alone: Alone,
    _turn: Turn,
}

impl Twins {
    pub(super) fn start() -> Self {
        let turn = Turn::beside();
        let (ours, theirs) = (Side::new(false), Side::new(true));
        let alone = Alone::new();
        let plane = ControlPlane::start(&alone.0).expect("a control plane");
        let api = plane.api().expect("a client of the API server");
        create_node(&api, &ours.lab);
        let passage = Passage::open(&ours.lab.node.ns, &plane).expect("a way to the API server");
        Self { running: None, _passage: passage, api, plane, ours, theirs, _alone: alone, _turn: turn }
    }

    /// Both proxies run with these settings from now on.
    pub(super) fn run_with(&mut self, settings: usize) {
        if self.running.as_ref().is_some_and(|(as_yet, ..)| *as_yet == settings) {
            return;
        }
        self.running = None;
        let options = &SETTINGS[settings];
        let proxy = KubeProxy::start(&self.plane, &self.theirs.lab.node.ns, NODE_NAME, options.kube_proxy);
        // A probe is a burst of packets, most of which may have to be refused.
        let agent = [options.agent, &["--rejects-per-second=1000000"]].concat();
        let agent = Agent::start_with(&self.ours.lab, &self.plane.proxy_kubeconfig(), "agent", &agent);
        self.running = Some((settings, agent, proxy.expect("kube-proxy")));
        // kube-proxy may hear of its Node before anybody in it listens for zones, and then learns of the zone when it changes.
        for zone in ["zone-c", "zone-a"] {
            let patch = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
            let patched = self.api.call(async move |client| {
                let nodes = kube::Api::<Node>::all(client);
                nodes.patch(NODE_NAME, &PatchParams::default(), &Patch::Merge(&patch)).await
            });
            patched.expect("the Node's zone can be changed");
        }
    }

    /// The end of the agent's log.
    pub(super) fn log_tail(&self) -> String {
        self.running.as_ref().map(|(_, agent, _)| agent.log_tail()).unwrap_or_default()
    }
}
