//! A blue/green change between nodes, under load from everywhere: nothing is lost, and nobody who was told to go is asked.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use fairlead_lab::{Load, LoadPlan, Proto, Server};

use super::{
    pair::{Pair, Shared, spec},
    rules::{Address, Client, Endpoint, Node},
};
use crate::cell::TARGET;

/// Changes from one node to the other and back.
const CHANGES: usize = 10;
/// Load between two changes.
const BEAT: Duration = Duration::from_millis(150);

/// Who asks for what, all at once.
const LOADS: [(Client, Address, bool, Proto); 8] = [
    (Client::Pod(Node::A), Address::ClusterIp, false, Proto::Tcp),
    (Client::Pod(Node::B), Address::ClusterIp, true, Proto::Udp),
    (Client::Process(Node::A), Address::ClusterIp, true, Proto::Tcp),
    (Client::Process(Node::B), Address::Balancer, false, Proto::Udp),
    (Client::Outside(Node::A), Address::NodePort(Node::A), false, Proto::Tcp),
    (Client::Outside(Node::A), Address::NodePort(Node::B), true, Proto::Tcp),
    (Client::Outside(Node::B), Address::NodePort(Node::B), false, Proto::Udp),
    (Client::Pod(Node::A), Address::NodePort(Node::B), true, Proto::Udp),
];

#[test]
fn a_change_from_one_node_to_the_other_loses_nothing() {
    Pair::shared(Shared::Bridged, changed);
}

fn changed(pair: &Pair) -> Result<()> {
    let (blue, green) = (Endpoint::Pod(Node::A), Endpoint::Pod(Node::B));
    let mut service = spec("change", 41);
    service.ports.iter_mut().for_each(|port| port.target = TARGET + 1);
    let start = |endpoint| {
        let addrs = [false, true].map(|v6| SocketAddr::new(pair.endpoint(endpoint, v6), TARGET + 1));
        Server::both(pair.host_of(endpoint), endpoint.name(), &addrs)
    };
    let mut serving = start(blue)?;
    pair.serve(&[(service.clone(), &[blue])])?;
    let mut loads = Vec::new();
    for (client, address, v6, proto) in LOADS {
        let plan = LoadPlan {
            workers: 1,
            pause: Duration::from_millis(1),
            ..LoadPlan::new(proto, pair.address(&service, address, v6))
        };
        loads.push(Load::start(pair.namespace(client), plan)?);
    }
    for change in 0..CHANGES {
        let next = if change % 2 == 0 { green } else { blue };
        std::thread::sleep(BEAT);
        let started = start(next)?;
        pair.offer(&service, &[next])?;
        // Who was given the old one has its answer; then nobody asks it any more.
        ensure!(loads.iter().all(Load::turn_over), "a request hangs");
        drop(std::mem::replace(&mut serving, started));
    }
    std::thread::sleep(BEAT);
    let reports: Vec<_> = LOADS.iter().zip(loads.into_iter().map(Load::stop)).collect();
    for (load, report) in &reports {
        println!("{load:?}: {report}");
    }
    for (load, report) in reports {
        let servers = report.by_server();
        let whole = report.failures().is_empty() && [blue, green].iter().all(|e| servers.contains_key(e.name()));
        ensure!(whole, "{load:?}: {report}");
    }
    Ok(())
}

/// Rule 36: what is established stays where it is, by whichever node it came.
#[test]
fn established_connections_stay_where_they_are() {
    Pair::shared(Shared::Routed, |pair| {
        let (blue, green) = (Endpoint::Pod(Node::A), Endpoint::Process(Node::B));
        let service = spec("stay", 42);
        pair.serve(&[(service.clone(), &[blue])])?;
        let mut open = Vec::new();
        for (client, address, v6, proto) in LOADS.into_iter().filter(|(.., proto)| *proto == Proto::Tcp) {
            let ask = pair.ask(client, proto, pair.address(&service, address, v6), 0);
            let opened = ask.open(pair.namespace(client))?;
            open.push((client, address, opened.map_err(|outcome| anyhow::anyhow!("{client:?}: {outcome}"))?));
        }
        for endpoints in [&[blue][..], &[green], &[blue, green], &[]] {
            pair.offer(&service, endpoints)?;
            for (client, address, conversation) in &mut open {
                let attempt = conversation.ask();
                let stayed = attempt.outcome.server() == Some(blue.name());
                ensure!(stayed, "{client:?} → {address:?}, {endpoints:?}: {attempt}");
            }
        }
        Ok(())
    });
}
