//! Narrow links and large datagrams between nodes: whoever sends too much is told so, in terms of what it knows.

use anyhow::{Result, ensure};
use fairlead_lab::{
    Lab, Proto, ServiceSpec, Shape,
    topology::{BRIDGE, UPLINK},
};
use fairlead_tests::counters;
use proxy_common::Outcome;

use super::{
    pair::{Pair, Shared, spec},
    rules::{Address, Client, Endpoint, Node},
};

/// Bytes of a transfer.
const TRANSFER: usize = 1 << 18;
/// Bytes of a datagram, in three fragments.
const DATAGRAM: usize = 4_000;

/// Where a link is narrow.
const BEHIND_POD: &str = "behind the pod that asks";

/// One Service for each endpoint.
fn service(endpoint: Endpoint) -> ServiceSpec {
    let n = Endpoint::ALL.into_iter().position(|other| other == endpoint).expect("one of them");
    spec("large", 51 + n as u8)
}

fn serve(pair: &Pair) -> Result<()> {
    let services = Endpoint::ALL.map(|endpoint| (service(endpoint), [endpoint]));
    pair.serve(&services.each_ref().map(|(service, endpoints)| (service.clone(), &endpoints[..])))
}

/// One conversation with bytes up and down, one after the other and together.
fn arrives(pair: &Pair, way: (Client, Address, Endpoint), v6: bool, proto: Proto, size: usize) -> Result<()> {
    let (client, address, endpoint) = way;
    let ask = pair.ask(client, proto, pair.address(&service(endpoint), address, v6), 0);
    let shown = format!("{client:?} → {address:?} → {endpoint:?}, v6={v6} {proto}");
    let opened = ask.open(pair.namespace(client))?;
    let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("{shown}: {outcome}"))?;
    for (up, down) in [(size, 0), (0, size), (size, size)] {
        let attempt = conversation.ask_bulk(up, down);
        ensure!(attempt.outcome.answer_at_last().is_some(), "{shown}, {up} bytes up and {down} down: {attempt}");
    }
    Ok(())
}

/// Errors that a node has translated.
fn told(lab: &Lab) -> u64 {
    counters::of(lab).get(&Outcome::IcmpError).copied().unwrap_or(0)
}

/// Transfers by each way while something is narrow. Each time somebody has to be told, by a node that translates; but an
/// endpoint that sees a pod's own address is told of just that, as without a Service.
fn transfers(pair: &Pair, what: &str, ways: &[(Client, Address, Endpoint)]) -> Result<()> {
    let count = || pair.labs.iter().map(told).sum::<u64>();
    for v6 in [false, true] {
        for way in ways {
            // What was learnt on one way must not help the next one.
            pair.forget_routes()?;
            let before = count();
            arrives(pair, *way, v6, Proto::Tcp, TRANSFER).map_err(|error| error.context(format!("narrow {what}")))?;
            let as_it_is = what == BEHIND_POD && way.1 == Address::ClusterIp;
            ensure!(as_it_is || count() > before, "narrow {what}, {way:?}, v6={v6}: nobody was told");
        }
    }
    Ok(())
}

/// Both nodes forward to their pods, so both can tell of a narrow device; on a bridge it is the bridge's.
fn narrow(pair: &Pair) -> Result<()> {
    serve(pair)?;
    let (there, a, b) = (Endpoint::Pod(Node::B), Node::A, Node::B);
    let ways = [
        (Client::Pod(a), Address::ClusterIp, there),
        (Client::Pod(a), Address::NodePort(a), there),
        (Client::Pod(a), Address::NodePort(b), there),
        (Client::Process(a), Address::ClusterIp, there),
        (Client::Outside(a), Address::ClusterIp, there),
        (Client::Outside(a), Address::NodePort(a), there),
        (Client::Outside(a), Address::NodePort(b), there),
    ];
    let through = |node: Node, device: &str, what: &str, ways: &[_]| -> Result<()> {
        let device = if pair.cell.shape == Shape::Routed { device } else { BRIDGE };
        let set = |mtu: &str| pair.lab(node).node.ns.output("ip", &["link", "set", device, "mtu", mtu]);
        set("1280")?;
        let done = transfers(pair, what, ways);
        set("1500")?;
        done
    };
    let lines = |what: &str, tail: &str| {
        let line = |v6| {
            let (to, via) = (pair.client(Client::Outside(a), v6), pair.lab(a).ext.ip(v6));
            format!("route {what} {to} via {via} dev {UPLINK}{tail}\n")
        };
        line(false) + &line(true)
    };
    pair.lab(a).node.ns.ip_batch(&lines("add", " mtu lock 1280"))?;
    let done = transfers(pair, "towards the client outside", &ways[4..6]);
    pair.lab(a).node.ns.ip_batch(&lines("del", ""))?;
    done?;
    through(a, &pair.lab(a).client.node_device, BEHIND_POD, &ways[..3])?;
    // Last: what the external host learns of routes that do not stand in its main table cannot be flushed.
    through(b, &pair.lab(b).pods[0].node_device, "behind the endpoint", &ways)
}

#[test]
fn narrow_links_are_told_between_nodes_with_routed_veths() {
    Pair::shared(Shared::Routed, narrow);
}

#[test]
fn narrow_links_are_told_between_nodes_with_bridges() {
    Pair::shared(Shared::Bridged, narrow);
}

/// Known hole: `lo` takes a datagram whole that the way to the endpoint would have in fragments, and there it is lost.
fn is_too_large_behind_lo((client, address, endpoint): (Client, Address, Endpoint)) -> bool {
    matches!((client, address), (Client::Process(own), Address::NodePort(at)) if own == at && endpoint != Endpoint::Process(own))
}

#[test]
fn datagrams_in_fragments_arrive_between_every_client_and_endpoint() {
    Pair::shared(Shared::Routed, |pair| {
        serve(pair)?;
        for endpoint in Endpoint::ALL {
            for client in Client::ALL {
                for address in Address::ALL {
                    let way = (client, address, endpoint);
                    for v6 in [false, true].into_iter().filter(|_| !is_too_large_behind_lo(way)) {
                        arrives(pair, way, v6, Proto::Udp, DATAGRAM)?;
                    }
                }
            }
        }
        Ok(())
    });
}
