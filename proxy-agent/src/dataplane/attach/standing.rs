//! What stands at a hook, in the order in which it runs: tcx before clsact, on both sides. Ours belongs first at ingress
//! and last at egress, so that everybody else sees the same packets on both.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use super::Hook;
use crate::dataplane::sys;

/// A clsact filter, as netlink tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The smallest runs first.
    pub priority: u16,
    /// Tells filters of a priority apart.
    pub handle: u32,
    /// The program's name, or the filter's kind.
    pub name: String,
    /// The program's id; 0 for a filter that is none.
    pub program: u32,
}

impl Filter {
    /// True if it is ours.
    pub fn is_own(&self) -> bool {
        super::is_own_filter(self.priority, self.handle)
    }
}

/// The clsact filters of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filters {
    /// At ingress.
    pub ingress: Vec<Filter>,
    /// At egress.
    pub egress: Vec<Filter>,
}

impl Filters {
    /// Those of a hook.
    pub fn at(&self, hook: Hook) -> &[Filter] {
        match hook {
            Hook::Ingress => &self.ingress,
            Hook::Egress => &self.egress,
        }
    }

    /// Those of a hook, to be changed.
    pub const fn at_mut(&mut self, hook: Hook) -> &mut Vec<Filter> {
        match hook {
            Hook::Ingress => &mut self.ingress,
            Hook::Egress => &mut self.egress,
        }
    }

    /// True if somebody else's stands at egress: ours must stand behind it.
    pub fn foreign_egress(&self) -> bool {
        self.egress.iter().any(|filter| !filter.is_own())
    }
}

/// A program at a hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Its name, or the kind of a filter that is no program. Who may not open programs by their id does not know that of
    /// one attached by tcx.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its id, as `bpftool prog` shows it; 0 if it is none.
    pub id: u32,
    /// Ours.
    pub own: bool,
    /// How it is attached.
    #[serde(flatten)]
    pub by: By,
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "lowercase")]
pub enum By {
    /// By tcx.
    Tcx {
        /// The link's id; 0 without a link.
        link: u32,
    },
    /// By a filter of clsact.
    Clsact {
        /// Its priority.
        priority: u16,
        /// Its handle.
        handle: u32,
    },
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = match self.name.as_deref() {
            Some("") => "unnamed (program ",
            Some(name) => &format!("{name} (program "),
            None => "program ",
        };
        let close = if self.name.is_some() { ")" } else { "" };
        write!(f, "{open}{}", self.id)?;
        match self.by {
            By::Tcx { link: 0 } => write!(f, ", tcx{close}"),
            By::Tcx { link } => write!(f, ", tcx link {link}{close}"),
            By::Clsact { priority, handle } => write!(f, ", clsact priority {priority} handle {handle:#x}{close}"),
        }
    }
}

/// Everything at a hook of a device. Of those of tcx, `own_program` is ours.
pub fn at(ifindex: u32, hook: Hook, own_program: Option<u32>, filters: &Filters) -> io::Result<Vec<Standing>> {
    let mut standing = Vec::new();
    for (id, link) in sys::tcx_programs(ifindex, hook == Hook::Egress)?.into_iter().flatten() {
        let own = own_program == Some(id);
        let name = if own { Some(hook.stub().to_owned()) } else { sys::program_name(id).ok() };
        standing.push(Standing { name, id, own, by: By::Tcx { link } });
    }
    standing.extend(filters.at(hook).iter().map(|filter| Standing {
        name: Some(filter.name.clone()),
        id: filter.program,
        own: filter.is_own(),
        by: By::Clsact { priority: filter.priority, handle: filter.handle },
    }));
    Ok(standing)
}

/// Those on the wrong side of ours: before it at ingress, where they may take packets away, or behind it at egress, where
/// they see what nobody else does. None where ours does not stand.
pub fn misplaced(standing: &[Standing], hook: Hook) -> &[Standing] {
    match hook {
        Hook::Ingress => &standing[..standing.iter().position(|p| p.own).unwrap_or(0)],
        Hook::Egress => &standing[standing.iter().rposition(|p| p.own).map_or(standing.len(), |at| at + 1)..],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(own: &str, names: &[&str]) -> Vec<Standing> {
        let standing = |name: &&str| Standing {
            name: Some((*name).to_owned()),
            id: 7,
            own: *name == own,
            by: By::Tcx { link: 0 },
        };
        names.iter().map(standing).collect()
    }

    #[test]
    fn programs_on_the_wrong_side_are_found() {
        let names = |list: &[Standing]| list.iter().filter_map(|p| p.name.clone()).collect::<Vec<_>>();
        let all = list("ours", &["other", "ours", "third"]);
        assert_eq!(names(misplaced(&all, Hook::Ingress)), ["other"]);
        assert_eq!(names(misplaced(&all, Hook::Egress)), ["third"]);
        for alone in [list("ours", &["ours"]), list("ours", &["other"]), Vec::new()] {
            assert!(misplaced(&alone, Hook::Ingress).is_empty() && misplaced(&alone, Hook::Egress).is_empty());
        }
    }

    #[test]
    fn a_program_is_told_by_name_id_and_place() {
        let [mut one] = <[_; 1]>::try_from(list("", &["policy"])).unwrap();
        assert_eq!(one.to_string(), "policy (program 7, tcx)");
        one.name = None;
        assert_eq!(one.to_string(), "program 7, tcx");
        one.name = Some("policy".to_owned());
        one.by = By::Clsact { priority: 77, handle: 1 };
        assert_eq!(one.to_string(), "policy (program 7, clsact priority 77 handle 0x1)");
        let json = serde_json::to_value(&one).unwrap();
        assert_eq!((json["by"].as_str(), json["priority"].as_u64()), (Some("clsact"), Some(77)));
    }
}
