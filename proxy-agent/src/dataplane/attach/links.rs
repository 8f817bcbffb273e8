//! The pins of tcx links. A link lives as long as its pin or a descriptor does, and while it lives it is attached.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::Hook;
use super::standing::{self, Filters, Standing};
use crate::dataplane::pin::{self, PinRoot};
use crate::dataplane::sys::{self, TcxLink};

/// Ends the name of a link that is about to take another one's place. A BPF file system takes no dots in names.
const MOVED: &str = "-moved";

/// The pinned tcx links: `<network namespace>-<ifindex>-<hook>`.
#[derive(Debug)]
pub struct Links {
    dir: PathBuf,
    netns: u64,
}

/// A pinned link, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinnedLink {
    /// Inode of the network namespace.
    pub netns: u64,
    /// ifindex there.
    pub ifindex: u32,
    /// Hook.
    pub hook: Hook,
}

impl PinnedLink {
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.splitn(3, '-');
        let netns = parts.next()?.parse().ok()?;
        let ifindex = parts.next()?.parse().ok()?;
        let hook = parts.next()?;
        let hook = Hook::ALL.into_iter().find(|h| h.name() == hook)?;
        Some(Self { netns, ifindex, hook })
    }
}

impl Links {
    /// The links of this process' network namespace.
    pub fn new(pins: &PinRoot) -> io::Result<Self> {
        Ok(Self { dir: pins.links(), netns: sys::netns_inode()? })
    }

    pub(super) fn path(&self, ifindex: u32, hook: Hook) -> PathBuf {
        self.dir.join(format!("{}-{ifindex}-{}", self.netns, hook.name()))
    }

    /// Every pinned link of this network namespace.
    pub fn own(&self) -> io::Result<Vec<PinnedLink>> {
        let names = pin::names(&self.dir)?;
        Ok(names.iter().filter_map(|name| PinnedLink::parse(name)).filter(|link| link.netns == self.netns).collect())
    }

    /// Finishes what an agent that died in between has begun: a link that was to take another one's place serves already.
    pub fn finish_moves(&self) -> io::Result<()> {
        for name in pin::names(&self.dir)? {
            let Some(place) = name.strip_suffix(MOVED) else { continue };
            if PinnedLink::parse(place).is_some_and(|link| link.netns == self.netns) {
                std::fs::rename(self.dir.join(&name), self.dir.join(place))?;
            }
        }
        Ok(())
    }

    /// What a link is attached to; `None` if it is not pinned.
    pub fn look(&self, ifindex: u32, hook: Hook) -> io::Result<Option<TcxLink>> {
        let link = sys::open_pin(&self.path(ifindex, hook))?;
        Ok(link.map(|link| sys::tcx_link(link.as_fd())).transpose()?.flatten())
    }

    /// What stands at a hook of a device with these filters. Whichever program the pinned link holds there is ours.
    pub fn standing(&self, ifindex: u32, hook: Hook, filters: &Filters) -> io::Result<Vec<Standing>> {
        let own = self.look(ifindex, hook)?.filter(|link| link.ifindex == ifindex);
        standing::at(ifindex, hook, own.map(|link| link.program_id), filters)
    }

    /// Unpins a link, which detaches it; true if there was one.
    pub(super) fn remove(&self, ifindex: u32, hook: Hook) -> io::Result<bool> {
        match std::fs::remove_file(self.path(ifindex, hook)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A link that is pinned beside the one whose place it is to take.
pub(super) struct Moved<'a> {
    beside: PathBuf,
    place: &'a Path,
    finished: bool,
}

fn beside(place: &Path) -> PathBuf {
    let mut beside = place.as_os_str().to_owned();
    beside.push(MOVED);
    PathBuf::from(beside)
}

impl<'a> Moved<'a> {
    /// Unpins what was left where a link is to be pinned that takes the place of another one.
    pub(super) fn clear(place: &Path) -> io::Result<()> {
        match std::fs::remove_file(beside(place)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) fn pin(link: &OwnedFd, place: &'a Path) -> io::Result<Self> {
        let beside = beside(place);
        sys::pin(link, &beside)?;
        Ok(Self { beside, place, finished: false })
    }

    /// In one step, in which the old link is unpinned.
    pub(super) fn finish(mut self) -> io::Result<()> {
        std::fs::rename(&self.beside, self.place)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // What stays is finished by the next agent.
            _ = std::fs::remove_file(&self.beside);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pins_name_says_namespace_device_and_hook() {
        let link = PinnedLink { netns: 4_026_531_840, ifindex: 7, hook: Hook::Egress };
        assert_eq!(PinnedLink::parse("4026531840-7-egress"), Some(link));
        for bad in ["4026531840-7", "x-7-egress", "1-2-sideways", "1-2-ingress-moved", ""] {
            assert_eq!(PinnedLink::parse(bad), None, "{bad}");
        }
    }
}
