//! Devices: followed by netlink, given a role, described in `DEVICES`, and attached to.
//!
//! `inventory` ← `netlink` events → `desired` → `steps` → hooks and map. Everything between the two ends is pure.

pub mod desired;
pub mod inventory;
pub mod netlink;
pub mod role;
pub mod select;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use aya::maps::{HashMap, IterableMap as _, Map, MapData, MapError};
use proxy_common::abi;
use rtnetlink::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::dataplane::MapUse;
use crate::dataplane::attach::{self, AttachError, Attacher, Hook, Target};
use crate::dataplane::pin::PinRoot;
use desired::{Desired, Served, Step, Wishes, desired, steps};
use inventory::{Event, Inventory};
use netlink::{Changes, NetlinkError, Notice};

/// Everything is read again this often, because the kernel does not tell of every route that goes.
const REREAD: Duration = Duration::from_secs(60);
/// What could not be attached is tried again this often.
const RETRY: Duration = Duration::from_secs(1);

/// Following devices ended.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// Netlink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The map of devices.
    #[error("cannot use map DEVICES: {0}")]
    Map(#[from] MapError),
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
    /// How full `DEVICES` is.
    pub map: MapUse,
}

impl Default for Census {
    fn default() -> Self {
        Self { devices: BTreeMap::new(), map: MapUse { map: "DEVICES", entries: 0, capacity: 0 } }
    }
}

/// Addresses of the node with the bits of `abi::NodeAddr`.
pub type NodeAddresses = BTreeMap<IpAddr, u32>;

/// Follows the devices of this network namespace.
pub struct Devices {
    changes: Changes,
    handle: Handle,
    inventory: Inventory,
    attacher: Attacher,
    map: DeviceMap,
    wishes: Wishes,
    now: Desired,
    addresses: watch::Sender<NodeAddresses>,
    census: watch::Sender<Census>,
}

impl Devices {
    /// Subscribes, reads everything, and brings devices into step for the first time.
    pub async fn start(
        attacher: Attacher,
        pins: &PinRoot,
        wishes: Wishes,
    ) -> Result<(Self, watch::Receiver<NodeAddresses>), DevicesError> {
        let changes = netlink::subscribe()?;
        let handle = netlink::questions()?;
        let (addresses, receiver) = watch::channel(NodeAddresses::new());
        let mut devices = Self {
            changes,
            handle,
            inventory: Inventory::default(),
            attacher,
            map: DeviceMap::open(pins)?,
            wishes,
            now: Desired::default(),
            addresses,
            census: watch::Sender::default(),
        };
        devices.read_all().await?;
        devices.drop_leftovers()?;
        devices.bring_into_step();
        Ok((devices, receiver))
    }

    /// Devices that carry programs, with their roles.
    pub fn served(&self) -> Vec<String> {
        let served = self.now.devices.values().filter(|device| device.programs);
        served.map(|device| format!("{}={}", device.name, select::role_name(Some(device.role)))).collect()
    }

    /// The devices in numbers, whenever they change.
    pub fn census(&self) -> watch::Receiver<Census> {
        self.census.subscribe()
    }

    /// Follows changes until the subscription fails.
    pub async fn run(mut self) -> Result<(), DevicesError> {
        let mut reread = interval_at(Instant::now() + REREAD, REREAD);
        reread.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                notice = self.changes.next() => self.take(notice?).await?,
                _ = reread.tick() => self.read_all().await?,
                () = tokio::time::sleep(RETRY), if !self.complete() => {}
            }
            // A burst becomes one step.
            while let Some(notice) = self.changes.try_next() {
                self.take(notice).await?;
            }
            self.bring_into_step();
        }
    }

    async fn take(&mut self, notice: Notice) -> Result<(), DevicesError> {
        match notice {
            Notice::Event(event) => {
                // A device that is made anew under a known ifindex must be seen to go in between.
                let gone = matches!(event, Event::LinkGone(_));
                self.inventory.apply(event);
                if gone {
                    self.bring_into_step();
                }
            }
            Notice::Filters(index) => {
                let event = netlink::read_filters(&self.handle, index).await?;
                self.inventory.apply(event);
            }
            Notice::Lost => {
                tracing::warn!("netlink messages were lost; reading everything again");
                self.read_all().await?;
            }
        }
        Ok(())
    }

    async fn read_all(&mut self) -> Result<(), DevicesError> {
        self.inventory.replace(netlink::read_all(&self.handle).await?);
        Ok(())
    }

    /// Removes what an earlier agent left on devices that went away, or that are not to be served any more.
    fn drop_leftovers(&mut self) -> Result<(), DevicesError> {
        let next = desired(&self.inventory, &self.wishes);
        for ifindex in self.map.entries()?.into_keys().filter(|ifindex| !next.devices.contains_key(ifindex)) {
            if let Some(device) = self.inventory.device(ifindex) {
                self.attacher.detach(ifindex, &device.link.name).unwrap_or_else(|error| report(&error));
            }
            self.map.remove(ifindex)?;
        }
        match self.attacher.links().own() {
            Ok(links) => {
                let served = |ifindex| next.devices.get(ifindex).is_some_and(|device| device.programs);
                for link in links.iter().filter(|link| !served(&link.ifindex)) {
                    self.attacher.forget(link.ifindex);
                }
            }
            Err(error) => tracing::warn!(%error, "cannot list the pinned links"),
        }
        Ok(())
    }

    /// True if every device carries what it should.
    fn complete(&self) -> bool {
        steps(&self.now, &desired(&self.inventory, &self.wishes)).is_empty()
    }

    fn bring_into_step(&mut self) {
        let next = desired(&self.inventory, &self.wishes);
        for step in steps(&self.now, &next) {
            self.carry_out(step, &next);
        }
        for (index, (name, reason)) in &next.skipped {
            if self.now.skipped.get(index).is_none_or(|(_, known)| known != reason) {
                tracing::info!(device = %name, ifindex = index, reason, "device left alone");
            }
        }
        self.count(&next);
        self.now.skipped = next.skipped;
        self.addresses.send_if_modified(|current| {
            let changed = *current != next.addresses;
            if changed {
                current.clone_from(&next.addresses);
            }
            changed
        });
        self.now.addresses = next.addresses;
    }

    fn count(&self, next: &Desired) {
        let mut census = Census::default();
        for (index, wanted) in &next.devices {
            let state = match self.now.devices.get(index) {
                Some(now) if now.programs == wanted.programs => {
                    if now.programs {
                        "attached"
                    } else {
                        "described"
                    }
                }
                _ => "waiting",
            };
            *census.devices.entry((select::role_name(Some(wanted.role)), state)).or_default() += 1;
        }
        if !next.skipped.is_empty() {
            census.devices.insert((select::role_name(None), "left_alone"), next.skipped.len() as u64);
        }
        census.map.entries = self.now.devices.len() as u64;
        census.map.capacity = self.map.capacity();
        self.census.send_if_modified(|known| {
            let changed = *known != census;
            *known = census;
            changed
        });
    }

    /// Carries a step out, and notes it as done only if it was.
    fn carry_out(&mut self, step: Step, next: &Desired) {
        match step {
            Step::Forget(index) => {
                let epoch = self.now.devices.get(&index).map(|old| old.epoch);
                match self.inventory.device(index) {
                    // Still there, but no longer to be served: filters do not go by themselves.
                    Some(device) if Some(device.epoch) == epoch => {
                        self.attacher.detach(index, &device.link.name).unwrap_or_else(|error| report(&error));
                    }
                    _ => self.attacher.forget(index),
                }
                if let Err(error) = self.map.remove(index) {
                    tracing::warn!(ifindex = index, %error, "cannot remove a device's entry");
                }
                if let Some(old) = self.now.devices.remove(&index) {
                    tracing::info!(device = %old.name, ifindex = index, "device forgotten");
                }
            }
            Step::Describe(index) => self.describe(index, &next.devices[&index]),
            Step::Attach(index) => self.attach(index, &next.devices[&index]),
            Step::Detach(index) => {
                let name = next.devices[&index].name.clone();
                match self.attacher.detach(index, &name) {
                    Ok(()) => {
                        tracing::info!(device = %name, ifindex = index, "programs detached");
                        if let Some(now) = self.now.devices.get_mut(&index) {
                            now.programs = false;
                        }
                    }
                    Err(error) => report(&error),
                }
            }
        }
    }

    fn describe(&mut self, index: u32, next: &Served) {
        match self.map.set(&next.entry) {
            Ok(()) => {
                let now = self.now.devices.entry(index).or_insert_with(|| Served { programs: false, ..next.clone() });
                now.entry = next.entry;
                now.role = next.role;
            }
            Err(error) if is_full(&error) => {
                tracing::error!(device = %next.name, "DEVICES is full; give --max-devices a larger number and restart");
            }
            Err(error) => tracing::error!(device = %next.name, %error, "cannot describe a device"),
        }
    }

    fn attach(&mut self, index: u32, next: &Served) {
        // Its entry did not fit: without one the programs could not serve it.
        let Some(now) = self.now.devices.get_mut(&index) else { return };
        let target = Target { ifindex: index, name: &next.name, foreign_egress: next.foreign_egress };
        let began = std::time::Instant::now();
        if let Err(error) = self.attacher.attach(target) {
            report(&error);
            return;
        }
        now.programs = true;
        now.foreign_egress = next.foreign_egress;
        now.name.clone_from(&next.name);
        let role = select::role_name(Some(next.role));
        let took_us = began.elapsed().as_micros() as u64;
        tracing::info!(device = %next.name, ifindex = index, role, took_us, "device served");
        if next.foreign_egress {
            tracing::warn!(
                device = %next.name,
                "a foreign clsact filter stands at egress, Fairlead's behind it: if that filter ends with TC_ACT_OK instead \
                 of TC_ACT_UNSPEC, replies are not translated here; --attach=tcx puts Fairlead in front"
            );
        }
        for hook in Hook::ALL {
            let programs = attach::tcx_programs(&next.name, hook);
            let strangers = attach::out_of_place(&programs, hook);
            if !strangers.is_empty() {
                tracing::warn!(
                    device = %next.name, hook = hook.name(), programs = ?strangers,
                    "a foreign program stands between Fairlead and the wire; it sees translated packets on one side only"
                );
            }
        }
    }
}

fn report(error: &AttachError) {
    if error.device_is_gone() {
        tracing::debug!(%error, "a device went away meanwhile");
    } else {
        tracing::error!(%error, "a device is not served; it is tried again");
    }
}

fn is_full(error: &MapError) -> bool {
    match error {
        MapError::SyscallError(e) => matches!(e.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)),
        _ => false,
    }
}
