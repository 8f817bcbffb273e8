//! One topology from top to bottom: build, look at direct traffic, start the proxies, run every cell, look at what was left
//! behind.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use fairlead_lab::{Capture, Lab, capture, client::PATIENCE, packet::Packet, topology::UPLINK};
use fairlead_tests::{
    equivalence::compare,
    nodes::{Nodes, is_service_address},
    rules::{Client, Endpoint, Node},
};

use crate::{
    cells::{self, Cell, Failure, Route, cells},
    direct::Direct,
    page::{self, Row},
    proxy::{Kind, Proxies},
    shape::{Filter, Topology, Wiring, host_ports_answer, policed, refused_by_policy},
    tracked,
};

/// How long an answer is waited for that may never come.
const SHORTER: Duration = Duration::from_secs(3);
/// Lines of a failure.
const SHOWN: usize = 40;

/// Runs it, and holds what came against the page.
pub(crate) fn run(topology: &Topology) {
    let judged = Kind::of_this_run().and_then(|kind| {
        let Came { row, wrong } = came(topology, kind)?;
        // What should not have come is not written to the page, and the page does not hide why it is wrong.
        let held = if wrong.is_empty() { page::hold(kind, &row) } else { page::compare(kind, &row) };
        let told = held.err().map(|error| format!("{error:#}\n")).unwrap_or_default() + &wrong;
        ensure!(told.is_empty(), "{told}");
        Ok(())
    });
    judged.unwrap_or_else(|error| panic!("[{}] {error:#}", topology.name));
}

/// What came of a topology.
struct Came {
    row: Row,
    /// What should not have come, in words.
    wrong: String,
}

fn came(topology: &Topology, kind: Kind) -> Result<Came> {
    let begun = Instant::now();
    let (parts, nodes) = topology.build()?;
    let tracks = topology.filter != Filter::None;
    let direct = Direct::observe(topology, &nodes)?;
    let built = begun.elapsed();
    let proxies = Proxies::start(kind, topology, &nodes)?;
    let started = begun.elapsed() - built;

    let cells = cells();
    let (watch, invalid) = (Watch::start(&nodes)?, nodes.invalid_packets()?);
    // What fails with kube-proxy need not be waited for as long as what may be slow.
    let patience = if kind == Kind::Fairlead { PATIENCE } else { SHORTER };
    let failures = cells::failures(&cells, |cell| cell.judge(&nodes, &direct, kind, patience), &nodes);
    let mut beside = watch.stop();
    let invalid = nodes.invalid_packets()? - invalid;
    if invalid > 0 {
        beside.push(("packets of state INVALID", format!("netfilter could not place {invalid} packets")));
    }
    if topology.filter == Filter::Policy {
        // On the other node: the way there is routed with every shape.
        let service = Route { endpoint: Endpoint::Pod(Node::B), ..cells[0].route }.service();
        let judged = policed(&nodes).and_then(|()| refused_by_policy(&nodes, &service));
        beside.extend(judged.err().map(|error| ("the policy is not kept", format!("{error:#}"))));
    }
    if matches!(topology.wiring, Wiring::PluginBridge | Wiring::PluginPtp) {
        let judged = host_ports_answer(&nodes);
        beside.extend(judged.err().map(|error| ("host ports are not answered", format!("{error:#}"))));
    }
    if tracks && kind == Kind::Fairlead {
        let equal = equal_to_direct(topology, &cells, &failures, &nodes, &direct);
        beside.extend(equal.err().map(|error| ("connection tracking differs", format!("{error:#}"))));
    }
    println!(
        "[{}] {}: {} of {} cells as the rules say; {built:?} to build, {started:?} to start, {:?} in all",
        topology.name,
        kind.name(),
        cells.len() - failures.len(),
        cells.len(),
        begun.elapsed()
    );
    let wrong = wrong(kind, &failures, &beside);
    let wrong = if wrong.is_empty() { wrong } else { wrong + &proxies.last_words() };
    let row = Row::new(topology, cells.len(), &failures);
    // In this order: an agent cleans up in its node, and a shape's parts are on the nodes' devices.
    drop(proxies);
    drop(parts);
    Ok(Came { row, wrong })
}

/// What is not as it should be, in words. kube-proxy is held against the page alone.
fn wrong(kind: Kind, failures: &[Failure], beside: &[(&str, String)]) -> String {
    let mut text = String::new();
    if kind == Kind::KubeProxy {
        for failure in failures.iter().take(SHOWN) {
            println!("  {}: {}", failure.cell, failure.why);
        }
        for (what, why) in beside {
            println!("  {what}: {why}");
        }
        return text;
    }
    if !failures.is_empty() {
        text += &format!("{} cells are not as the rules say:\n", failures.len());
    }
    for failure in failures.iter().take(SHOWN) {
        text += &format!("  {}: {}\n", failure.cell, failure.why);
    }
    for (what, why) in beside {
        text += &format!("{what}: {why}\n");
    }
    text
}

/// Captures where the clients are: an ICMP redirect would reach them, and a Service address that leaves a node goes to the
/// external host.
struct Watch {
    pods: Vec<Capture>,
    outside: Capture,
}

impl Watch {
    fn start(nodes: &Nodes) -> Result<Self> {
        let clients = [&nodes.lab(Node::A).client, &nodes.lab(Node::A).pods[0]];
        let pods = clients.into_iter().map(|pod| Capture::start(&pod.ns, "eth0")).collect::<Result<_>>()?;
        Ok(Self { pods, outside: Capture::start(&nodes.lab(Node::A).ext.ns, UPLINK)? })
    }

    fn stop(self) -> Vec<(&'static str, String)> {
        let outside = self.outside.stop();
        let leaked: Vec<_> = outside.iter().filter(|p| !p.outgoing && is_service_address(p.dst)).cloned().collect();
        let pods = self.pods.into_iter().flat_map(Capture::stop);
        let redirects: Vec<_> = pods.chain(outside).filter(Packet::is_redirect).collect();
        let found = [("ICMP redirects", redirects), ("Service addresses on the wire", leaked)];
        let shown = |packets: &[Packet]| capture::show(packets.iter().take(SHOWN));
        found.into_iter().filter(|(_, p)| !p.is_empty()).map(|(what, p)| (what, shown(&p))).collect()
    }
}

/// Where no source change is due, both nodes' netfilter has tracked what it tracks of the client's direct traffic to that
/// endpoint.
fn equal_to_direct(
    topology: &Topology,
    cells: &[Cell],
    failures: &[Failure],
    nodes: &Nodes,
    direct: &Direct,
) -> Result<()> {
    let failed = |cell: &Cell| failures.iter().any(|failure| failure.cell.index == cell.index);
    let compared_ports: BTreeSet<u16> = cells.iter().filter(|cell| !failed(cell)).map(Cell::port).collect();
    let lists = tracked::settled(nodes, |port| compared_ports.contains(&port))?;
    let mut compared = 0;
    // A bridge that netfilter does not see passes these on by itself.
    let bridged = |client, endpoint| {
        topology.wiring == Wiring::Bridge
            && matches!((client, endpoint), (Client::Pod(from), Endpoint::Pod(to)) if from == to)
    };
    for cell in cells.iter().filter(|cell| cell.route.has_a_direct_twin() && !failed(cell)) {
        let Route { client, endpoint, .. } = cell.route;
        let own = nodes.client(client, cell.v6);
        let twins = direct.tracked(client, endpoint, cell.v6, cell.proto);
        for (lab, (list, twin)) in nodes.labs.iter().zip(lists.iter().zip(twins)) {
            // Behind a masquerade of the CNI's the client cannot be told any more.
            if is_at(lab, client.node()) || direct.source(client, endpoint, cell.v6) == own {
                let seen = list.of(cell.proto, (own, cell.port()).into());
                let what = format!("{cell}: connection tracking entries of {}", lab.node_name());
                let passed = is_at(lab, client.node()) || is_at(lab, endpoint.node());
                ensure!(
                    seen.is_empty() != (passed && !bridged(client, endpoint)),
                    "{what}, where it was to have {}: {seen:?}",
                    if seen.is_empty() { "some" } else { "none" }
                );
                compare(&what, &seen, twin)?;
                compared += seen.len();
            }
        }
    }
    ensure!(compared > 0, "connection tracking has nothing to compare");
    Ok(())
}

fn is_at(lab: &Lab, node: Node) -> bool {
    lab.node_name() == node.name()
}
