//! A second uplink that a node's pods use by policy routing, as secondary interfaces of the AWS VPC CNI.

use std::process::Command;

use anyhow::Result;
use fairlead_lab::{Lab, netns};

/// Its name.
pub const SECOND: &str = "eth1";

/// Connects the node with the external host, where the other end has this name.
pub fn plug(lab: &Lab, far: &str) -> Result<()> {
    let (node, ext) = (lab.node.ns.name(), lab.ext.ns.name());
    netns::run(
        Command::new("ip")
            .args(["link", "add", "name", SECOND, "netns", node, "type", "veth", "peer", "name", far, "netns", ext]),
    )?;
    lab.ext.ns.ip_batch(&format!("link set {far} up"))?;
    lab.node.ns.ip_batch(&format!("link set {SECOND} up"))
}

/// What is from a pod asks this table, what is to one the main one; and so does what has this mark.
pub fn rules(lab: &Lab, table: u32, to_main: Option<&str>) -> Result<()> {
    let table = table.to_string();
    for (family, pods) in ["-4", "-6"].into_iter().zip(&lab.pod_cidrs()) {
        let marked = to_main.map(|mark| ["priority", "1024", "fwmark", mark, "lookup", "main"]);
        let rules =
            [["priority", "512", "to", pods, "lookup", "main"], ["priority", "1536", "from", pods, "lookup", &table]];
        for rule in rules.into_iter().chain(marked) {
            lab.node.ns.output("ip", &[&[family, "rule", "add"], &rule[..]].concat())?;
        }
    }
    Ok(())
}
