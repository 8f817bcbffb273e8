//! `fairlead devices`: what the map of devices says and why, and what really stands on each.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::ExitCode;

use proxy_common::abi::{Device, Role};
use serde::Serialize;

use super::{Row, complain, pins, show};
use crate::args::ShowArgs;
use crate::dataplane::attach::Hook;
use crate::dataplane::attach::links::Links;
use crate::dataplane::attach::standing::{By, Standing, misplaced};
use crate::devices::inventory::{Framing, Link};
use crate::devices::select::{ROLES, role_name};
use crate::devices::told::{self, Told};
use crate::devices::{DeviceMap, netlink};
use crate::run_file::RunFile;

#[derive(Debug, Serialize)]
struct DeviceRow {
    name: String,
    ifindex: u32,
    role: String,
    /// The rule that gave the role, or why the device is left alone; empty if no agent has told.
    why: String,
    /// What packets begin with.
    header: &'static str,
    mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    master: Option<String>,
    /// What arrives here comes from pods of this node.
    pods: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_v4: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_v6: Option<IpAddr>,
    /// tcx, clsact, or none.
    ingress: &'static str,
    egress: &'static str,
    /// Every program at ingress, in the order in which they run.
    at_ingress: Vec<Standing>,
    at_egress: Vec<Standing>,
    /// Foreign programs before ours at ingress, or behind it at egress.
    conflicts: Vec<String>,
}

impl Row for DeviceRow {
    const HEADER: &'static [&'static str] =
        &["DEVICE", "IFINDEX", "ROLE", "INGRESS", "EGRESS", "CONFLICTS", "PODS", "MAC", "MASTER", "SOURCE"];
    const WIDE: &'static [&'static str] = &["HEADER", "WHY", "AT INGRESS", "AT EGRESS"];

    fn cells(&self) -> Vec<String> {
        let sources = [self.source_v4, self.source_v6].into_iter().flatten();
        let sources: Vec<String> = sources.map(|addr| addr.to_string()).collect();
        vec![
            self.name.clone(),
            self.ifindex.to_string(),
            self.role.clone(),
            self.ingress.to_owned(),
            self.egress.to_owned(),
            if self.conflicts.is_empty() { "-".to_owned() } else { self.conflicts.join(", ") },
            if self.pods { "yes" } else { "-" }.to_owned(),
            self.mac.clone(),
            self.master.clone().unwrap_or_else(|| "-".to_owned()),
            if sources.is_empty() { "-".to_owned() } else { sources.join(",") },
        ]
    }

    fn wide(&self) -> Vec<String> {
        let order = |standing: &[Standing]| match standing {
            [] => "-".to_owned(),
            all => all.iter().map(short).collect::<Vec<_>>().join(" > "),
        };
        let why = if self.why.is_empty() { "-".to_owned() } else { self.why.clone() };
        vec![self.header.to_owned(), why, order(&self.at_ingress), order(&self.at_egress)]
    }
}

/// A program as one word: ours in brackets.
fn short(program: &Standing) -> String {
    let name = match program.name.as_deref() {
        Some("") => "unnamed",
        Some(name) => name,
        None => "?",
    };
    let name = if program.own { format!("[{name}]") } else { name.to_owned() };
    match program.by {
        By::Tcx { link } => format!("{name}#{}/link{link}", program.id),
        By::Clsact { priority, handle } => format!("{name}#{}/prio{priority}/{handle:x}", program.id),
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pins = pins(args)?;
    let entries = DeviceMap::open(&pins)?.entries()?;
    let links = Links::new(&pins)?;
    let (told, note) = what_is_told(&told::file(&pins));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows = runtime.block_on(async {
        let handle = netlink::questions()?;
        let here = netlink::links(&handle).await?;
        let mut rows = Vec::new();
        for (ifindex, entry) in &entries {
            let filters = netlink::read_filters(&handle, *ifindex).await?;
            let at = |hook| links.standing(*ifindex, hook, &filters).unwrap_or_default();
            let [at_ingress, at_egress] = Hook::ALL.map(at);
            let why = told.get(ifindex).filter(|told| here.get(ifindex).is_some_and(|link| link.name == told.name));
            rows.push(served(entry, &here, why.map(|told| told.why.clone()), at_ingress, at_egress));
        }
        // Those that are left alone have a reason, and nothing else.
        for told in told.values().filter(|told| !entries.contains_key(&told.ifindex)) {
            if let Some(link) = here.get(&told.ifindex).filter(|link| link.name == told.name) {
                rows.push(left_alone(link, told.why.clone()));
            }
        }
        rows.sort_by_key(|row| row.ifindex);
        anyhow::Ok(rows)
    })?;
    let shown = show(&rows, args.output);
    note.iter().for_each(|note| complain(note));
    shown
}

/// What the agent has told of devices, by ifindex, and what must be known to understand it.
fn what_is_told(file: &RunFile<Vec<Told>>) -> (BTreeMap<u32, Told>, Option<String>) {
    match file.read() {
        Ok(read) => {
            let told = read.map(|(told, _)| told).unwrap_or_default();
            (told.into_iter().map(|told| (told.ifindex, told)).collect(), None)
        }
        Err(error) => {
            let file = file.path().display();
            (BTreeMap::new(), Some(format!("why devices are served is not known: cannot read {file}: {error}")))
        }
    }
}

fn served(
    entry: &Device,
    here: &BTreeMap<u32, Link>,
    why: Option<String>,
    at_ingress: Vec<Standing>,
    at_egress: Vec<Standing>,
) -> DeviceRow {
    let name = |index: u32| here.get(&index).map_or_else(|| format!("(gone) {index}"), |link| link.name.clone());
    let means = |standing: &[Standing]| match standing.iter().find(|program| program.own).map(|program| program.by) {
        Some(By::Tcx { .. }) => "tcx",
        Some(By::Clsact { .. }) => "clsact",
        None => "none",
    };
    let given = |addr: IpAddr| Some(addr).filter(|addr| !addr.is_unspecified());
    let wrong = [(Hook::Ingress, &at_ingress, "before"), (Hook::Egress, &at_egress, "behind")];
    let wrong = wrong.into_iter().flat_map(|(hook, standing, where_)| {
        misplaced(standing, hook).iter().map(move |program| format!("{where_} {}: {program}", hook.name()))
    });
    DeviceRow {
        name: name(entry.ifindex),
        ifindex: entry.ifindex,
        role: role_of(entry.role).to_owned(),
        why: why.unwrap_or_default(),
        header: here.get(&entry.ifindex).map_or("?", |link| header(link.framing)),
        mac: mac(&entry.mac),
        pods: entry.flags & Device::PODS != 0,
        master: (entry.master != 0).then(|| name(entry.master)),
        source_v4: given(entry.source_v4.into()),
        source_v6: given(entry.source_v6.into()),
        ingress: means(&at_ingress),
        egress: means(&at_egress),
        conflicts: wrong.collect(),
        at_ingress,
        at_egress,
    }
}

fn left_alone(link: &Link, why: String) -> DeviceRow {
    DeviceRow {
        name: link.name.clone(),
        ifindex: link.index,
        role: role_name(None).to_owned(),
        why,
        header: header(link.framing),
        mac: mac(&link.mac),
        pods: false,
        master: None,
        source_v4: None,
        source_v6: None,
        ingress: "none",
        egress: "none",
        at_ingress: Vec::new(),
        at_egress: Vec::new(),
        conflicts: Vec::new(),
    }
}

fn mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

const fn header(framing: Framing) -> &'static str {
    match framing {
        Framing::Ethernet => "ethernet",
        Framing::Flat => "ip",
        Framing::Other => "other",
    }
}

fn role_of(byte: u8) -> &'static str {
    let mut known = ROLES.iter().filter_map(|(_, role)| *role).chain([Role::Loopback]);
    let known = known.find(|role: &Role| *role as u8 == byte);
    known.map_or("?", |role| role_name(Some(role)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::inventory::Kind;

    #[test]
    fn a_row_says_the_same_in_yaml_and_json() {
        let link = Link {
            index: 7,
            name: "cali7".to_owned(),
            kind: Kind::Veth,
            loopback: false,
            framing: Framing::Ethernet,
            mac: [2, 0, 0, 0, 0, 7],
            master: None,
            up: true,
        };
        let standing = |name: Option<&str>, by| Standing { name: name.map(str::to_owned), id: 9, own: false, by };
        let row = DeviceRow {
            at_ingress: vec![standing(Some(""), By::Tcx { link: 3 }), standing(None, By::Tcx { link: 4 })],
            at_egress: vec![standing(Some("policy"), By::Clsact { priority: 77, handle: 1 })],
            source_v4: Some(IpAddr::from([10, 0, 0, 1])),
            conflicts: vec!["before ingress: unnamed (program 9, tcx link 3)".to_owned()],
            ..left_alone(&link, "belongs to: somebody".to_owned())
        };
        let text = super::super::yaml(std::slice::from_ref(&row)).unwrap();
        let read: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(read, serde_json::to_value([row]).unwrap(), "{text}");
    }

    #[test]
    fn every_role_has_its_name_back() {
        for (name, role) in ROLES {
            if let Some(role) = role {
                assert_eq!(role_of(role as u8), name);
            }
        }
        assert_eq!(role_of(0), "?");
    }
}
