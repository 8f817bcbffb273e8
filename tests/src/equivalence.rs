//! Direct-path equivalence, the part that several tiers share: entries of connection tracking as text without what differs
//! between two equal connections, and the comparison.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Result, ensure};
use fairlead_lab::{
    Proto,
    conntrack::{Entry, Tuple},
};

/// The entries of one client address and port, timers and the port left out.
pub fn entries(listed: &[Entry], proto: Proto, client: SocketAddr) -> BTreeSet<String> {
    // The same port of the other transport is another's.
    let own = |entry: &&Entry| entry.proto == proto && (entry.original.src == client || entry.reply.dst == client);
    listed.iter().filter(own).map(|entry| shown(entry, client)).collect()
}

fn shown(entry: &Entry, client: SocketAddr) -> String {
    let port = |addr: SocketAddr| if addr == client { format!("{}:*", addr.ip()) } else { addr.to_string() };
    let Tuple { src, dst } = entry.original;
    // Where netfilter masquerades the client, it may choose a port as it likes.
    let back = if entry.reply.dst == client { port(client) } else { format!("{}:*", entry.reply.dst.ip()) };
    format!(
        "{} {} {} > {}, reply {} > {back}, assured {}, unreplied {}",
        entry.proto,
        entry.state,
        port(src),
        port(dst),
        port(entry.reply.src),
        // Datagrams are assured once they have gone both ways for two seconds, however fast the machine is.
        entry.proto == Proto::Tcp && entry.assured,
        entry.unreplied
    )
}

/// What was seen by the Service must be what was seen directly.
pub fn compare(what: &str, vip: &BTreeSet<String>, direct: &BTreeSet<String>) -> Result<()> {
    let list = |set: &BTreeSet<String>| set.iter().map(|line| format!("    {line}\n")).collect::<String>();
    ensure!(vip == direct, "{what} differ; by the Service:\n{}directly:\n{}", list(vip), list(direct));
    Ok(())
}
