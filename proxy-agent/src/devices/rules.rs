//! The node's rules that are ours, by netlink: they carry a protocol number that nobody else uses, so that a later agent,
//! `fairlead check` and `fairlead cleanup` know them.

use std::collections::BTreeSet;

use futures::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion};

use super::replies::Rule;
use crate::model::IpFamily;

/// `FRA_PROTOCOL` of our rules. The kernel keeps numbers from 128 on for whoever wants one
/// (`include/uapi/linux/rtnetlink.h`); those that programs are known to use are in iproute2's `rt_protos`.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(0xfa);

/// A rule could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct RuleError {
    what: String,
    source: rtnetlink::Error,
}

/// All rules of the node that read marks.
#[derive(Debug, Default)]
pub struct Rules {
    /// Ours.
    pub own: Vec<Rule>,
    /// Others', as far as they look like ours.
    pub others: Vec<Rule>,
    messages: Vec<(Rule, RuleMessage)>,
}

impl Rules {
    /// Rules of others that read bits of these rules, or match a packet that carries the mark of one and nothing else. Those
    /// that compare all 32 bits with another number are common, and only match what has no mark of ours.
    pub fn rivals<'a>(&'a self, own: impl IntoIterator<Item = &'a Rule> + Clone) -> impl Iterator<Item = &'a Rule> {
        let disturb = |rule: &Rule, own: &Rule| {
            let reads_bits = rule.mask != u32::MAX && rule.mask & own.mask != 0;
            rule.family == own.family && (reads_bits || (rule.mask != 0 && own.mark & rule.mask == rule.mark))
        };
        self.others.iter().filter(move |rule| own.clone().into_iter().any(|own| disturb(rule, own)))
    }
}

/// Reads them.
pub async fn read(handle: &Handle) -> Result<Rules, RuleError> {
    let mut rules = Rules::default();
    for version in [IpVersion::V4, IpVersion::V6] {
        let failed = |source| RuleError { what: "read the node's rules".to_owned(), source };
        let messages = handle.rule().get(version).execute();
        for message in messages.try_collect::<Vec<_>>().await.map_err(failed)? {
            let Some(rule) = decode(&message) else { continue };
            if message.attributes.contains(&RuleAttribute::Protocol(PROTOCOL)) {
                rules.own.push(rule);
                rules.messages.push((rule, message));
            } else {
                rules.others.push(rule);
            }
        }
    }
    Ok(rules)
}

/// What setting them did.
#[derive(Debug, Default)]
pub struct Changed {
    /// Rules added and removed.
    pub changes: Vec<String>,
    /// Rules of others that read the same bits.
    pub rivals: Vec<Rule>,
    /// What could not be added or removed.
    pub failed: Vec<RuleError>,
}

/// Makes ours these: adds what is missing before it removes what is too much. A rule that fails keeps no other one back.
pub async fn set(handle: &Handle, wanted: &BTreeSet<Rule>) -> Result<Changed, RuleError> {
    let now = read(handle).await?;
    let mut changed = Changed { rivals: now.rivals(wanted).copied().collect(), ..Changed::default() };
    let mut note = |[what, done]: [&str; 2], rule: &Rule, result: Result<(), rtnetlink::Error>| match result {
        Ok(()) => changed.changes.push(format!("{done} {rule}")),
        Err(source) => changed.failed.push(RuleError { what: format!("{what} the rule {rule}"), source }),
    };
    for rule in wanted.iter().filter(|rule| !now.own.contains(rule)) {
        let mut request = handle.rule().add();
        *request.message_mut() = encode(rule);
        note(["add", "added"], rule, request.execute().await);
    }
    let mut kept = BTreeSet::new();
    for (rule, message) in now.messages {
        // One of two that are the same goes as well.
        if wanted.contains(&rule) && kept.insert(rule) {
            continue;
        }
        note(["remove", "removed"], &rule, handle.rule().del(message).execute().await);
    }
    Ok(changed)
}

fn encode(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match rule.family {
        IpFamily::V4 => AddressFamily::Inet,
        IpFamily::V6 => AddressFamily::Inet6,
    };
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(rule.mark),
        RuleAttribute::FwMask(rule.mask),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(PROTOCOL),
    ];
    if rule.not_default {
        message.attributes.push(RuleAttribute::SuppressPrefixLen(0));
    }
    message
}

/// A rule that reads marks and names a table.
fn decode(message: &RuleMessage) -> Option<Rule> {
    let family = match message.header.family {
        AddressFamily::Inet => IpFamily::V4,
        AddressFamily::Inet6 => IpFamily::V6,
        _ => return None,
    };
    if message.header.action != RuleAction::ToTable {
        return None;
    }
    let (mut priority, mut mark, mut mask) = (0, None, u32::MAX);
    let (mut table, mut not_default) = (message.header.table.into(), false);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::FwMark(bits) => mark = Some(*bits),
            RuleAttribute::FwMask(bits) => mask = *bits,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::SuppressPrefixLen(0) => not_default = true,
            _ => {}
        }
    }
    Some(Rule { family, priority, mark: mark?, mask, table, not_default })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_what_it_was() {
        for not_default in [false, true] {
            for family in IpFamily::ALL {
                let rule = Rule { family, priority: 59, mark: 0x2000, mask: 0x6000, table: 1001, not_default };
                assert_eq!(decode(&encode(&rule)), Some(rule));
            }
        }
    }

    #[test]
    fn rivals_read_our_bits_or_match_our_marks() {
        let rule = |mark, mask| Rule { family: IpFamily::V4, priority: 9, mark, mask, table: 7, not_default: false };
        let own = BTreeSet::from([rule(0x1000, 0x3000), rule(0x2000, 0x3000)]);
        for (mark, mask, rival) in [
            (0x1000, u32::MAX, true),
            (0x3000, u32::MAX, false),
            (0x1001, u32::MAX, false),
            (0x4000, 0x6000, true),
            (0x0000, 0x1000, true),
            (0x0000, 0xc000, true),
            (0x4000, 0xc000, false),
            (0x0000, 0x0000, false),
        ] {
            let rules = Rules { others: vec![rule(mark, mask)], ..Rules::default() };
            assert_eq!(rules.rivals(&own).count(), usize::from(rival), "{mark:#x}/{mask:#x}");
        }
        let other_family = Rule { family: IpFamily::V6, ..rule(0x1000, 0x3000) };
        assert_eq!(Rules { others: vec![other_family], ..Rules::default() }.rivals(&own).count(), 0);
    }

    #[test]
    fn a_rule_without_a_mark_is_not_looked_at() {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.action = RuleAction::ToTable;
        assert_eq!(decode(&message), None);
    }
}
