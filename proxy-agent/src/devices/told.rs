//! What the agent tells of each device beside `DEVICES`: the rule that gave it its role, or why it is left alone. A file for
//! `fairlead devices`, in the directory of the [status file](crate::status::file).

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::desired::Desired;
use super::select;
use crate::dataplane::pin::PinRoot;
use crate::status::file::directory;

/// What is told of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// ifindex.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// The name of its role.
    pub role: String,
    /// The rule that decided.
    pub why: String,
}

/// Every device of a goal, in order of the ifindex.
pub fn of(desired: &Desired) -> Vec<Told> {
    let told = |ifindex: u32, name: &str, role, why: &str| Told {
        ifindex,
        name: name.to_owned(),
        role: select::role_name(role).to_owned(),
        why: why.to_owned(),
    };
    let served =
        desired.devices.iter().map(|(index, device)| told(*index, &device.name, Some(device.role), &device.why));
    let skipped = desired.skipped.iter().map(|(index, (name, why))| told(*index, name, None, why));
    let mut all: Vec<_> = served.chain(skipped).collect();
    all.sort_by_key(|told| told.ifindex);
    all
}

/// The file.
#[derive(Clone, Debug)]
pub struct ToldFile {
    path: PathBuf,
}

impl ToldFile {
    /// That of the agent with these pins.
    pub fn of(pins: &PinRoot) -> Self {
        Self { path: directory(pins).join("devices.json") }
    }

    /// Replaces it at once.
    pub fn write(&self, told: &[Told]) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let new = self.path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(told)?)?;
        std::fs::rename(&new, &self.path)
    }

    /// What it says; nothing if it is not there.
    pub fn read(&self) -> io::Result<Vec<Told>> {
        match std::fs::read(&self.path) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Removes it. False if it was not there.
    pub fn remove(&self) -> io::Result<bool> {
        // Left by a crash between writing and renaming.
        _ = std::fs::remove_file(self.path.with_extension("new"));
        match std::fs::remove_file(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::Role;

    use super::*;
    use crate::config::NodePortAddresses;
    use crate::devices::desired::{Wishes, desired};
    use crate::devices::inventory::tests::{inventory, link};
    use crate::devices::inventory::{Event, Kind};
    use crate::devices::select::Selection;

    #[test]
    fn what_is_written_is_read_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = ToldFile { path: dir.path().join("x/devices.json") };
        assert_eq!(file.read().unwrap(), []);
        let inv = inventory([Event::Link(link(9, "cali9", Kind::Veth)), Event::Link(link(4, "dummy4", Kind::Inert))]);
        let nodeport_addresses = NodePortAddresses::Primary;
        let told = of(&desired(
            &inv,
            &Wishes { selection: Selection::default(), nodeport_addresses, pods: None, replies: None },
        ));
        let roles: Vec<_> = told.iter().map(|told| (told.ifindex, &*told.role)).collect();
        assert_eq!(roles, [(4, "none"), (9, select::role_name(Some(Role::Pod)))]);
        file.write(&told).unwrap();
        assert_eq!(file.read().unwrap(), told);
        assert!(file.remove().unwrap() && !file.remove().unwrap());
    }
}
