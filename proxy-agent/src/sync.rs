//! A Service update from top to bottom: events → index → plan → diff → apply → status.
//!
//! Changes are coalesced only while an earlier one is being applied. Nothing is written before every source has
//! delivered its first full list; what the kernel holds from an earlier agent serves until then.

use std::time::Duration;

use ipnet::IpNet;
use tracing::{debug, info};

use crate::dataplane::{Change, Dataplane, DataplaneError, Grace, MapOp, Snapshot, Subject};
use crate::devices::NodeAddresses;
use crate::diff::Ledger;
use crate::health::node_ports::HealthChecks;
use crate::index::{Changed, Event, Index, ObjectCount, Triggers};
use crate::model::{Families, IpFamily, Node};
use crate::plan::node_ports::{Answer, NodePorts};
use crate::plan::{self, Desired};
use crate::status::{Board, News};

mod apply;
mod figures;
mod task;

pub use figures::Figures;
pub use task::{Input, Listeners, run};

#[cfg(test)]
mod tests;

/// How long the first writes wait for the addresses of the own Node (rule 146).
const NODE_WAIT: Duration = Duration::from_secs(30);

/// The control plane, without a clock or a task of its own.
pub struct Sync<D> {
    dataplane: D,
    index: Index,
    ledger: Ledger,
    board: Board,
    ipv6: bool,
    node_ports: NodePorts,
    /// What was said last of the addresses that answer NodePorts.
    answer: Option<Answer>,
    changed: Changed,
    started: Duration,
    first_done: bool,
    graves: Graves,
    tally: Tally,
    /// Of changes that are not in the kernel yet.
    triggers: Triggers,
    /// Of changes that are, until somebody asks.
    programmed: Vec<(IpFamily, Duration)>,
    /// What load balancers may be told: of Services as the kernel has them (rule 127).
    checks: HealthChecks,
    checks_moved: bool,
    /// The node's addresses as the kernel has them, until somebody asks.
    addresses: Option<NodeAddresses>,
    /// The networks around ClusterIPs as the kernel has them, until somebody asks.
    service_networks: Option<Vec<IpNet>>,
}

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    done: u64,
    failed: u64,
    writes: u64,
    seen: ObjectCount,
}

/// Changes that are done but for what waits for a grace period.
#[derive(Debug, Default)]
struct Graves {
    /// No grace period has begun for these.
    new: Vec<Change>,
    /// The grace period under way began after these.
    waiting: Vec<Change>,
    /// Their grace period is over.
    over: Vec<Change>,
    under_way: bool,
}

impl<D: Dataplane> Sync<D> {
    /// Takes over what the maps hold.
    pub fn new(mut dataplane: D, now: Duration) -> Result<Self, DataplaneError> {
        let maps = dataplane.dump()?;
        report_restored(&maps);
        let (ledger, ipv6) = (Ledger::restore(&maps, now), maps.capacities.ipv6);
        let (index, board, changed) = (Index::default(), Board::default(), Changed::default());
        Ok(Self {
            dataplane,
            index,
            ledger,
            board,
            ipv6,
            node_ports: NodePorts::default(),
            answer: None,
            changed,
            started: now,
            first_done: false,
            graves: Graves::default(),
            tally: Tally::default(),
            triggers: Triggers::default(),
            programmed: Vec::new(),
            checks: HealthChecks::new(),
            checks_moved: false,
            addresses: None,
            service_networks: None,
        })
    }

    /// Lets `node_ports` decide which of the node's addresses answer NodePorts.
    #[must_use]
    pub fn with_node_ports(self, node_ports: NodePorts) -> Self {
        Self { node_ports, ..self }
    }

    /// Takes an event in, without a write.
    pub fn take(&mut self, event: Event) {
        let changed = self.index.apply(event);
        self.tally.seen = self.tally.seen.plus(changed.objects);
        self.changed.merge(changed);
    }

    /// Brings the kernel up to date with all that was taken in, and with the time.
    pub fn step(&mut self, now: Duration) {
        if !self.index.is_synced() || self.node_wait().is_some_and(|until| now < until) {
            return;
        }
        let mut changed = std::mem::take(&mut self.changed);
        self.triggers.merge(std::mem::take(&mut changed.triggers));
        if !self.first_done {
            changed.node = true;
            changed.services.extend(self.index.service_names().chain(self.ledger.services()).cloned());
        }
        let retries = self.board.due(now);
        let leftovers = !self.first_done || retries.contains(&Subject::Leftovers);
        changed.node |= retries.contains(&Subject::Node);
        let service_cidrs = (changed.service_cidrs && !mutant!("rule-67")) || retries.contains(&Subject::ServiceCidrs);
        changed.services.extend(retries.into_iter().filter_map(Subject::into_service));

        if changed.node {
            self.sync_node(now);
        }
        // Services that go come last: an address that moves to another one is handed over, not taken away and given.
        let (there, gone): (Vec<_>, Vec<_>) =
            changed.services.into_iter().partition(|name| self.index.service(name).is_some());
        for name in there.iter().chain(&gone) {
            let desired = plan::desired(&self.index, name, self.ipv6);
            self.sync_service(&desired, now);
        }
        self.retire();
        for change in self.ledger.settle(now) {
            self.carry_out(change, None, now);
        }
        // Behind the ClusterIPs: whatever else lies in these networks is dropped.
        if service_cidrs {
            self.sync_service_cidrs(now);
        }
        if leftovers {
            let change = self.ledger.leftovers();
            self.carry_out(change, None, now);
        }
        if !std::mem::replace(&mut self.first_done, true) {
            self.report_first(now);
        }
    }

    /// Clears `FILTER` bits that neither the plan nor a live flow needs. `live`: every address of a live flow.
    pub fn sweep_filter(&mut self, live: impl Iterator<Item = std::net::IpAddr>) {
        for op in self.ledger.rebuild(live) {
            self.write(&op).unwrap_or_else(|error| debug!(%error, "FILTER keeps a bit that nothing needs"));
        }
    }

    /// When [`Self::step`] has something to do even if nothing is taken in.
    pub fn next_wake(&self) -> Option<Duration> {
        if !self.first_done {
            return self.node_wait().filter(|_| self.index.is_synced());
        }
        let wakes = [self.ledger.next_deadline(), self.board.next_retry()];
        wakes.into_iter().flatten().min()
    }

    /// Until when the first writes wait for the own Node: without it, NodePorts would be answered where they should not, and
    /// endpoints of other zones used.
    fn node_wait(&self) -> Option<Duration> {
        (!self.first_done && self.node_ports.waits(&self.index)).then(|| self.started + NODE_WAIT)
    }

    /// True if retires failed and wait for another attempt.
    pub fn has_retires(&self) -> bool {
        !self.graves.over.is_empty()
    }

    /// The families that have something to write, once there is a full list of everything.
    pub fn waiting(&self) -> Families {
        match (self.index.is_synced(), self.first_done) {
            (false, _) => Families::NONE,
            (true, false) => self.families(),
            (true, true) => self.changed.families,
        }
    }

    /// The families that are not up to date although [`Self::step`] has tried.
    pub fn behind(&self) -> Families {
        self.waiting().or(self.board.behind())
    }

    /// The families that this node has.
    pub const fn families(&self) -> Families {
        if self.ipv6 { Families::BOTH } else { Families::one(IpFamily::V4) }
    }

    /// When what caused the changes happened that have reached the kernel since this was last asked: time since 1970.
    pub fn take_programmed(&mut self) -> Vec<(IpFamily, Duration)> {
        std::mem::take(&mut self.programmed)
    }

    /// What load balancers may be told, if that has changed since this was last asked.
    pub fn take_checks(&mut self) -> Option<HealthChecks> {
        std::mem::take(&mut self.checks_moved).then(|| self.checks.clone())
    }

    /// The node's addresses, if they may have changed since this was last asked.
    pub fn take_addresses(&mut self) -> Option<NodeAddresses> {
        self.addresses.take()
    }

    /// The smallest networks around the ServiceCIDRs, if these may have changed since this was last asked.
    pub fn take_service_networks(&mut self) -> Option<Vec<IpNet>> {
        self.service_networks.take()
    }

    /// The own Node.
    pub const fn node(&self) -> Option<&Node> {
        self.index.node()
    }

    /// How each Service stands.
    pub const fn board(&self) -> &Board {
        &self.board
    }

    /// What changed on the board since this was asked last.
    pub fn take_news(&mut self) -> News {
        self.board.take_news()
    }

    /// What the kernel holds.
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The maps.
    pub const fn dataplane(&self) -> &D {
        &self.dataplane
    }

    fn report_first(&self, now: Duration) {
        let ((services, slices), (done, failed)) = (self.index.counts(), self.board.counts());
        let took_ms = now.saturating_sub(self.started).as_millis() as u64;
        info!(services, slices, done, failed, took_ms, "first sync complete");
    }
}

fn report_restored(maps: &Snapshot) {
    if !maps.names.is_empty() {
        info!(ports = maps.names.len(), addresses = maps.services.len(), "the maps hold an earlier agent's Services");
    }
}
