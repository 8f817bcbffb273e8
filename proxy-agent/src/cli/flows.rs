//! `fairlead flows`: one line per connection, from the entry that says most about it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use aya::Pod;
use proxy_common::Family;
use proxy_common::abi::{Flow, FlowKey};
use serde::Serialize;

use super::{Row, pins, show, snapshot};
use crate::args::ShowArgs;
use crate::dataplane::{Snapshot, sys};
use crate::flows::{FamilyFlows, FlowMaps, FlowsError, Table};
use crate::model::Protocol;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct FlowRow {
    protocol: String,
    client: SocketAddr,
    /// The address that the client asked for; of a direct flow, the endpoint's.
    address: SocketAddr,
    endpoint: SocketAddr,
    /// What the endpoint sees as its client, where the source is exchanged on the way out. As far as it is known: a request
    /// that has not left has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<SocketAddr>,
    state: &'static str,
    idle_secs: u32,
    service: String,
    flags: Vec<&'static str>,
}

impl Row for FlowRow {
    const HEADER: &'static [&'static str] =
        &["PROTO", "CLIENT", "ADDRESS", "ENDPOINT", "SOURCE", "STATE", "IDLE", "SERVICE", "FLAGS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.protocol.clone(),
            self.client.to_string(),
            self.address.to_string(),
            self.endpoint.to_string(),
            self.source.map_or_else(|| "-".to_owned(), |source| source.to_string()),
            self.state.to_owned(),
            format!("{}s", self.idle_secs),
            self.service.clone(),
            self.flags.join(","),
        ]
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pins = pins(args)?;
    let names = snapshot(&pins)?;
    let flows = FlowMaps::open(&pins)?;
    let now = sys::monotonic_secs();
    let mut rows = Vec::new();
    read(&flows.v4, &names, now, &mut rows)?;
    read(&flows.v6, &names, now, &mut rows)?;
    rows.sort();
    // A half-open flow may have both of its entries.
    rows.dedup_by(|a, b| {
        (&a.protocol, a.client, a.address) == (&b.protocol, b.client, b.address) && a.state == b.state
    });
    show(&rows, args.output)
}

fn read<F: Family>(
    flows: &FamilyFlows<F>,
    names: &Snapshot,
    now: u32,
    rows: &mut Vec<FlowRow>,
) -> Result<(), FlowsError>
where
    F::Addr: Pod,
{
    let is_reply = |flow: &Flow<F>| flow.flags & Flow::<F>::REPLY != 0;
    let (first, mut sources) = (rows.len(), HashMap::new());
    flows.for_each(Table::Flows, |key, flow| {
        sources.extend(exchanged(key, flow));
        if !is_reply(flow) {
            rows.extend(row(key, flow, state(key.proto, flow), names, now));
        }
    })?;
    // Of a half-open flow the reply's entry is stored, the owner's only where the choice was not the plain hash.
    flows.for_each(Table::New, |key, flow| {
        sources.extend(exchanged(key, flow));
        rows.extend(row(key, flow, "half-open", names, now));
    })?;
    for row in &mut rows[first..] {
        row.source = sources.get(&(row.protocol.clone(), row.client, row.endpoint)).copied();
    }
    Ok(())
}

/// Protocol, client and endpoint of a request whose source is exchanged on the way out.
type Request = (String, SocketAddr, SocketAddr);

/// What the pair that exchanges a source says of it.
fn exchanged<F: Family>(key: &FlowKey<F>, flow: &Flow<F>) -> Option<(Request, SocketAddr)> {
    if flow.flags & Flow::<F>::MASQUERADED == 0 {
        return None;
    }
    let at = |addr: F::Addr, port| SocketAddr::new(addr.into(), port);
    let (client, endpoint, source) = if flow.flags & Flow::<F>::REPLY != 0 {
        (at(flow.dst, flow.dport), at(key.src, key.sport), at(key.dst, key.dport))
    } else {
        (at(key.src, key.sport), at(key.dst, key.dport), at(flow.src, flow.sport))
    };
    Some(((protocol(key.proto), client, endpoint), source))
}

fn protocol(number: u8) -> String {
    Protocol::from_number(number).map_or_else(|| number.to_string(), |protocol| protocol.to_string())
}

fn state<F: Family>(proto: u8, owner: &Flow<F>) -> &'static str {
    let seen = owner.seen_client | owner.seen_server;
    match Protocol::from_number(proto) {
        Some(Protocol::Tcp) if owner.is_closed() => "closed",
        Some(Protocol::Tcp) if seen & Flow::<F>::FIN != 0 => "closing",
        _ => "established",
    }
}

/// The line of an entry; none for one that only exchanges the source.
fn row<F: Family>(
    key: &FlowKey<F>,
    flow: &Flow<F>,
    state: &'static str,
    names: &Snapshot,
    now: u32,
) -> Option<FlowRow> {
    if flow.flags & Flow::<F>::MASQUERADED != 0 {
        return None;
    }
    let at = |addr: F::Addr, port| SocketAddr::new(Into::<IpAddr>::into(addr), port);
    let (client, address, endpoint) = if flow.flags & Flow::<F>::REPLY != 0 {
        (at(flow.dst, flow.dport), at(flow.src, flow.sport), at(key.src, key.sport))
    } else {
        (at(key.src, key.sport), at(key.dst, key.dport), at(flow.dst, flow.dport))
    };
    let names_of = [
        (Flow::<F>::BRIDGED, "bridged"),
        (Flow::<F>::REDIRECT | Flow::<F>::REINJECT, "node"),
        (Flow::<F>::HAIRPIN, "hairpin"),
        (Flow::<F>::PINNED, "pinned"),
        (Flow::<F>::DIRECT, "direct"),
        (Flow::<F>::MASQUERADE, "masquerade"),
    ];
    let direct = flow.flags & Flow::<F>::DIRECT != 0;
    let name = names.names.get(&flow.port_id).filter(|_| !direct);
    Some(FlowRow {
        protocol: protocol(key.proto),
        client,
        address,
        endpoint,
        source: None,
        state,
        idle_secs: now.saturating_sub(flow.last_seen_secs),
        service: name.map_or_else(|| "-".to_owned(), |key| format!("{}:{}", key.service, key.port)),
        flags: names_of.into_iter().filter(|(bits, _)| flow.flags & bits != 0).map(|(_, name)| name).collect(),
    })
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::Direction;
    use proxy_common::{Addr4, V4};

    use super::*;

    fn addr(last: u8) -> Addr4 {
        Addr4 { octets: [10, 0, 0, last] }
    }

    #[test]
    fn both_entries_of_a_flow_give_the_same_line() {
        let key = FlowKey::<V4>::new(addr(1), 40_000, addr(9), 80, 6, Direction::In);
        let owner = Flow { src: addr(1), dst: addr(2), sport: 40_000, dport: 8080, last_seen_secs: 5, ..Flow::EMPTY };
        let reply = Flow {
            src: addr(9),
            dst: addr(1),
            sport: 80,
            dport: 40_000,
            flags: Flow::<V4>::REPLY,
            last_seen_secs: 5,
            ..Flow::EMPTY
        };
        let maps = Snapshot::default();
        let line = row(&key, &owner, "half-open", &maps, 8).unwrap();
        assert_eq!(line, row(&owner.partner_key(&key), &reply, "half-open", &maps, 8).unwrap());
        assert_eq!(line.cells().join(" "), "TCP 10.0.0.1:40000 10.0.0.9:80 10.0.0.2:8080 - half-open 3s - ");
    }

    #[test]
    fn both_entries_of_an_exchanged_source_name_the_request() {
        let key = FlowKey::<V4>::new(addr(1), 40_000, addr(2), 8080, 6, Direction::Out);
        let flags = Flow::<V4>::MASQUERADED;
        let owner = Flow { src: addr(3), dst: addr(2), sport: 61_000, dport: 8080, flags, ..Flow::EMPTY };
        let reply = Flow {
            src: addr(2),
            dst: addr(1),
            sport: 8080,
            dport: 40_000,
            flags: flags | Flow::<V4>::REPLY,
            ..Flow::EMPTY
        };
        let at = |last, port| SocketAddr::new([10, 0, 0, last].into(), port);
        let expected = Some((("TCP".to_owned(), at(1, 40_000), at(2, 8080)), at(3, 61_000)));
        assert_eq!(exchanged(&key, &owner), expected);
        assert_eq!(exchanged(&owner.partner_key(&key), &reply), expected);
        assert_eq!(row(&key, &owner, "established", &Snapshot::default(), 0), None);
    }

    #[test]
    fn a_tcp_flow_says_how_far_it_is() {
        let flow = |client, server| Flow::<V4> { seen_client: client, seen_server: server, ..Flow::EMPTY };
        const FIN: u8 = Flow::<V4>::FIN;
        assert_eq!(state(6, &flow(0, 0)), "established");
        assert_eq!(state(6, &flow(FIN, 0)), "closing");
        assert_eq!(state(6, &flow(FIN, FIN)), "closed");
        assert_eq!(state(6, &flow(0, Flow::<V4>::RST)), "closed");
        assert_eq!(state(17, &flow(0, 0)), "established");
    }
}
