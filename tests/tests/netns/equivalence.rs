//! Direct-path equivalence: what a capture and connection tracking show of VIP traffic is what they show of the
//! client's own direct traffic to that endpoint. Addresses, MACs, TTL, TOS, conntrack's tuples; no packet of state
//! INVALID, no ICMP redirect.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    Ask, Capture, Host, Lab, Netfilter, Proto, Shape, capture, conntrack,
    packet::{L4, Packet, RST, SYN},
};
use fairlead_tests::equivalence::{self, compare};

use crate::cell::{Cell, Cluster, Combo, PATIENCE, TARGET, own_port};

matrix! {
    pitfall_p1_1_a_pods_traffic_equals_direct_traffic,
    a_pods_traffic_to_a_remote_endpoint_equals_direct_traffic,
    a_node_port_clients_traffic_equals_direct_traffic,
    a_node_processs_traffic_equals_direct_traffic_at_the_endpoint,
    a_pods_traffic_to_itself_equals_the_nodes_traffic_at_the_endpoint,
}

/// What one exchange looked like, with the client's port left out.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// Distinct packets at the endpoint's device, both ways.
    at_endpoint: BTreeSet<String>,
    /// Distinct packets that came in at the client's device, the VIP read as the endpoint.
    at_client: BTreeSet<String>,
    /// The node's connection tracking entries.
    tracked: BTreeSet<String>,
}

/// One side of an exchange: where it is observed, by which device.
struct Party<'a> {
    host: &'a Host,
    device: &'a str,
}

fn shown(packet: &Packet, client: SocketAddr, from: SocketAddr, to: SocketAddr) -> Option<String> {
    let (src, dst) = packet.sockets()?;
    let name = |addr: SocketAddr| match addr {
        _ if addr == client => Some(format!("{}:*", client.ip())),
        _ if addr == from => Some(to.to_string()),
        _ if addr == to => Some(to.to_string()),
        _ => None,
    };
    let flags = match packet.l4 {
        L4::Tcp { flags, .. } => format!(" syn={} rst={}", flags & SYN != 0, flags & RST != 0),
        _ => String::new(),
    };
    let way = if packet.outgoing { "out" } else { "in" };
    Some(format!(
        "{way} {:?}>{:?} {} > {} ttl {} tos {}{flags}",
        packet.eth_src,
        packet.eth_dst,
        name(src)?,
        name(dst)?,
        packet.ttl,
        packet.tos
    ))
}

/// One conversation of several requests, observed on both sides and in the node.
/// `tracked` is the number of connection tracking entries that it leaves, where they matter.
fn observe(
    cluster: &Cluster,
    ask: Ask,
    client: &Party<'_>,
    endpoint: &Party<'_>,
    server: SocketAddr,
    tracked: Option<usize>,
) -> Result<Seen> {
    // Ports of its own: connection tracking remembers for minutes who else had an ephemeral one.
    let [first, ask] = [ask.from_port(own_port()), ask.from_port(own_port())];
    // A first conversation leaves neighbours resolved, as they are on a node in service.
    let mut warm = first.open(&client.host.ns)?.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", ask.to))?;
    let attempt = warm.ask();
    ensure!(attempt.outcome.answer().is_some(), "first answer from {}: {attempt}", ask.to);
    warm.abort();
    let before = cluster.lab.invalid_packets()?;
    let captures =
        [Capture::start(&endpoint.host.ns, endpoint.device)?, Capture::start(&client.host.ns, client.device)?];
    let mut conversation = ask.open(&client.host.ns)?.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", ask.to))?;
    let mut source = conversation.local()?;
    for round in 0..3 {
        let attempt = conversation.ask();
        let answer = attempt.outcome.answer().with_context(|| format!("{} request {round}: {attempt}", ask.to))?;
        // A node process may be seen with another source than its socket has; then that is the client's address.
        source = answer.peer;
    }
    let tracked =
        tracked.map_or_else(|| Ok(BTreeSet::new()), |expected| entries(cluster, ask.proto, source, expected))?;
    drop(conversation);
    let [at_endpoint, at_client] = captures.map(Capture::stop);
    let redirects: Vec<_> = at_client.iter().filter(|packet| packet.is_redirect()).collect();
    ensure!(redirects.is_empty(), "{}: the client got ICMP redirects:\n{}", ask.to, capture::show(redirects));
    let after = cluster.lab.invalid_packets()?;
    ensure!(
        after == before,
        "{}: netfilter saw {} INVALID packets; at the endpoint:\n{}at the client:\n{}",
        ask.to,
        after - before,
        capture::show(&at_endpoint),
        capture::show(&at_client)
    );
    let lines = |packets: &[Packet], keep: fn(&Packet) -> bool| -> BTreeSet<String> {
        packets
            .iter()
            .filter(|packet| keep(packet))
            .filter_map(|packet| shown(packet, source, ask.to, server))
            .collect()
    };
    Ok(Seen {
        at_endpoint: lines(&at_endpoint, |_| true),
        at_client: lines(&at_client, |packet| !packet.outgoing),
        tracked,
    })
}

/// True if the node's connection tracking sees what passes between the two: not between ports of a bridge whose packets
/// netfilter does not see.
fn is_tracked(cluster: &Cluster, client: &Party<'_>, endpoint: &Party<'_>) -> bool {
    let bridged = cluster.cell.shape == Shape::Bridge { br_netfilter: false };
    let is_pod = |party: &Party<'_>| cluster.lab.all_pods().any(|pod| pod.name == party.host.name);
    cluster.cell.netfilter != Netfilter::None && !(bridged && is_pod(client) && is_pod(endpoint))
}

/// The entries of one client address and port, once there are as many as expected; timers left out.
fn entries(cluster: &Cluster, proto: Proto, client: SocketAddr, expected: usize) -> Result<BTreeSet<String>> {
    let start = Instant::now();
    loop {
        let found = entries_now(cluster, proto, client)?;
        if found.len() >= expected || start.elapsed() > PATIENCE {
            ensure!(found.len() == expected, "{expected} tracked connections of {client} expected, found {found:?}");
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn entries_now(cluster: &Cluster, proto: Proto, client: SocketAddr) -> Result<BTreeSet<String>> {
    Ok(equivalence::entries(&conntrack::list(&cluster.lab.node.ns)?, proto, client))
}

/// Observes both ways to the endpoint and compares everything.
fn equal(cluster: &Cluster, vip: Ask, server: SocketAddr, client: &Party<'_>, endpoint: &Party<'_>) -> Result<()> {
    let tracked = Some(usize::from(is_tracked(cluster, client, endpoint)));
    let direct = observe(cluster, Ask { to: server, ..vip }, client, endpoint, server, tracked)?;
    ensure!(!direct.at_endpoint.is_empty() && !direct.at_client.is_empty(), "nothing was captured of direct traffic");
    let seen = observe(cluster, vip, client, endpoint, server, tracked)?;
    compare("packets at the endpoint", &seen.at_endpoint, &direct.at_endpoint)?;
    compare("packets at the client", &seen.at_client, &direct.at_client)?;
    compare("connection tracking entries", &seen.tracked, &direct.tracked)
}

fn pitfall_p1_1_a_pods_traffic_equals_direct_traffic(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, client, pod) = (cluster.service("equal"), &cluster.lab.client, &cluster.lab.pods[0]);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &client.ns, ask)?;
    let server = SocketAddr::new(pod.ip(v6), TARGET);
    equal(cluster, ask, server, &Party { host: client, device: "eth0" }, &Party { host: pod, device: "eth0" })
}

fn a_pods_traffic_to_a_remote_endpoint_equals_direct_traffic(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, client, ext) = (cluster.service("equal-remote"), &cluster.lab.client, &cluster.lab.ext);
    let ask = Ask::new(proto, service.vip(v6));
    let remote = &service.remotes()[if v6 { 2 } else { 0 }];
    service.serve(std::slice::from_ref(remote), &client.ns, ask)?;
    let server = SocketAddr::new(remote.ip, TARGET);
    equal(cluster, ask, server, &Party { host: client, device: "eth0" }, &Party { host: ext, device: "eth0" })
}

fn from_outside(v6: bool, proto: Proto, to: SocketAddr) -> Ask {
    let outside: IpAddr = Lab::external_clients(v6)[0];
    Ask::new(proto, to).from(SocketAddr::new(outside, 0))
}

/// Where pods are not told from others, nobody's source is exchanged on the way to a ClusterIP (rule 68): only then is there
/// direct traffic to compare with.
#[test]
fn a_routed_clients_traffic_equals_direct_traffic_without_masquerade() {
    for cell in ["routed_invalid_drop", "bridge_invalid_drop", "bridge_nf_invalid_drop"] {
        Cell::named(cell).run_with(&["--detect-local-mode=none"], a_routed_clients_traffic_equals_direct_traffic);
    }
}

fn a_routed_clients_traffic_equals_direct_traffic(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, ext, pod) = (cluster.service("equal-ext"), &cluster.lab.ext, &cluster.lab.pods[0]);
    let ask = from_outside(v6, proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &ext.ns, ask)?;
    let server = SocketAddr::new(pod.ip(v6), TARGET);
    equal(cluster, ask, server, &Party { host: ext, device: "eth0" }, &Party { host: pod, device: "eth0" })
}

fn a_node_port_clients_traffic_equals_direct_traffic(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, ext, pod) = (cluster.node_port_service("equal-np"), &cluster.lab.ext, &cluster.lab.pods[0]);
    let ask = from_outside(v6, proto, service.node_port(v6));
    service.serve(&service.pods(&[0]), &ext.ns, ask)?;
    let server = SocketAddr::new(pod.ip(v6), TARGET);
    equal(cluster, ask, server, &Party { host: ext, device: "eth0" }, &Party { host: pod, device: "eth0" })
}

/// A node process has its socket, and conntrack its entry, before any tc hook: there the VIP is what they know. What
/// reaches the endpoint is compared, and that nothing is INVALID on the way.
fn a_node_processs_traffic_equals_direct_traffic_at_the_endpoint(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, node, pod) = (cluster.service("equal-node"), &cluster.lab.node, &cluster.lab.pods[0]);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &node.ns, ask)?;
    let server = SocketAddr::new(pod.ip(v6), TARGET);
    let (client, endpoint) = (Party { host: node, device: &pod.node_device }, Party { host: pod, device: "eth0" });
    let direct = observe(cluster, Ask { to: server, ..ask }, &client, &endpoint, server, None)?;
    let seen = observe(cluster, ask, &client, &endpoint, server, None)?;
    ensure!(!direct.at_endpoint.is_empty(), "nothing was captured of direct traffic");
    compare("packets at the endpoint", &seen.at_endpoint, &direct.at_endpoint)
}

/// A pod that is its own endpoint sees the node as its client: the comparison is with the node's own direct traffic.
fn a_pods_traffic_to_itself_equals_the_nodes_traffic_at_the_endpoint(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let (service, node, pod) = (cluster.service("equal-self"), &cluster.lab.node, &cluster.lab.pods[0]);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &pod.ns, ask)?;
    let server = SocketAddr::new(pod.ip(v6), TARGET);
    let endpoint = || Party { host: pod, device: "eth0" };
    let from_node = Party { host: node, device: &pod.node_device };
    let direct = observe(cluster, Ask { to: server, ..ask }, &from_node, &endpoint(), server, None)?;
    let seen = observe(cluster, ask, &endpoint(), &endpoint(), server, None)?;
    ensure!(!direct.at_endpoint.is_empty(), "nothing was captured of direct traffic");
    compare("packets at the endpoint", &seen.at_endpoint, &direct.at_endpoint)
}
