//! Attaches the stubs to devices: tcx links, or clsact filters where the kernel or another filter asks for it.
//!
//! Ours is the first program at ingress and the last at egress, so that all others see the same packets on both sides.
//! tcx runs before clsact on both: where a foreign clsact filter stands at egress, ours stands behind it in clsact.
//! Programs that are not ours are never touched.

pub mod links;
pub mod standing;

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};

use aya::programs::links::{FdLink, Link as _, LinkError};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};

use super::load::{EGRESS_STUB, INGRESS_STUB, LoadError, Programs};
use super::pin::{PinLock, PinRoot};
use super::sys::{self, Insn};
use crate::args::AttachMode;
use links::Links;
use standing::{Filters, Standing};

/// Where a program stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// tc ingress.
    Ingress,
    /// tc egress.
    Egress,
}

impl Hook {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As pins and people call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn stub(self) -> &'static str {
        match self {
            Self::Ingress => INGRESS_STUB,
            Self::Egress => EGRESS_STUB,
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    /// First at ingress. At egress last, also behind the filters whose priority the kernel chooses: it counts down
    /// from 49152.
    const fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => u16::MAX,
        }
    }
}

/// Marks our clsact filters: nobody else chooses this handle by accident.
const HANDLE: TcHandle = TcHandle::new(0xfa12, 0x1ead);

/// True if a clsact filter with this priority and handle is ours.
pub fn is_own_filter(priority: u16, handle: u32) -> bool {
    handle == u32::from(HANDLE) && Hook::ALL.iter().any(|hook| hook.priority() == priority)
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// A pinned tcx link.
    Tcx,
    /// A clsact filter.
    Clsact,
}

/// The means for a hook.
pub const fn means(mode: AttachMode, tcx: bool, hook: Hook, foreign_egress: bool) -> Means {
    match (mode, hook) {
        (AttachMode::Tcx, _) => Means::Tcx,
        (AttachMode::Clsact, _) => Means::Clsact,
        (AttachMode::Auto, Hook::Egress) if foreign_egress => Means::Clsact,
        (AttachMode::Auto, _) if tcx => Means::Tcx,
        (AttachMode::Auto, _) => Means::Clsact,
    }
}

/// Attaching or detaching failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} at {hook} of {device} (ifindex {ifindex}): {source}")]
pub struct AttachError {
    op: &'static str,
    hook: &'static str,
    device: String,
    ifindex: u32,
    source: Box<Cause>,
}

impl AttachError {
    fn new(op: &'static str, hook: Hook, device: &str, ifindex: u32, source: Cause) -> Self {
        Self { op, hook: hook.name(), device: device.to_owned(), ifindex, source: Box::new(source) }
    }

    /// True if the device went away meanwhile: its end will be heard of.
    pub fn device_is_gone(&self) -> bool {
        self.source.os_error().is_some_and(|code| code == libc::ENODEV || code == libc::ENXIO)
    }
}

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Tc(#[from] TcError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("cannot pin the link: {0}")]
    Pin(#[from] aya::pin::PinError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Cause {
    fn os_error(&self) -> Option<i32> {
        let mut error: &dyn std::error::Error = self;
        loop {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                return io.raw_os_error();
            }
            if let Some(TcError::NetlinkError(netlink)) = error.downcast_ref::<TcError>() {
                return netlink.raw_os_error();
            }
            if let Some(ProgramError::NetlinkError(netlink)) = error.downcast_ref::<ProgramError>() {
                return netlink.raw_os_error();
            }
            error = error.source()?;
        }
    }
}

/// A device to attach to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// ifindex.
    pub ifindex: u32,
    /// Name.
    pub name: &'a str,
    /// Packets begin with the IP header.
    pub flat: bool,
    /// A foreign clsact filter stands at egress.
    pub foreign_egress: bool,
}

/// Attaches the loaded stubs.
#[derive(Debug)]
pub struct Attacher {
    programs: Programs,
    links: Links,
    mode: AttachMode,
    tcx: bool,
    /// Nobody else changes the pins while this lives.
    _lock: PinLock,
}

impl Attacher {
    /// An attacher for this network namespace. `tcx` says whether the kernel has tcx links.
    pub fn new(programs: Programs, pins: &PinRoot, lock: PinLock, mode: AttachMode, tcx: bool) -> io::Result<Self> {
        Ok(Self { programs, links: Links::new(pins)?, mode, tcx, _lock: lock })
    }

    /// The pinned links.
    pub const fn links(&self) -> &Links {
        &self.links
    }

    /// Attaches both stubs, or leaves them where they are already. Where the means changed, the new attachment stands
    /// before the old one goes: a packet that meets both is translated by one and known to the other.
    pub fn attach(&mut self, target: Target<'_>) -> Result<(), AttachError> {
        for hook in Hook::ALL {
            let result = match means(self.mode, self.tcx, hook, target.foreign_egress) {
                Means::Tcx => self.attach_tcx(target, hook).and_then(|()| remove_filter(target.name, hook).map(drop)),
                Means::Clsact => self
                    .attach_filter(target, hook)
                    .and_then(|()| self.links.remove(target.ifindex, hook).map(drop).map_err(Cause::from)),
            };
            result.map_err(|source| AttachError::new("attach", hook, target.name, target.ifindex, source))?;
        }
        Ok(())
    }

    /// What stands at a hook of a device with these filters.
    pub fn standing(&self, ifindex: u32, hook: Hook, filters: &Filters) -> io::Result<Vec<Standing>> {
        self.links.standing(ifindex, hook, filters)
    }

    /// Puts ours back into its place among the programs of tcx. No program may stand at a hook twice, so a link with nothing
    /// of ours is put there first, which gets a copy of ours before the old link loses it: for some 10 µs a packet meets both.
    /// What fails until then leaves the old link as it is; after an error [`Self::attach`] makes good what is left.
    pub fn put_in_place(&mut self, target: Target<'_>, hook: Hook) -> Result<(), AttachError> {
        let Target { ifindex, name, flat, .. } = target;
        let pin = self.links.path(ifindex, hook);
        let cleared = links::Moved::clear(&pin).map_err(Cause::from);
        let move_it = |stub: &mut SchedClassifier| {
            let Some(old) = sys::open_pin(&pin)? else { return Ok(()) };
            let nothing = sys::load_classifier(&NEXT)?;
            let new = sys::attach_tcx(nothing.as_fd(), ifindex, hook == Hook::Egress)?;
            // A program of its own for each link, here too.
            let nothing = sys::load_classifier(&NEXT)?;
            let stub = stub.fd()?.as_fd();
            sys::update_link(new.as_fd(), stub)?;
            let moved = links::Moved::pin(&new, &pin)?;
            sys::update_link(old.as_fd(), nothing.as_fd())?;
            Ok(moved.finish()?)
        };
        let moved = cleared.and_then(|()| self.programs.with_another_stub(hook.stub(), flat, move_it));
        moved.map_err(|source: Cause| AttachError::new("move", hook, name, ifindex, source))
    }

    /// Detaches both stubs from a device that stays.
    pub fn detach(&mut self, ifindex: u32, name: &str) -> Result<(), AttachError> {
        for hook in Hook::ALL {
            let result = self.links.remove(ifindex, hook).map_err(Cause::from).and_then(|_| remove_filter(name, hook));
            result.map_err(|source| AttachError::new("detach", hook, name, ifindex, source))?;
        }
        Ok(())
    }

    /// Forgets a device that went away. Its links must go even if the device lives on in another network namespace.
    pub fn forget(&mut self, ifindex: u32) {
        for hook in Hook::ALL {
            if let Err(error) = self.links.remove(ifindex, hook) {
                tracing::warn!(ifindex, hook = hook.name(), %error, "cannot unpin the link of a vanished device");
            }
        }
    }

    fn attach_tcx(&mut self, target: Target<'_>, hook: Hook) -> Result<(), Cause> {
        let stub = self.programs.stub(hook.stub(), target.flat)?;
        let pin = self.links.path(target.ifindex, hook);
        if let Some(link) = sys::open_pin(&pin)? {
            match sys::tcx_link(link.as_fd())? {
                Some(found) if found.ifindex == target.ifindex => return keep_or_update(stub, link, found.program_id),
                // The device it was attached to is gone, and another one has its ifindex.
                _ => std::fs::remove_file(&pin)?,
            }
        }
        let order = match hook {
            Hook::Ingress => LinkOrder::first(),
            Hook::Egress => LinkOrder::last(),
        };
        let options = TcAttachOptions::TcxOrder(order);
        let id = stub.attach_with_options(target.name, hook.attach_type(), options)?;
        let link: FdLink = stub.take_link(id)?.try_into()?;
        link.pin(&pin)?;
        // The name may have moved to another device between the decision and the attachment.
        let found = sys::open_pin(&pin)?.map(|link| sys::tcx_link(link.as_fd())).transpose()?.flatten();
        if found.is_none_or(|found| found.ifindex != target.ifindex) {
            std::fs::remove_file(&pin)?;
            return Err(io::Error::from_raw_os_error(libc::ENODEV).into());
        }
        Ok(())
    }

    fn attach_filter(&mut self, target: Target<'_>, hook: Hook) -> Result<(), Cause> {
        match tc::qdisc_add_clsact(target.name) {
            Ok(()) => {}
            Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let stub = self.programs.stub(hook.stub(), target.flat)?;
        let options = || NlOptions { priority: hook.priority(), handle: HANDLE, classid: None };
        let attached = stub.attach_with_options(target.name, hook.attach_type(), TcAttachOptions::Netlink(options()));
        let id = match attached {
            Ok(id) => id,
            Err(error) if is_os_error(&error, libc::EEXIST) => stub.attach_to_link(filter(target.name, hook)?)?,
            Err(error) => return Err(error.into()),
        };
        // A filter outlives its handle here only if that is never dropped.
        mem::forget(stub.take_link(id)?);
        Ok(())
    }
}

/// `r0 = TCX_NEXT; exit`.
const NEXT: [Insn; 2] =
    [Insn { code: 0xb7, dst: 0, src: 0, off: 0, imm: -1 }, Insn { code: 0x95, dst: 0, src: 0, off: 0, imm: 0 }];

fn is_os_error(error: &ProgramError, code: i32) -> bool {
    match error {
        ProgramError::TcError(TcError::NetlinkError(e)) | ProgramError::NetlinkError(e) => {
            e.raw_os_error() == Some(code)
        }
        _ => false,
    }
}

/// A link with this stub is left as it is. That of an earlier agent is exchanged in one step of some 10 µs, for which the
/// kernel waits for no reader; whether the two are the same could be asked by CAP_SYS_ADMIN alone.
fn keep_or_update(stub: &SchedClassifier, link: OwnedFd, program_id: u32) -> Result<(), Cause> {
    if program_id != stub.info()?.id() {
        sys::update_link(link.as_fd(), stub.fd()?.as_fd())?;
    }
    Ok(())
}

fn filter(device: &str, hook: Hook) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(device, hook.attach_type(), hook.priority(), HANDLE, None)
}

/// Removes our clsact filter; true if there was one.
fn remove_filter(device: &str, hook: Hook) -> Result<bool, Cause> {
    let link = match filter(device, hook) {
        Ok(link) => link,
        // No such device.
        Err(_) => return Ok(false),
    };
    match link.detach() {
        Ok(()) => Ok(true),
        // No filter, no clsact, or no device.
        Err(e) if [libc::ENOENT, libc::EINVAL, libc::ENODEV].iter().any(|code| is_os_error(&e, *code)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes our clsact filters from a device; true if there were any.
pub fn remove_filters(device: &str) -> Result<bool, AttachError> {
    let mut any = false;
    for hook in Hook::ALL {
        any |= remove_filter(device, hook).map_err(|source| AttachError::new("detach", hook, device, 0, source))?;
    }
    Ok(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_follow_mode_kernel_and_foreign_filters() {
        use AttachMode::{Auto, Clsact as ClsactMode, Tcx as TcxMode};
        for (mode, tcx, hook, foreign, expected) in [
            (Auto, true, Hook::Ingress, true, Means::Tcx),
            (Auto, true, Hook::Egress, false, Means::Tcx),
            (Auto, true, Hook::Egress, true, Means::Clsact),
            (Auto, false, Hook::Ingress, false, Means::Clsact),
            (TcxMode, false, Hook::Egress, true, Means::Tcx),
            (ClsactMode, true, Hook::Ingress, false, Means::Clsact),
        ] {
            assert_eq!(means(mode, tcx, hook, foreign), expected, "{mode:?} {tcx} {hook:?} {foreign}");
        }
    }

    #[test]
    fn a_filter_is_ours_by_priority_and_handle_together() {
        assert!(is_own_filter(1, HANDLE.into()));
        assert!(is_own_filter(u16::MAX, HANDLE.into()));
        assert!(!is_own_filter(2, HANDLE.into()));
        assert!(!is_own_filter(1, 1));
    }
}
