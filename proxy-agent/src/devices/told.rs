//! What the agent tells of each device beside `DEVICES`: the rule that gave it its role, or why it is left alone. A
//! [file](RunFile) for `fairlead devices`.

use serde::{Deserialize, Serialize};

use super::desired::Desired;
use super::select;
use crate::dataplane::pin::PinRoot;
use crate::run_file::RunFile;

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

/// The file of the agent with these pins.
pub fn file(pins: &PinRoot) -> RunFile<Vec<Told>> {
    RunFile::of(pins, "devices.json")
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
    fn every_device_is_told_of_in_order() {
        let inv = inventory([Event::Link(link(9, "cali9", Kind::Veth)), Event::Link(link(4, "dummy4", Kind::Inert))]);
        let nodeport_addresses = NodePortAddresses::Primary;
        let told = of(&desired(
            &inv,
            &Wishes { selection: Selection::default(), nodeport_addresses, pods: None, replies: None },
        ));
        let roles: Vec<_> = told.iter().map(|told| (told.ifindex, &*told.role)).collect();
        assert_eq!(roles, [(4, "none"), (9, select::role_name(Some(Role::Pod)))]);
    }
}
