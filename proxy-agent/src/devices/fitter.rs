//! Brings devices into step with a goal: entries of `DEVICES`, links and filters, one system call after another.
//!
//! The kernel attaches one program after the other and waits for its readers each time, so for many devices that takes
//! seconds. All of it happens on one thread that nothing else waits for. The goal may move meanwhile: what is left of
//! the old one is not done then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aya::maps::MapError;
use proxy_common::abi;
use tokio::sync::{oneshot, watch};

use super::desired::{Desired, Served, Step, Wishes, desired, steps};
use super::inventory::Inventory;
use super::places::Places;
use super::replies::Rule;
use super::told::{self, Told};
use super::{Census, DeviceMap, DevicesError, NodeAddresses, select};
use crate::dataplane::attach::{AttachError, Attacher, Target};
use crate::run_file::RunFile;

/// What could not be attached is tried again this often.
const RETRY: Duration = Duration::from_secs(1);
/// The kernel does not tell what others do at the hooks: it is looked for this often.
const LOOK: Duration = Duration::from_secs(5);

/// What should be, and which devices there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Goal {
    desired: Desired,
    /// Epoch and name by ifindex.
    present: BTreeMap<u32, (u32, String)>,
}

impl Goal {
    pub(super) fn of(inventory: &Inventory, wishes: &Wishes) -> Self {
        let present = inventory.devices().map(|d| (d.link.index, (d.epoch, d.link.name.clone()))).collect();
        Self { desired: desired(inventory, wishes), present }
    }

    /// The node's rules for replies.
    pub(super) const fn rules(&self) -> &BTreeSet<Rule> {
        &self.desired.rules
    }

    #[cfg(test)]
    pub(super) fn with_rules(rules: impl IntoIterator<Item = Rule>) -> Self {
        let desired = Desired { rules: rules.into_iter().collect(), ..Desired::default() };
        Self { desired, ..Self::default() }
    }

    /// The node's addresses.
    pub(super) fn addresses(&self) -> &NodeAddresses {
        &self.desired.addresses
    }
}

/// The newest goal.
pub(super) struct Goals {
    newest: Mutex<Newest>,
    moved: Condvar,
}

struct Newest {
    goal: Goal,
    number: u64,
    over: bool,
}

impl Goals {
    pub(super) fn new(goal: Goal) -> Self {
        Self { newest: Mutex::new(Newest { goal, number: 1, over: false }), moved: Condvar::new() }
    }

    /// Moves it, if it has.
    pub(super) fn set(&self, goal: &Goal) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.goal != *goal {
            newest.goal.clone_from(goal);
            newest.number += 1;
            self.moved.notify_all();
        }
    }

    fn number(&self) -> u64 {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).number
    }

    /// The goal once it is another than `known`, or after a pause where one is given; none once it is over.
    fn wait(&self, known: u64, pause: Option<Duration>) -> Option<(Goal, u64)> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let still = |newest: &mut Newest| !newest.over && newest.number == known;
        let newest = match pause {
            Some(pause) => {
                self.moved.wait_timeout_while(newest, pause, still).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.moved.wait_while(newest, still).unwrap_or_else(PoisonError::into_inner),
        };
        (!newest.over).then(|| (newest.goal.clone(), newest.number))
    }
}

/// Ends the thread when it is dropped.
pub(super) struct Hold(pub(super) Arc<Goals>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.newest.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.0.moved.notify_all();
    }
}

/// The thread's belongings.
pub(super) struct Fitter {
    attacher: Attacher,
    map: DeviceMap,
    goals: Arc<Goals>,
    /// What is.
    now: Desired,
    census: watch::Sender<Census>,
    places: Places,
    /// When all devices were looked at.
    looked: Option<Instant>,
    /// What was wanted of each when it was last looked at.
    seen: BTreeMap<u32, Served>,
    /// Attached to since then.
    touched: BTreeSet<u32>,
    /// Attached to again because of what was found there.
    again: BTreeSet<u32>,
    /// What was said of a device that cannot be served, or not any more.
    complaints: BTreeMap<u32, String>,
    file: RunFile<Vec<Told>>,
    /// What it says, or why it could not be written.
    told: Option<Result<Vec<Told>, String>>,
}

impl Fitter {
    pub(super) fn new(
        attacher: Attacher,
        map: DeviceMap,
        file: RunFile<Vec<Told>>,
        goals: Arc<Goals>,
        census: watch::Sender<Census>,
        places: Places,
    ) -> Self {
        let (now, seen) = (Desired::default(), BTreeMap::new());
        let (touched, again, complaints) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        let (looked, told) = (None, None);
        Self { attacher, map, goals, now, census, places, looked, seen, touched, again, complaints, file, told }
    }

    /// Follows the goals until they are over. Says when all of a goal has been tried for the first time.
    pub(super) fn run(mut self, first: oneshot::Sender<()>) -> Result<(), DevicesError> {
        let (mut first, mut known) = (Some(first), 0);
        let mut pause = None;
        while let Some((mut goal, number)) = self.goals.wait(known, pause) {
            if known == 0 {
                self.drop_leftovers(&goal)?;
            }
            known = number;
            self.mark_foreign(&mut goal);
            let whole = self.bring_into_step(&goal, number);
            self.tell(&goal);
            self.look(&mut goal, number);
            if let Some(first) = first.take_if(|_| whole) {
                // The task that waits for it may have lost patience.
                first.send(()).unwrap_or_default();
            }
            pause = Some(self.pause(&goal));
        }
        Ok(())
    }

    /// Removes what an earlier agent left on devices that went away, or that are not to be served any more.
    fn drop_leftovers(&mut self, goal: &Goal) -> Result<(), DevicesError> {
        let next = &goal.desired;
        let entries = self.map.entries()?;
        let foreign = entries.iter().filter(|(_, entry)| entry.flags & abi::Device::FOREIGN != 0);
        self.places.remember(foreign.map(|(ifindex, _)| *ifindex).collect());
        for ifindex in entries.into_keys().filter(|ifindex| !next.devices.contains_key(ifindex)) {
            if let Some((_, name)) = goal.present.get(&ifindex) {
                self.attacher.detach(ifindex, name).unwrap_or_else(|error| report(&error));
            }
            self.map.remove(ifindex)?;
        }
        if let Err(error) = self.attacher.links().finish_moves() {
            tracing::warn!(%error, "a link that was to take another one's place stays beside it");
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

    /// False if the goal moved before all of it was tried.
    fn bring_into_step(&mut self, goal: &Goal, number: u64) -> bool {
        let next = &goal.desired;
        let mut whole = true;
        for step in steps(&self.now, next) {
            whole = self.goals.number() == number;
            if !whole {
                break;
            }
            self.carry_out(step, goal);
            self.count(next);
        }
        for (index, (name, reason)) in &next.skipped {
            if self.now.skipped.get(index).is_none_or(|(_, known)| known != reason) {
                tracing::info!(device = %name, ifindex = index, %reason, "device left alone");
            }
        }
        self.now.skipped.clone_from(&next.skipped);
        self.count(next);
        whole
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
        census.conflicts = self.places.conflicts();
        census.map.entries = self.now.devices.len() as u64;
        census.map.capacity = self.map.capacity();
        self.census.send_if_modified(|known| {
            let changed = *known != census;
            *known = census;
            changed
        });
    }

    /// Carries a step out, and notes it as done only if it was.
    fn carry_out(&mut self, step: Step, goal: &Goal) {
        let next = &goal.desired;
        match step {
            Step::Forget(index) => {
                let epoch = self.now.devices.get(&index).map(|old| old.epoch);
                match goal.present.get(&index) {
                    // Still there, but no longer to be served: filters do not go by themselves.
                    Some((present, name)) if Some(*present) == epoch => {
                        self.attacher.detach(index, name).unwrap_or_else(|error| report(&error));
                    }
                    _ => self.attacher.forget(index),
                }
                if let Err(error) = self.map.remove(index) {
                    tracing::warn!(ifindex = index, %error, "cannot remove a device's entry");
                }
                self.complaints.remove(&index);
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
                        self.complaints.remove(&index);
                        if let Some(now) = self.now.devices.get_mut(&index) {
                            now.programs = false;
                        }
                    }
                    Err(error) => self.complain(index, &error),
                }
            }
        }
    }

    /// Reports why a device is not as it should be, where that is news: it is tried again each second.
    fn complain(&mut self, index: u32, error: &AttachError) {
        let why = error.to_string();
        if self.complaints.get(&index) != Some(&why) {
            report(error);
            self.complaints.insert(index, why);
        }
    }

    fn describe(&mut self, index: u32, next: &Served) {
        match self.map.set(&next.entry) {
            Ok(()) => {
                let now = self.now.devices.entry(index).or_insert_with(|| Served { programs: false, ..next.clone() });
                now.entry = next.entry;
                now.role = next.role;
                now.why.clone_from(&next.why);
            }
            Err(error) => {
                let why = error.to_string();
                let known = self.complaints.insert(index, why.clone());
                match () {
                    () if known.as_ref() == Some(&why) => {}
                    () if is_full(&error) => {
                        tracing::error!(
                            device = %next.name, "DEVICES is full; give --max-devices a larger number and restart"
                        );
                    }
                    () => tracing::error!(device = %next.name, %error, "cannot describe a device"),
                }
            }
        }
    }

    fn attach(&mut self, index: u32, next: &Served) {
        // Its entry did not fit: without one the programs could not serve it.
        let Some(now) = self.now.devices.get_mut(&index) else { return };
        let Served { name, flat, foreign_egress, .. } = next;
        let target = Target { ifindex: index, name, flat: *flat, foreign_egress: *foreign_egress };
        let began = Instant::now();
        if let Err(error) = self.attacher.attach(target) {
            self.complain(index, &error);
            return;
        }
        self.complaints.remove(&index);
        now.programs = true;
        now.foreign_egress = next.foreign_egress;
        now.flat = next.flat;
        now.name.clone_from(&next.name);
        let role = select::role_name(Some(next.role));
        let took_us = began.elapsed().as_micros() as u64;
        self.touched.insert(index);
        if self.again.remove(&index) {
            tracing::debug!(device = %next.name, ifindex = index, took_us, "attached again");
            return;
        }
        tracing::info!(device = %next.name, ifindex = index, role, why = %next.why, took_us, "device served");
        if next.foreign_egress {
            tracing::warn!(
                device = %next.name,
                "a foreign clsact filter stands at egress, Fairlead's behind it: if that filter ends with TC_ACT_OK instead \
                 of TC_ACT_UNSPEC, replies are not translated here; --attach=tcx puts Fairlead in front"
            );
        }
    }

    /// Says why each device is served as it is. What could not be written is tried again at the next turn.
    fn tell(&mut self, goal: &Goal) {
        let told = told::of(&goal.desired);
        if matches!(&self.told, Some(Ok(said)) if *said == told) {
            return;
        }
        let written = self.file.write(&told).map_err(|error| error.to_string());
        match (&written, &self.told) {
            (Err(error), Some(Err(known))) if error == known => {}
            (Err(error), _) => tracing::warn!(
                file = %self.file.path().display(), error, "why devices are served cannot be shown by `fairlead devices`"
            ),
            (Ok(()), _) => {}
        }
        self.told = Some(written.map(|()| told));
    }

    /// What was found at the hooks belongs to what the programs are to know.
    fn mark_foreign(&self, goal: &mut Goal) {
        for (index, device) in &mut goal.desired.devices {
            let foreign = if self.places.has_foreign(*index) { abi::Device::FOREIGN } else { 0 };
            device.entry.flags = device.entry.flags & !abi::Device::FOREIGN | foreign;
        }
    }

    /// Looks whether ours stand in their places: at all of them now and then, else at those that have changed.
    fn look(&mut self, goal: &mut Goal, number: u64) {
        let all = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK);
        if all {
            self.looked = Some(Instant::now());
        }
        let devices = &goal.desired.devices;
        self.places.keep(&self.now.devices);
        let seen = (!all).then_some(&self.seen);
        let wanted = worth_a_look(devices, &self.now.devices, seen, &self.touched);
        let changed = self.places.look(&mut self.attacher, wanted, all);
        for index in &changed.again {
            self.now.devices.entry(*index).and_modify(|now| now.programs = false);
        }
        self.again = changed.again;
        self.mark_foreign(goal);
        self.seen.clone_from(&goal.desired.devices);
        self.touched.clear();
        if changed.foreign || !self.again.is_empty() {
            self.bring_into_step(goal, number);
        }
        self.count(&goal.desired);
    }

    /// How long to wait for another goal.
    fn pause(&self, goal: &Goal) -> Duration {
        let complete = steps(&self.now, &goal.desired).is_empty();
        let until_look = self.looked.map_or(LOOK, |looked| LOOK.saturating_sub(looked.elapsed()));
        if complete { until_look } else { until_look.min(RETRY) }
    }
}

/// Of the devices that carry programs now, those of which something else is wanted than was `seen`, and those that were
/// `touched`: what is asked of the kernel grows with a change, not with the node. All, where what was seen is too old.
fn worth_a_look<'a>(
    devices: &'a BTreeMap<u32, Served>,
    now: &BTreeMap<u32, Served>,
    seen: Option<&BTreeMap<u32, Served>>,
    touched: &BTreeSet<u32>,
) -> impl Iterator<Item = (&'a u32, &'a Served)> {
    devices.iter().filter(move |(index, device)| {
        let attached = now.get(*index).is_some_and(|now| now.programs);
        attached && (touched.contains(*index) || seen.is_none_or(|seen| seen.get(*index) != Some(*device)))
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodePortAddresses;
    use crate::dataplane::attach::standing::{Filter, Filters};
    use crate::devices::inventory::tests::{inventory, link};
    use crate::devices::inventory::{Event, Kind};
    use crate::devices::select::Selection;

    #[test]
    fn after_a_change_only_what_changed_is_looked_at() {
        let (selection, nodeport_addresses) = (Selection::default(), NodePortAddresses::Primary);
        let wishes = Wishes { selection, nodeport_addresses, pods: None, replies: None };
        let mut inv = inventory((2..60).map(|index| Event::Link(link(index, &format!("veth{index}"), Kind::Veth))));
        let seen = desired(&inv, &wishes).devices;
        let mut now = seen.clone();
        now.entry(9).and_modify(|device| device.programs = false);
        let filter = Filter { priority: 77, handle: 1, name: "policy".to_owned(), program: 7 };
        for index in [5, 9] {
            let filters = Filters { ingress: vec![filter.clone()], ..Filters::default() };
            inv.apply(Event::Filters { index, filters });
        }
        let next = desired(&inv, &wishes).devices;
        let of = |seen, touched: &[u32]| -> Vec<u32> {
            worth_a_look(&next, &now, seen, &touched.iter().copied().collect()).map(|(index, _)| *index).collect()
        };
        assert_eq!(of(Some(&next), &[]), [0; 0]);
        assert_eq!(of(Some(&seen), &[]), [5], "nothing of ours is on 9");
        assert_eq!(of(Some(&seen), &[7]), [5, 7]);
        assert_eq!(of(None, &[]).len(), 57, "all but 9");
    }
}
