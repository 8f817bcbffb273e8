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
    /// Rules of others that read some of these bits, and not all 32 as one number.
    pub fn rivals(&self, bits: u32) -> impl Iterator<Item = &Rule> {
        self.others.iter().filter(move |rule| rule.mask & bits != 0 && rule.mask != u32::MAX)
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
}

/// Makes ours these: adds what is missing before it removes what is too much.
pub async fn set(handle: &Handle, wanted: &BTreeSet<Rule>) -> Result<Changed, RuleError> {
    let now = read(handle).await?;
    let rivals = now.rivals(wanted.iter().fold(0, |bits, rule| bits | rule.mask)).copied().collect();
    let mut changes = Vec::new();
    for rule in wanted.iter().filter(|rule| !now.own.contains(rule)) {
        let mut request = handle.rule().add();
        *request.message_mut() = encode(rule);
        let added = request.execute().await;
        added.map_err(|source| RuleError { what: format!("add the rule {rule}"), source })?;
        changes.push(format!("added {rule}"));
    }
    let mut kept = BTreeSet::new();
    for (rule, message) in now.messages {
        // One of two that are the same goes as well.
        if wanted.contains(&rule) && kept.insert(rule) {
            continue;
        }
        let removed = handle.rule().del(message).execute().await;
        removed.map_err(|source| RuleError { what: format!("remove the rule {rule}"), source })?;
        changes.push(format!("removed {rule}"));
    }
    Ok(Changed { changes, rivals })
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
    fn a_rule_without_a_mark_is_not_looked_at() {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.action = RuleAction::ToTable;
        assert_eq!(decode(&message), None);
    }
}
