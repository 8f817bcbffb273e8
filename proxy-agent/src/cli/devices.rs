//! `fairlead devices`: what the map of devices says, and what really is attached.

use std::net::IpAddr;
use std::process::ExitCode;

use proxy_common::abi::{Device, Role};
use serde::Serialize;

use super::{Row, pins, show};
use crate::args::ShowArgs;
use crate::dataplane::attach::Hook;
use crate::dataplane::attach::links::Links;
use crate::devices::select::{ROLES, role_name};
use crate::devices::{DeviceMap, netlink};

#[derive(Debug, Serialize)]
struct DeviceRow {
    name: String,
    ifindex: u32,
    role: &'static str,
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
}

impl Row for DeviceRow {
    const HEADER: &'static [&'static str] =
        &["DEVICE", "IFINDEX", "ROLE", "INGRESS", "EGRESS", "PODS", "MAC", "MASTER", "SOURCE"];

    fn cells(&self) -> Vec<String> {
        let sources = [self.source_v4, self.source_v6].into_iter().flatten();
        let sources: Vec<String> = sources.map(|addr| addr.to_string()).collect();
        vec![
            self.name.clone(),
            self.ifindex.to_string(),
            self.role.to_owned(),
            self.ingress.to_owned(),
            self.egress.to_owned(),
            if self.pods { "yes" } else { "-" }.to_owned(),
            self.mac.clone(),
            self.master.clone().unwrap_or_else(|| "-".to_owned()),
            sources.join(","),
        ]
    }
}

pub(super) fn main(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let pins = pins(args)?;
    let entries = DeviceMap::open(&pins)?.entries()?;
    let links = Links::new(&pins)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows = runtime.block_on(async {
        let handle = netlink::questions()?;
        let names = netlink::names(&handle).await?;
        let name = |index: u32| names.get(&index).cloned().unwrap_or_else(|| format!("(gone) {index}"));
        let mut rows = Vec::new();
        for (ifindex, entry) in entries {
            let mut hooks = ["none"; 2];
            for (hook, means) in Hook::ALL.into_iter().zip(&mut hooks) {
                if links.look(ifindex, hook)?.is_some_and(|link| link.ifindex == ifindex) {
                    *means = "tcx";
                } else if netlink::has_own_filter(&handle, ifindex, hook).await? {
                    *means = "clsact";
                }
            }
            let given = |addr: IpAddr| Some(addr).filter(|addr| !addr.is_unspecified());
            rows.push(DeviceRow {
                name: name(ifindex),
                ifindex,
                role: role_of(entry.role),
                mac: entry.mac.map(|byte| format!("{byte:02x}")).join(":"),
                pods: entry.flags & Device::PODS != 0,
                master: (entry.master != 0).then(|| name(entry.master)),
                source_v4: given(entry.source_v4.into()),
                source_v6: given(entry.source_v6.into()),
                ingress: hooks[0],
                egress: hooks[1],
            });
        }
        anyhow::Ok(rows)
    })?;
    show(&rows, args.output)
}

fn role_of(byte: u8) -> &'static str {
    let mut known = ROLES.iter().filter_map(|(_, role)| *role).chain([Role::Loopback]);
    let known = known.find(|role: &Role| *role as u8 == byte);
    known.map_or("?", |role| role_name(Some(role)))
}

#[cfg(test)]
mod tests {
    use super::*;

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
