//! Devices: followed by netlink, given a role, described in `DEVICES`, and attached to.
//!
//! `inventory` ← `netlink` events → `desired` → `steps` → hooks and map. Everything between the two ends is pure.
//! What the steps ask of the kernel may take long: `fitter` does it on a thread of its own.

pub mod desired;
mod fitter;
pub mod inventory;
pub mod netlink;
mod places;
pub mod replies;
pub mod role;
pub mod rules;
pub mod select;
pub mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{HashMap, IterableMap as _, Map, MapData, MapError};
use proxy_common::abi;
use rtnetlink::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::dataplane::MapUse;
use crate::dataplane::attach::Attacher;
use crate::dataplane::pin::PinRoot;
use desired::{Wishes, desired};
use fitter::{Fitter, Goal, Goals};
use inventory::{Event, Inventory};
use netlink::{Changes, NetlinkError, Notice};
use places::{Places, Questions};
use replies::Rule;
use rules::{Changed, RuleError};

/// Everything is read again this often, because the kernel does not tell of every route that goes.
const REREAD: Duration = Duration::from_secs(60);
/// The node's addresses, and with them the first Services, wait so long for the first devices to be served.
const FIRST_WAIT: Duration = Duration::from_secs(10);

/// Following devices ended.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// Netlink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The map of devices.
    #[error("cannot use map DEVICES: {0}")]
    Map(#[from] MapError),
    /// The thread that serves them.
    #[error("the thread that attaches programs panicked")]
    Panicked,
}

/// The map `DEVICES`.
#[derive(Debug)]
pub struct DeviceMap(HashMap<MapData, u32, abi::Device>);

impl DeviceMap {
    /// Opens the pinned map.
    pub fn open(pins: &PinRoot) -> Result<Self, MapError> {
        let data = MapData::from_pin(pins.map("DEVICES"))?;
        Ok(Self(HashMap::try_from(Map::HashMap(data))?))
    }

    /// Every entry, in order of the ifindex.
    pub fn entries(&self) -> Result<BTreeMap<u32, abi::Device>, MapError> {
        self.0.iter().collect()
    }

    /// Entries that fit.
    fn capacity(&self) -> u64 {
        self.0.map().info().map_or(0, |info| info.max_entries().into())
    }

    fn set(&mut self, entry: &abi::Device) -> Result<(), MapError> {
        self.0.insert(entry.ifindex, entry, 0)
    }

    fn remove(&mut self, ifindex: u32) -> Result<(), MapError> {
        match self.0.remove(&ifindex) {
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// Devices in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// How many, by role and by state: `attached`, `described` (its entry is all it needs), `waiting` for an attempt that
    /// succeeds, or `left_alone`.
    pub devices: BTreeMap<(&'static str, &'static str), u64>,
    /// Foreign programs on the wrong side of ours.
    pub conflicts: u64,
    /// How full `DEVICES` is.
    pub map: MapUse,
}

impl Default for Census {
    fn default() -> Self {
        Self { devices: BTreeMap::new(), conflicts: 0, map: MapUse { map: "DEVICES", entries: 0, capacity: 0 } }
    }
}

/// Addresses of the node with the bits of `abi::NodeAddr`.
pub type NodeAddresses = BTreeMap<IpAddr, u32>;

/// Follows the devices of this network namespace.
pub struct Devices {
    changes: Changes,
    handle: Handle,
    inventory: Inventory,
    wishes: Wishes,
    goals: Arc<Goals>,
    fitter: Fitter,
    addresses: watch::Sender<Option<NodeAddresses>>,
    census: watch::Receiver<Census>,
}

impl Devices {
    /// Subscribes and reads everything.
    pub async fn start(
        attacher: Attacher,
        pins: &PinRoot,
        wishes: Wishes,
    ) -> Result<(Self, watch::Receiver<Option<NodeAddresses>>), DevicesError> {
        let changes = netlink::subscribe()?;
        let handle = netlink::questions()?;
        let (addresses, receiver) = watch::channel(None);
        let (told, census) = watch::channel(Census::default());
        let mut inventory = Inventory::default();
        inventory.replace(netlink::read_all(&handle).await?);
        let goals = Arc::new(Goals::new(Goal::of(&inventory, &wishes)));
        // A socket answers one at a time, and the thread asks beside this task.
        let questions = Questions { handle: netlink::questions()?, runtime: tokio::runtime::Handle::current() };
        let places = Places::new(questions);
        let (map, file) = (DeviceMap::open(pins)?, told::file(pins));
        let fitter = Fitter::new(attacher, map, file, Arc::clone(&goals), told, places);
        Ok((Self { changes, handle, inventory, wishes, goals, fitter, addresses, census }, receiver))
    }

    /// Devices that are to carry programs, with their roles.
    pub fn served(&self) -> Vec<String> {
        let goal = desired(&self.inventory, &self.wishes);
        let served = goal.devices.values().filter(|device| device.programs);
        served.map(|device| format!("{}={}", device.name, select::role_name(Some(device.role)))).collect()
    }

    /// The devices in numbers, whenever they change.
    pub fn census(&self) -> watch::Receiver<Census> {
        self.census.clone()
    }

    /// Follows changes until the subscription fails.
    pub async fn run(self) -> Result<(), DevicesError> {
        let Self { mut changes, handle, mut inventory, wishes, goals, fitter, addresses, .. } = self;
        let (first, mut fitted) = tokio::sync::oneshot::channel();
        let mut fitting = tokio::task::spawn_blocking(move || fitter.run(first));
        // The thread ends with this task.
        let goals = fitter::Hold(goals);
        let mut reread = interval_at(Instant::now() + REREAD, REREAD);
        reread.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let patience = tokio::time::sleep(FIRST_WAIT);
        tokio::pin!(patience);
        let mut waiting = true;
        let mut goal = Goal::of(&inventory, &wishes);
        let mut reply_rules = ReplyRules::default();
        loop {
            reply_rules.follow(&goal, async |wanted| rules::set(&handle, wanted).await).await;
            if !waiting {
                let next = goal.addresses();
                addresses.send_if_modified(|current| {
                    let changed = current.as_ref() != Some(next);
                    *current = Some(next.clone());
                    changed
                });
            }
            tokio::select! {
                notice = changes.next() => take(notice?, &handle, &mut inventory).await?,
                _ = reread.tick() => {
                    inventory.replace(netlink::read_all(&handle).await?);
                    reply_rules.doubt();
                }
                ended = &mut fitting => return ended.map_err(|_| DevicesError::Panicked)?,
                // Whoever would say so may have ended instead, which is heard above.
                _ = &mut fitted, if waiting => waiting = false,
                () = &mut patience, if waiting => {
                    tracing::warn!("devices are still being attached to; Services are followed meanwhile");
                    waiting = false;
                }
            }
            // A burst becomes one goal.
            while let Some(notice) = changes.try_next() {
                take(notice, &handle, &mut inventory).await?;
            }
            goal = Goal::of(&inventory, &wishes);
            goals.0.set(&goal);
        }
    }
}

/// The node's rules for replies.
#[derive(Default)]
struct ReplyRules {
    /// Those that it was tried to set last; none while the node may have others.
    tried: Option<BTreeSet<Rule>>,
    /// What has been said of failures, and of others' rules.
    failed: Vec<String>,
    rivals: Vec<Rule>,
}

impl ReplyRules {
    /// Somebody may have changed them, or what failed may succeed by now. Where there are none to be and none is left, that
    /// changes nothing.
    fn doubt(&mut self) {
        self.tried = self.tried.take().filter(|tried| tried.is_empty() && self.failed.is_empty());
    }

    /// Brings them into step. What cannot be set is told, and tried again with the next reading, or when others are wanted:
    /// not at each of netlink's messages, of which a busy node has many in a second.
    async fn follow(&mut self, goal: &Goal, set: impl AsyncFnOnce(&BTreeSet<Rule>) -> Result<Changed, RuleError>) {
        let wanted = goal.rules();
        if self.tried.as_ref() == Some(wanted) {
            return;
        }
        let (changed, failed) = match set(wanted).await {
            Ok(changed) => {
                let failed = changed.failed.iter().map(ToString::to_string).collect();
                (changed, failed)
            }
            Err(error) => (Changed { rivals: self.rivals.clone(), ..Changed::default() }, vec![error.to_string()]),
        };
        changed.changes.iter().for_each(|change| tracing::info!(change, "rules for replies"));
        for rule in changed.rivals.iter().filter(|rule| !self.rivals.contains(rule)) {
            tracing::warn!(%rule, "another rule reads the bits of --reply-mark; give it bits that nobody uses");
        }
        for error in failed.iter().filter(|error| !self.failed.contains(error)) {
            tracing::error!(error, "replies may leave by another uplink than their requests came in by");
        }
        self.tried = Some(wanted.clone());
        (self.rivals, self.failed) = (changed.rivals, failed);
    }
}

async fn take(notice: Notice, handle: &Handle, inventory: &mut Inventory) -> Result<(), DevicesError> {
    match notice {
        Notice::Event(event) => inventory.apply(event),
        Notice::Filters(index) => {
            let filters = netlink::read_filters(handle, index).await?;
            inventory.apply(Event::Filters { index, filters });
        }
        Notice::Lost => {
            tracing::warn!("netlink messages were lost; reading everything again");
            inventory.replace(netlink::read_all(handle).await?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::model::IpFamily;

    #[tokio::test]
    async fn rules_that_could_not_be_set_are_set_later_and_not_at_each_turn() {
        let (connection, deaf, _) = rtnetlink::new_connection().unwrap();
        drop(connection);
        let asked = Cell::new(0);
        let none = async |wanted: &BTreeSet<Rule>| {
            asked.set(asked.get() + 1);
            rules::set(&deaf, wanted).await
        };
        let one = async |_: &BTreeSet<Rule>| {
            asked.set(asked.get() + 1);
            let failed = rules::read(&deaf).await.err();
            Ok(Changed { failed: failed.into_iter().collect(), ..Changed::default() })
        };
        let (goal, mut rules) = (Goal::default(), ReplyRules::default());
        for turn in 0..3 {
            rules.follow(&goal, none).await;
            assert_eq!((asked.get(), rules.failed.len()), (1, 1), "turn {turn}");
        }
        for time in 2..4 {
            rules.doubt();
            for turn in 0..3 {
                rules.follow(&goal, one).await;
                assert_eq!((asked.get(), rules.failed.len()), (time, 1), "turn {turn}");
            }
        }
        let rule = Rule { family: IpFamily::V4, priority: 60, mark: 1, mask: 1, table: 0, not_default: false };
        let other = Goal::with_rules([rule]);
        for turn in 0..3 {
            rules.follow(&other, one).await;
            assert_eq!((asked.get(), rules.failed.len()), (4, 1), "turn {turn}: others are wanted");
        }
        let handle = netlink::questions().unwrap();
        rules.follow(&goal, async |wanted| rules::set(&handle, wanted).await).await;
        assert_eq!((&rules.tried, rules.failed.len()), (&Some(BTreeSet::new()), 0));
        // Without a rule of ours there is nothing to read again.
        rules.doubt();
        rules.follow(&goal, none).await;
        assert_eq!((asked.get(), rules.failed.len()), (4, 0));
    }
}
