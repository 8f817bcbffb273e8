//! `fairlead affinity`: which endpoint each client keeps, where a Service asks for `sessionAffinity: ClientIP`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use aya::Pod;
use proxy_common::Family;
use proxy_common::abi::{Affinity, AffinityKey};
use serde::Serialize;

use super::{Row, pins, show, snapshot};
use crate::affinity::{AffinityMaps, Clients, Facts, is_over};
use crate::args::ShowArgs;
use crate::dataplane::{Snapshot, sys};
use crate::flows::FlowsError;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct ClientRow {
    namespace: String,
    service: String,
    port_name: String,
    client: IpAddr,
    /// None if it is gone: the client's next connection gets another.
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<SocketAddr>,
    /// Seconds since its last new connection.
    age_secs: u32,
    timeout_secs: u32,
    /// False if its next connection is balanced anew.
    holds: bool,
}

impl Row for ClientRow {
    const HEADER: &'static [&'static str] = &["SERVICE", "PORT", "CLIENT", "ENDPOINT", "AGE", "TIMEOUT"];

    fn cells(&self) -> Vec<String> {
        let endpoint = self.endpoint.map_or_else(|| "(gone)".to_owned(), |endpoint| endpoint.to_string());
        vec![
            format!("{}/{}", self.namespace, self.service),
            if self.port_name.is_empty() { "-".to_owned() } else { self.port_name.clone() },
            self.client.to_string(),
            endpoint,
            format!("{}s", self.age_secs),
            format!("{}s{}", self.timeout_secs, if self.holds { "" } else { " (over)" }),
        ]
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pins = pins(args)?;
    let maps = snapshot(&pins)?;
    let clients = AffinityMaps::open(&pins)?;
    let (endpoints, now) = (endpoints(&maps), sys::monotonic_secs());
    let mut rows = Vec::new();
    read(&clients.v4, &maps, &endpoints, now, &mut rows)?;
    read(&clients.v6, &maps, &endpoints, now, &mut rows)?;
    rows.sort();
    show(&rows, args.output)
}

/// Endpoints by id and generation, as the slots have them.
fn endpoints(maps: &Snapshot) -> HashMap<(u32, u32), SocketAddr> {
    let slots = maps.slots_v4.values().chain(maps.slots_v6.values());
    slots.map(|slot| ((slot.endpoint_id, slot.endpoint_gen), SocketAddr::new(slot.addr, slot.port))).collect()
}

fn read<F: Family>(
    clients: &Clients<F>,
    maps: &Snapshot,
    endpoints: &HashMap<(u32, u32), SocketAddr>,
    now: u32,
    rows: &mut Vec<ClientRow>,
) -> Result<(), FlowsError>
where
    F::Addr: Pod,
{
    clients.for_each(|key, entry| rows.extend(row(key, entry, maps, endpoints, now)))
}

/// The line of an entry; none for one whose port is gone, which the next sweep removes.
fn row<F: Family>(
    key: &AffinityKey<F>,
    entry: &Affinity,
    maps: &Snapshot,
    endpoints: &HashMap<(u32, u32), SocketAddr>,
    now: u32,
) -> Option<ClientRow> {
    let name = maps.names.get(&key.port_id)?;
    let timeout_secs = maps.ports.get(&key.port_id).map_or(0, |port| port.policy.affinity_secs());
    let generation = maps.live.get(&entry.endpoint_id).copied().unwrap_or(0);
    Some(ClientRow {
        namespace: name.service.namespace().to_owned(),
        service: name.service.name().to_owned(),
        port_name: name.port.to_string(),
        client: key.client.into(),
        endpoint: endpoints.get(&(entry.endpoint_id, entry.endpoint_gen)).copied(),
        age_secs: now.saturating_sub(entry.last_new_secs),
        timeout_secs,
        holds: !is_over(entry, Facts { timeout_secs, generation }, now),
    })
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::{Policy, Port};
    use proxy_common::{Addr4, V4};

    use super::*;
    use crate::dataplane::Slot;
    use crate::model::{IpFamily, ObjectName, PortKey, Protocol};

    #[test]
    fn an_entry_reads_like_the_service_and_the_endpoint() {
        let key = |port_id| AffinityKey::<V4> { client: Addr4 { octets: [10, 0, 0, 1] }, port_id };
        let entry = Affinity { endpoint_id: 4, endpoint_gen: 2, index: 0, last_new_secs: 100 };
        let name = PortKey {
            service: ObjectName::new("shop", "web"),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: IpFamily::V4,
        };
        let mut maps = Snapshot::default();
        maps.names.insert(7, name);
        maps.ports.insert(7, Port { policy: Policy::new(0, 60), ..Port::UNUSED });
        maps.live.insert(4, 2);
        let slot =
            Slot { endpoint_id: 4, endpoint_gen: 2, owner: 7, addr: [10, 244, 0, 5].into(), port: 8080, flags: 0 };
        maps.slots_v4.insert(0, slot);
        let line = |maps: &Snapshot, now| {
            row(&key(7), &entry, maps, &endpoints(maps), now).map(|row| row.cells().join(" ")).unwrap_or_default()
        };
        assert_eq!(line(&maps, 105), "shop/web http 10.0.0.1 10.244.0.5:8080 5s 60s");
        assert_eq!(line(&maps, 160), "shop/web http 10.0.0.1 10.244.0.5:8080 60s 60s (over)");
        maps.live.insert(4, 3);
        maps.slots_v4.clear();
        assert_eq!(line(&maps, 105), "shop/web http 10.0.0.1 (gone) 5s 60s (over)");
        assert!(row(&key(8), &entry, &maps, &endpoints(&maps), 105).is_none());
    }
}
