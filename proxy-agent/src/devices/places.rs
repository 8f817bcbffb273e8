//! Ours in their places: looks for what others did to our programs on the devices, and puts them back where it can.
//!
//! The kernel tells neither that somebody has attached a program of tcx nor that somebody has detached one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rtnetlink::Handle;
use tokio::runtime;

use super::desired::Served;
use super::netlink;
use crate::dataplane::attach::standing::{By, Filters, Standing, misplaced};
use crate::dataplane::attach::{Attacher, Hook, Target};
use crate::dataplane::attempts::Attempts;
use crate::dataplane::sys;

/// Ours is put back into its place so often on a device: whoever insists as well is reported, and left there.
const MOST_MOVES: usize = 3;
/// So long a move counts.
const MOVES_COUNT: Duration = Duration::from_secs(3600);

/// What was found at the hooks.
pub(super) struct Places {
    /// Filters are read anew before ours is missed.
    questions: Questions,
    /// Foreign programs on the wrong side of ours.
    conflicts: BTreeMap<(u32, Hook), Vec<Standing>>,
    /// By ifindex, epoch and hook.
    moves: BTreeMap<(u32, u32, Hook), Moves>,
    /// To put ours back, where that failed: an attempt loads a program and attaches it. By ifindex, epoch and hook.
    failed: BTreeMap<(u32, u32, Hook), Attempts>,
    /// Devices with foreign programs on either side of ours.
    foreign: BTreeSet<u32>,
}

/// Which devices somebody else has changed.
#[derive(Default)]
pub(super) struct Changed {
    /// To be attached to again.
    pub(super) again: BTreeSet<u32>,
    /// Foreign programs have come to some, or gone.
    pub(super) foreign: bool,
}

/// A thread's way to ask by netlink.
pub(super) struct Questions {
    pub(super) handle: Handle,
    pub(super) runtime: runtime::Handle,
}

impl Questions {
    fn filters(&self, index: u32) -> Option<Filters> {
        self.runtime.block_on(netlink::read_filters(&self.handle, index)).ok()
    }
}

/// When ours was put back, into its place or to its hook.
#[derive(Debug, Default)]
struct Moves {
    at: Vec<Instant>,
    /// Somebody insists as well, and that has been told.
    told: bool,
}

impl Moves {
    /// Whether once more is not too often.
    fn allow(&mut self, now: Instant) -> bool {
        self.at.retain(|at| now.saturating_duration_since(*at) < MOVES_COUNT);
        self.at.len() < MOST_MOVES
    }
}

/// What there is to say of a hook.
struct Found {
    /// Foreign programs on the wrong side of ours.
    wrong: Vec<Standing>,
    /// Ours is to be attached again.
    again: bool,
    /// Somebody else's stands there.
    foreign: bool,
}

fn any_foreign(standing: &[Standing]) -> bool {
    standing.iter().any(|program| !program.own)
}

impl Places {
    pub(super) fn new(questions: Questions) -> Self {
        let (conflicts, moves, failed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { questions, conflicts, moves, failed, foreign: BTreeSet::new() }
    }

    /// An earlier agent found foreign programs on these.
    pub(super) fn remember(&mut self, foreign: BTreeSet<u32>) {
        self.foreign = foreign;
    }

    /// Whether foreign programs stand on a device, as far as was seen.
    pub(super) fn has_foreign(&self, index: u32) -> bool {
        self.foreign.contains(&index)
    }

    /// Foreign programs on the wrong side of ours, and hooks from which somebody detaches ours again and again.
    pub(super) fn conflicts(&self) -> u64 {
        let programs = self.conflicts.values().map(Vec::len).sum::<usize>();
        (programs + self.moves.values().filter(|moves| moves.told).count()) as u64
    }

    /// Forgets what was found on devices that are no longer attached to, or are others by now.
    pub(super) fn keep(&mut self, now: &BTreeMap<u32, Served>) {
        let is_same = |index: &u32, epoch: &u32| now.get(index).is_some_and(|device| device.epoch == *epoch);
        self.moves.retain(|(index, epoch, _), _| is_same(index, epoch));
        self.failed.retain(|(index, epoch, _), _| is_same(index, epoch));
        let attached = |index: &u32| now.get(index).is_some_and(|device| device.programs);
        self.conflicts.retain(|(index, _), _| attached(index));
        self.foreign.retain(|index| now.contains_key(index));
    }

    /// Looks at these devices; `unasked`: not because something has changed.
    pub(super) fn look<'a>(
        &mut self,
        attacher: &mut Attacher,
        devices: impl Iterator<Item = (&'a u32, &'a Served)>,
        unasked: bool,
    ) -> Changed {
        let mut changed = Changed::default();
        for (index, device) in devices {
            // What could not be looked at stays as it was seen last.
            let mut foreign = Some(false);
            for hook in Hook::ALL {
                let found = self.look_at(attacher, *index, device, hook, unasked);
                foreign = foreign.zip(found.as_ref()).map(|(foreign, found)| foreign || found.foreign);
                let Some(Found { wrong, again, .. }) = found else { continue };
                self.tell(*index, device, hook, wrong);
                if again {
                    changed.again.insert(*index);
                }
            }
            changed.foreign |= match foreign {
                Some(true) => self.foreign.insert(*index),
                Some(false) => self.foreign.remove(index),
                None => false,
            };
        }
        changed
    }

    /// Looks at a hook, and puts ours back where that helps. `None`: it cannot be looked at, as one of a device that goes
    /// away meanwhile.
    fn look_at(
        &mut self,
        attacher: &mut Attacher,
        index: u32,
        device: &Served,
        hook: Hook,
        unasked: bool,
    ) -> Option<Found> {
        let standing = attacher.standing(index, hook, &device.filters).ok()?;
        if !standing.iter().any(|program| program.own) {
            return self.miss(attacher, index, device, hook, unasked);
        }
        let (wrong, foreign) = (misplaced(&standing, hook).to_vec(), any_foreign(&standing));
        let by_tcx = |program: &Standing| matches!(program.by, By::Tcx { .. });
        let ours_by_tcx = standing.iter().any(|program| program.own && by_tcx(program));
        let (place, now) = ((index, device.epoch, hook), Instant::now());
        let moves = self.moves.entry(place).or_default();
        let due = self.failed.get(&place).is_none_or(|attempts| attempts.due(now));
        if !ours_by_tcx || !wrong.iter().any(by_tcx) || !moves.allow(now) || !due {
            return Some(Found { wrong, foreign, again: false });
        }
        let programs: Vec<_> = wrong.iter().map(ToString::to_string).collect();
        let Served { name, flat, foreign_egress, .. } = device;
        let target = Target { ifindex: index, name, flat: *flat, foreign_egress: *foreign_egress };
        if let Err(error) = attacher.put_in_place(target, hook) {
            if self.failed.entry(place).or_default().failed(now, &error.to_string()) && !error.device_is_gone() {
                tracing::warn!(%error, "foreign programs stay in the way; it is tried again, at least every five minutes");
            }
            return Some(Found { wrong, foreign, again: true });
        }
        moves.at.push(now);
        self.failed.remove(&place);
        tracing::info!(device = %name, hook = hook.name(), ?programs, "put back into its place beside these");
        let standing = attacher.standing(index, hook, &device.filters).ok()?;
        Some(Found { wrong: misplaced(&standing, hook).to_vec(), foreign: any_foreign(&standing), again: false })
    }

    /// Ours seems to have gone. What is known of filters may be older than ours.
    fn miss(&mut self, attacher: &Attacher, index: u32, device: &Served, hook: Hook, unasked: bool) -> Option<Found> {
        let filters = self.questions.filters(index)?;
        let standing = attacher.standing(index, hook, &filters).ok()?;
        let foreign = any_foreign(&standing);
        if standing.iter().any(|program| program.own) {
            return Some(Found { wrong: misplaced(&standing, hook).to_vec(), foreign, again: false });
        }
        // What went away took its programs with it.
        sys::device_name(index).filter(|name| *name == device.name)?;
        let found: Vec<_> = standing.iter().map(ToString::to_string).collect();
        let moves = self.moves.entry((index, device.epoch, hook)).or_default();
        if moves.allow(Instant::now()) {
            moves.at.push(Instant::now());
            moves.told = false;
            tracing::warn!(
                device = %device.name, hook = hook.name(), ?found,
                "Fairlead's program is gone: somebody has detached it; it is attached again"
            );
            return Some(Found { wrong: Vec::new(), foreign, again: true });
        }
        if !std::mem::replace(&mut moves.told, true) {
            tracing::warn!(
                device = %device.name, hook = hook.name(), ?found,
                "conflict: somebody detaches Fairlead's program again and again; it is attached every 5 s, which is not told \
                 any more"
            );
        }
        // Whoever is told by the kernel as well would keep both busy.
        Some(Found { wrong: Vec::new(), foreign, again: unasked })
    }

    /// Reports foreign programs, once.
    fn tell(&mut self, index: u32, device: &Served, hook: Hook, wrong: Vec<Standing>) {
        let known = self.conflicts.get(&(index, hook)).map_or(&[][..], Vec::as_slice);
        if known == wrong {
            return;
        }
        let programs: Vec<_> = wrong.iter().map(ToString::to_string).collect();
        match hook {
            _ if wrong.is_empty() => {
                tracing::info!(device = %device.name, hook = hook.name(), "no foreign program is in the way any more");
            }
            Hook::Ingress => tracing::warn!(
                device = %device.name, hook = hook.name(), ?programs,
                "conflict: foreign programs stand before Fairlead's; what they redirect or take never comes to it; \
                 `fairlead devices -o wide`, run by root on the node, names them"
            ),
            Hook::Egress => tracing::warn!(
                device = %device.name, hook = hook.name(), ?programs,
                "conflict: foreign programs stand behind Fairlead's; they see its packets on one side only; \
                 `fairlead devices -o wide`, run by root on the node, names them"
            ),
        }
        if wrong.is_empty() {
            self.conflicts.remove(&(index, hook));
        } else {
            self.conflicts.insert((index, hook), wrong);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_insists_is_left_there_for_an_hour() {
        let (mut moves, begin) = (Moves::default(), Instant::now());
        let at = |minutes: u64| begin + Duration::from_secs(60 * minutes);
        for minute in [0, 1, 30] {
            assert!(moves.allow(at(minute)), "minute {minute}");
            moves.at.push(at(minute));
        }
        assert!(!moves.allow(at(31)) && !moves.allow(at(59)));
        assert!(moves.allow(at(60)), "the first move counts no more");
        moves.at.push(at(60));
        assert!(!moves.allow(at(60)) && moves.allow(at(61)));
    }
}
