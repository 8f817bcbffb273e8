//! Session affinity with two nodes: each node keeps its own clients, whatever address of the Service they ask.

use anyhow::{Result, ensure};
use fairlead_lab::ServiceSpec;

use super::{
    pair::{Pair, Shared, spec},
    rules::{Address, Client, Endpoint, Node, translated_at},
};
use crate::cell::{Combo, answered};

/// Connections that must all reach one endpoint: of four, by chance once in 10^12 times.
const CONNECTIONS: usize = 20;

/// The Service with every endpoint.
const ALL: u8 = 31;
/// The one with `externalTrafficPolicy: Local`.
const LOCAL: u8 = 32;

fn sticky(n: u8) -> ServiceSpec {
    let mut spec = spec("sticky", n);
    spec.affinity = Some(600);
    spec
}

/// Who answers this client at these addresses, of all these connections.
fn servers(pair: &Pair, client: Client, at: &[Address], n: u8, combo: Combo) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for connection in 0..CONNECTIONS {
        let to = pair.address(&sticky(n), at[connection % at.len()], combo.v6);
        let server = answered(pair.namespace(client), pair.ask(client, combo.proto, to, 0))?.server;
        if !found.contains(&server) {
            found.push(server);
        }
    }
    Ok(found)
}

#[test]
fn rules_78_to_83_a_node_keeps_its_clients_over_every_address() {
    Pair::shared(Shared::Routed, |pair| {
        let mut local = sticky(LOCAL);
        local.external_local = true;
        pair.serve(&[(sticky(ALL), &Endpoint::ALL), (local, &[Endpoint::Pod(Node::B)])])?;
        Combo::ALL.into_iter().try_for_each(|combo| every_address_leads_to_one(pair, combo))?;
        a_policy_comes_first(pair)?;
        who_comes_back_has_lost_its_clients(pair)
    });
}

/// Rules 78 and 83: the key is the port and the client's own address, and each node has a table of its own.
fn every_address_leads_to_one(pair: &Pair, combo: Combo) -> Result<()> {
    for client in Client::ALL {
        for node in [Node::A, Node::B] {
            let by_node = |address: &Address| translated_at(client, *address) == node;
            let addresses: Vec<_> = Address::ALL.into_iter().filter(by_node).collect();
            if addresses.is_empty() {
                continue;
            }
            let found = servers(pair, client, &addresses, ALL, combo)?;
            ensure!(found.len() == 1, "{client:?} by node {node:?} at {addresses:?}, {combo:?}: answered by {found:?}");
        }
    }
    Ok(())
}

/// Rule 80: whom the policy does not allow is not asked, however long a client has known it.
fn a_policy_comes_first(pair: &Pair) -> Result<()> {
    let (outside, service) = (Client::Outside(Node::A), sticky(LOCAL));
    for combo in Combo::ALL {
        let found = servers(pair, outside, &[Address::ClusterIp], LOCAL, combo)?;
        ensure!(found == [Endpoint::Pod(Node::B).name()], "{combo:?}: {found:?}");
    }
    pair.offer(&service, &[Endpoint::Pod(Node::A), Endpoint::Pod(Node::B)])?;
    for combo in Combo::ALL {
        let found = servers(pair, outside, &[Address::ClusterIp], LOCAL, combo)?;
        ensure!(found == [Endpoint::Pod(Node::B).name()], "{combo:?}: it was with the other node's: {found:?}");
        let found = servers(pair, outside, &[Address::NodePort(Node::A), Address::Balancer], LOCAL, combo)?;
        ensure!(found == [Endpoint::Pod(Node::A).name()], "{combo:?}, externalTrafficPolicy Local: {found:?}");
    }
    Ok(())
}

/// Rule 81.
fn who_comes_back_has_lost_its_clients(pair: &Pair) -> Result<()> {
    let service = sticky(ALL);
    for combo in Combo::ALL {
        let client = Client::Pod(Node::B);
        let first = servers(pair, client, &[Address::ClusterIp], ALL, combo)?;
        let others: Vec<_> = Endpoint::ALL.into_iter().filter(|endpoint| endpoint.name() != first[0]).collect();
        pair.offer(&service, &others)?;
        let second = servers(pair, client, &[Address::ClusterIp], ALL, combo)?;
        ensure!(second.len() == 1 && second != first, "{combo:?}: {first:?} went, then {second:?}");
        pair.offer(&service, &Endpoint::ALL)?;
        let third = servers(pair, client, &[Address::ClusterIp], ALL, combo)?;
        ensure!(third == second, "{combo:?}: {first:?} came back, {second:?} had its clients, then {third:?}");
    }
    Ok(())
}
