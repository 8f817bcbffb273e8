//! Ageing: a sweep over the confirmed flows removes pairs that have been idle for too long, and learns which addresses
//! live flows still use; then clients go that keep no endpoint any more. Half-open flows need no sweep: their table evicts
//! the oldest.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use aya::Pod;
use proxy_common::Family;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::algo::timeout::Timeouts;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use crate::affinity::AffinityMaps;
use crate::dataplane::{MapUse, sys};
use crate::flows::{FamilyFlows, FlowMaps, FlowsError, Table, addresses};

/// True if a pair has been idle for too long. It goes or stays together: the owner entry holds its state, and the later
/// of both halves' last packets counts. `partner_seen_secs` is the other half's, if there is one.
pub fn expired<F: Family>(
    now_secs: u32,
    timeouts: &Timeouts,
    proto: u8,
    owner: &Flow<F>,
    partner_seen_secs: Option<u32>,
) -> bool {
    let last = owner.last_seen_secs.max(partner_seen_secs.unwrap_or(0));
    now_secs.saturating_sub(last)
        > if mutant!("rule-114") { timeouts.udp_stream_secs } else { timeouts.of(proto, owner) }
}

/// Where a sweep reads and removes; the kernel's tables, or a test's.
pub trait FlowTable<F: Family> {
    /// Its failure.
    type Error;
    /// An entry.
    fn get(&self, key: &FlowKey<F>) -> Result<Option<Flow<F>>, Self::Error>;
    /// Removes an entry; false if there was none.
    fn remove(&mut self, key: &FlowKey<F>) -> Result<bool, Self::Error>;
}

impl<F: Family> FlowTable<F> for FamilyFlows<F>
where
    F::Addr: Pod,
{
    type Error = FlowsError;

    fn get(&self, key: &FlowKey<F>) -> Result<Option<Flow<F>>, FlowsError> {
        Self::get(self, key)
    }

    fn remove(&mut self, key: &FlowKey<F>) -> Result<bool, FlowsError> {
        Self::remove(self, key)
    }
}

/// How full the tables of flows and of clients were at the last sweep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowUse {
    /// Each table.
    pub maps: Vec<MapUse>,
}

/// What a sweep found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that were there.
    pub entries: u64,
    /// Pairs removed.
    pub removed: u64,
    /// Halves without their other half removed.
    pub orphans: u64,
}

/// True if an entry's own idle time could end its pair: only then is its other half looked at.
fn is_candidate<F: Family>(now_secs: u32, timeouts: &Timeouts, key: &FlowKey<F>, flow: &Flow<F>) -> bool {
    // A half that is no owner has no state of its own: of all timeouts of its protocol the shortest decides.
    let reply = flow.flags & Flow::<F>::REPLY != 0;
    reply && now_secs.saturating_sub(flow.last_seen_secs) > shortest(timeouts)
        || !reply && expired(now_secs, timeouts, key.proto, flow, None)
}

const fn shortest(timeouts: &Timeouts) -> u32 {
    let all = [
        timeouts.tcp_established_secs,
        timeouts.tcp_close_wait_secs,
        timeouts.tcp_time_wait_secs,
        timeouts.tcp_close_secs,
        timeouts.udp_stream_secs,
        timeouts.other_secs,
    ];
    let (mut least, mut i) = (all[0], 1);
    while i < all.len() {
        if all[i] < least {
            least = all[i];
        }
        i += 1;
    }
    least
}

/// Judges a candidate anew, together with its other half, and removes both if they are due.
pub fn prune<F: Family, T: FlowTable<F>>(
    table: &mut T,
    now_secs: u32,
    timeouts: &Timeouts,
    key: &FlowKey<F>,
    swept: &mut Swept,
) -> Result<(), T::Error> {
    let Some(flow) = table.get(key)? else { return Ok(()) };
    let partner_key = flow.partner_key(key);
    let partner = table.get(&partner_key)?;
    let is_reply = |flow: &Flow<F>| flow.flags & Flow::<F>::REPLY != 0;
    match (is_reply(&flow), partner) {
        // An owner, with its reply half or without.
        (false, partner) => {
            let partner = partner.filter(is_reply);
            if expired(now_secs, timeouts, key.proto, &flow, partner.map(|p| p.last_seen_secs)) {
                // The reply half first: a request that comes in between still finds its way, while a reply half left
                // over would hold the tuple.
                if partner.is_some() {
                    table.remove(&partner_key)?;
                }
                swept.removed += u64::from(table.remove(key)?);
            }
        }
        // A reply half: its owner, if there is one, is judged as a candidate of its own.
        (true, Some(partner)) if !is_reply(&partner) => {}
        (true, _) => {
            if expired(now_secs, timeouts, key.proto, &flow, None) {
                swept.orphans += u64::from(table.remove(key)?);
            }
        }
    }
    Ok(())
}

fn sweep_family<F: Family>(
    flows: &mut FamilyFlows<F>,
    now_secs: u32,
    timeouts: &Timeouts,
    live: &mut HashSet<IpAddr>,
    swept: &mut Swept,
    used: &mut FlowUse,
) -> Result<(), FlowsError>
where
    F::Addr: Pod,
{
    let mut candidates = Vec::new();
    let (mut entries, mut half_open) = (0, 0);
    flows.for_each(Table::Flows, |key, flow| {
        entries += 1;
        live.extend(addresses(key, flow));
        if is_candidate(now_secs, timeouts, key, flow) {
            candidates.push(*key);
        }
    })?;
    flows.for_each(Table::New, |key, flow| {
        half_open += 1;
        live.extend(addresses(key, flow));
    })?;
    swept.entries += entries;
    used.maps.extend(flows.uses(entries, half_open));
    for key in &candidates {
        prune(flows, now_secs, timeouts, key, swept)?;
    }
    Ok(())
}

/// Sweeps both families once. Returns the addresses that flows used, and how many there were, when they were read.
pub fn sweep(
    flows: &mut FlowMaps,
    now_secs: u32,
    timeouts: &Timeouts,
) -> Result<(Swept, HashSet<IpAddr>, FlowUse), FlowsError> {
    let (mut swept, mut live, mut used) = (Swept::default(), HashSet::new(), FlowUse::default());
    sweep_family(&mut flows.v4, now_secs, timeouts, &mut live, &mut swept, &mut used)?;
    sweep_family(&mut flows.v6, now_secs, timeouts, &mut live, &mut swept, &mut used)?;
    Ok((swept, live, used))
}

/// Sweeps for ever, and tells `live` after each sweep which addresses flows use. Runs on a thread of its own, because a
/// full table takes hundreds of milliseconds.
pub async fn run(
    mut flows: FlowMaps,
    mut clients: AffinityMaps,
    timeouts: Timeouts,
    interval: Duration,
    live: mpsc::Sender<HashSet<IpAddr>>,
    used: watch::Sender<FlowUse>,
) -> Result<(), FlowsError> {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let began = std::time::Instant::now();
        let result;
        (flows, clients, result) = match tokio::task::spawn_blocking(move || {
            let now = sys::monotonic_secs();
            let result = sweep(&mut flows, now, &timeouts).and_then(|swept| Ok((swept, clients.sweep(now)?)));
            (flows, clients, result)
        })
        .await
        {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let ((swept, addresses, mut now_used), tables) = result?;
        now_used.maps.extend(tables.map(|table| table.used));
        let forgotten: u64 = tables.iter().map(|table| table.removed).sum();
        used.send_replace(now_used);
        let took_ms = began.elapsed().as_millis() as u64;
        let Swept { entries, removed, orphans } = swept;
        tracing::debug!(entries, removed, orphans, forgotten, took_ms, "swept flows and clients");
        // Nobody listens any more once the agent ends.
        if live.send(addresses).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proxy_common::abi::Direction;
    use proxy_common::{Addr4, V4};

    use super::*;

    type Memory = Vec<(FlowKey<V4>, Flow<V4>)>;

    impl FlowTable<V4> for Memory {
        type Error = Infallible;

        fn get(&self, key: &FlowKey<V4>) -> Result<Option<Flow<V4>>, Infallible> {
            Ok(self.iter().find(|(k, _)| k == key).map(|(_, flow)| *flow))
        }

        fn remove(&mut self, key: &FlowKey<V4>) -> Result<bool, Infallible> {
            let before = self.len();
            self.retain(|(k, _)| k != key);
            Ok(self.len() < before)
        }
    }

    const TCP: u8 = 6;
    const UDP: u8 = 17;

    fn addr(last: u8) -> Addr4 {
        Addr4 { octets: [10, 0, 0, last] }
    }

    fn pair(table: &mut Memory, proto: u8, owner_seen: u32, reply_seen: u32) -> (FlowKey<V4>, FlowKey<V4>) {
        let key = FlowKey::new(addr(1), 40_000, addr(9), 80, proto, Direction::In);
        let owner =
            Flow { src: addr(1), dst: addr(2), sport: 40_000, dport: 8080, last_seen_secs: owner_seen, ..Flow::EMPTY };
        let reply_key = owner.partner_key(&key);
        let reply = Flow {
            src: addr(9),
            dst: addr(1),
            sport: 80,
            dport: 40_000,
            flags: Flow::<V4>::REPLY,
            last_seen_secs: reply_seen,
            ..Flow::EMPTY
        };
        table.extend([(key, owner), (reply_key, reply)]);
        (key, reply_key)
    }

    fn swept(table: &mut Memory, now: u32) -> Swept {
        let timeouts = Timeouts::default();
        let keys: Vec<_> =
            table.iter().filter(|(key, flow)| is_candidate(now, &timeouts, key, flow)).map(|(key, _)| *key).collect();
        let mut swept = Swept::default();
        for key in keys {
            prune(table, now, &timeouts, &key, &mut swept).unwrap();
        }
        swept
    }

    #[test]
    fn rule_114_each_state_has_its_timeout() {
        let timeouts = Timeouts::default();
        let flow = |client: u8, server: u8| Flow::<V4> { seen_client: client, seen_server: server, ..Flow::EMPTY };
        const FIN: u8 = Flow::<V4>::FIN;
        const RST: u8 = Flow::<V4>::RST;
        for (proto, client, server, secs) in [
            (TCP, 0, 0, 86_400),
            (TCP, FIN, 0, 3_600),
            (TCP, 0, FIN, 3_600),
            (TCP, FIN, FIN, 120),
            (TCP, FIN, FIN | RST, 10),
            (TCP, RST, 0, 10),
            (UDP, 0, 0, 120),
            (132, 0, 0, 600),
        ] {
            let flow = flow(client, server);
            assert!(!expired(secs, &timeouts, proto, &flow, None), "{proto} {client} {server}: {secs} s");
            assert!(expired(secs + 1, &timeouts, proto, &flow, None), "{proto} {client} {server}: {secs} s + 1");
        }
    }

    #[test]
    fn a_pair_lives_as_long_as_either_half_hears_something() {
        for (owner_seen, reply_seen) in [(100, 0), (0, 100)] {
            let mut table = Memory::new();
            pair(&mut table, UDP, owner_seen, reply_seen);
            assert_eq!(swept(&mut table, 220), Swept::default());
            assert_eq!(table.len(), 2);
            assert_eq!(swept(&mut table, 221).removed, 1);
            assert!(table.is_empty());
        }
    }

    #[test]
    fn the_owners_state_decides_for_both_halves() {
        let mut table = Memory::new();
        pair(&mut table, TCP, 0, 0);
        swept(&mut table, 5_000);
        assert_eq!(table.len(), 2, "an idle TCP connection is no closed one");
        table[0].1.seen_server = Flow::<V4>::RST;
        swept(&mut table, 5_000);
        assert!(table.is_empty());
    }

    #[test]
    fn half_a_pair_goes_when_its_own_time_is_over() {
        let mut table = Memory::new();
        let (owner, _) = pair(&mut table, UDP, 0, 0);
        FlowTable::remove(&mut table, &owner).unwrap();
        assert_eq!(swept(&mut table, 120), Swept::default());
        assert_eq!(swept(&mut table, 121).orphans, 1);
        let (_, reply) = pair(&mut table, UDP, 0, 0);
        FlowTable::remove(&mut table, &reply).unwrap();
        assert_eq!(swept(&mut table, 121).removed, 1);
        assert!(table.is_empty());
    }

    #[test]
    fn a_clock_that_is_behind_a_packet_expires_nothing() {
        assert!(!expired(5, &Timeouts::default(), UDP, &Flow::<V4> { last_seen_secs: 9, ..Flow::EMPTY }, None));
    }
}
