//! Which replies get which mark, and the rules that read it (`--reply-mark`). Pure.
//!
//! Each uplink has a number, which stands in the bits that are ours. Two rules of the node lead what carries it: the first
//! one asks the main table for anything but its default route, so that a pod of the node is found as without a mark; the
//! second one asks the table by which that uplink is left.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use proxy_common::abi::Role;

use super::inventory::{Inventory, MAIN_TABLE};
use crate::model::IpFamily;

/// `--reply-mark` and `--reply-mark-priority`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyMark {
    /// Bits of `skb->mark`, side by side.
    pub mask: u32,
    /// Of the second rule; the first one has one less.
    pub priority: u32,
}

impl ReplyMark {
    /// Uplinks that can be told apart.
    pub const fn room(&self) -> usize {
        (self.mask >> self.mask.trailing_zeros()) as usize
    }

    const fn mark(&self, number: usize) -> u32 {
        (number as u32) << self.mask.trailing_zeros()
    }
}

/// A rule of the node, as `ip rule` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// IPv4 or IPv6.
    pub family: IpFamily,
    /// Lower ones are asked first.
    pub priority: u32,
    /// What the bits of the mask say.
    pub mark: u32,
    /// The bits.
    pub mask: u32,
    /// Table to ask.
    pub table: u32,
    /// The table's default route does not count.
    pub not_default: bool,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, priority, mark, mask, table, not_default } = self;
        write!(f, "{family} {priority}: fwmark {mark:#x}/{mask:#x} lookup {table}")?;
        if *not_default { write!(f, " suppress_prefixlength 0") } else { Ok(()) }
    }
}

/// The mark of each uplink, by ifindex. The one that the default route with the lowest metric leaves by comes first;
/// there may be more uplinks than the bits can tell apart.
pub fn marks(roles: &BTreeMap<u32, Role>, inventory: &Inventory, wish: ReplyMark) -> BTreeMap<u32, u32> {
    let defaults = || inventory.hops().filter(|(key, _)| key.dst.prefix_len() == 0);
    let first = defaults().filter(|(key, _)| key.table == MAIN_TABLE).min_by_key(|(key, _)| key.metric);
    let first = first.map(|(_, hop)| hop.oif);
    // What no default route leaves by is no way back.
    let is_way = |index: &u32| defaults().any(|(_, hop)| hop.oif == *index);
    let mut uplinks: Vec<u32> =
        roles.iter().filter(|(_, role)| **role == Role::Uplink).map(|(index, _)| *index).filter(is_way).collect();
    uplinks.sort_by_key(|index| (Some(*index) != first, *index));
    uplinks.into_iter().take(wish.room()).enumerate().map(|(at, index)| (index, wish.mark(at + 1))).collect()
}

/// The rules that read these marks.
pub fn rules(marks: &BTreeMap<u32, u32>, inventory: &Inventory, wish: ReplyMark) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    for (index, mark) in marks {
        for family in IpFamily::ALL {
            let Some(table) = table_of(inventory, *index, family) else { continue };
            let of = |priority, table, not_default| Rule {
                family,
                priority,
                mark: *mark,
                mask: wish.mask,
                table,
                not_default,
            };
            rules.extend([of(wish.priority - 1, MAIN_TABLE, true), of(wish.priority, table, false)]);
        }
    }
    rules
}

/// The table whose default route leaves by this device; the main one before others.
fn table_of(inventory: &Inventory, index: u32, family: IpFamily) -> Option<u32> {
    let ways = inventory
        .hops()
        .filter(|(key, hop)| key.dst.prefix_len() == 0 && IpFamily::of(&key.dst.addr()) == family && hop.oif == index);
    // In the main table another device's default route may come before this one's.
    let is_first = |table: u32, metric: u32| {
        !inventory.hops().any(|(key, hop)| {
            key.table == table
                && key.dst.prefix_len() == 0
                && IpFamily::of(&key.dst.addr()) == family
                && key.metric < metric
                && hop.oif != index
        })
    };
    ways.filter(|(key, _)| is_first(key.table, key.metric))
        .map(|(key, _)| key.table)
        .min_by_key(|table| (*table != MAIN_TABLE, *table))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::inventory::tests::{inventory, link};
    use crate::devices::inventory::{Event, Hop, Kind, Route, RouteKey};

    const ONE_BIT: ReplyMark = ReplyMark { mask: 0x1000, priority: 60 };
    const TWO_BITS: ReplyMark = ReplyMark { mask: 0x6000, priority: 60 };

    fn default_route(oif: u32, table: u32, metric: u32, family: IpFamily) -> Event {
        let dst = if family == IpFamily::V4 { "0.0.0.0/0" } else { "::/0" };
        Event::Route {
            route: Route {
                key: RouteKey { dst: dst.parse().unwrap(), table, metric },
                hops: vec![Hop { oif, gateway: true, source: None }],
            },
            replace: false,
        }
    }

    /// eth2 is the way out, eth3 another one by a table of its own; eth4 leads nowhere.
    fn node() -> (BTreeMap<u32, Role>, Inventory) {
        let links = (1..5).map(|index| Event::Link(link(index, &format!("eth{index}"), Kind::Physical)));
        let routes = [
            default_route(3, 101, 0, IpFamily::V4),
            default_route(2, MAIN_TABLE, 100, IpFamily::V4),
            default_route(2, MAIN_TABLE, 1024, IpFamily::V6),
        ];
        let roles = [(1, Role::Pod), (2, Role::Uplink), (3, Role::Uplink), (4, Role::Uplink)].into();
        (roles, inventory(links.chain(routes).collect::<Vec<_>>()))
    }

    #[test]
    fn the_bits_tell_so_many_uplinks_apart() {
        for (mask, room) in [(0x1000, 1), (0x6000, 3), (0x80, 1), (0xf000_0000, 15)] {
            assert_eq!(ReplyMark { mask, priority: 60 }.room(), room, "{mask:#x}");
        }
    }

    #[test]
    fn the_way_out_comes_first_and_what_leads_nowhere_not_at_all() {
        let (roles, mut inventory) = node();
        assert_eq!(marks(&roles, &inventory, ONE_BIT), [(2, 0x1000)].into());
        assert_eq!(marks(&roles, &inventory, TWO_BITS), [(2, 0x2000), (3, 0x4000)].into());
        inventory.apply(default_route(3, MAIN_TABLE, 50, IpFamily::V4));
        assert_eq!(marks(&roles, &inventory, TWO_BITS), [(3, 0x2000), (2, 0x4000)].into());
    }

    #[test]
    fn an_uplink_is_left_by_its_own_table() {
        let (roles, inventory) = node();
        let rules = rules(&marks(&roles, &inventory, TWO_BITS), &inventory, TWO_BITS);
        let shown: Vec<_> = rules.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "IPv4 59: fwmark 0x2000/0x6000 lookup 254 suppress_prefixlength 0",
                "IPv4 59: fwmark 0x4000/0x6000 lookup 254 suppress_prefixlength 0",
                "IPv4 60: fwmark 0x2000/0x6000 lookup 254",
                "IPv4 60: fwmark 0x4000/0x6000 lookup 101",
                "IPv6 59: fwmark 0x2000/0x6000 lookup 254 suppress_prefixlength 0",
                "IPv6 60: fwmark 0x2000/0x6000 lookup 254",
            ]
        );
    }

    #[test]
    fn a_default_route_behind_another_devices_is_no_way_out() {
        let (roles, mut inventory) = node();
        inventory.apply(default_route(3, MAIN_TABLE, 200, IpFamily::V4));
        let marks = marks(&roles, &inventory, TWO_BITS);
        let rules = rules(&marks, &inventory, TWO_BITS);
        let table = rules.iter().find(|rule| rule.mark == marks[&3] && !rule.not_default).map(|rule| rule.table);
        assert_eq!(table, Some(101));
    }
}
