//! What netfilter tracks in both nodes, with the client's port left out, so that entries can be compared.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use fairlead_lab::{
    Namespace, Proto,
    conntrack::{self, Entry},
};
use fairlead_tests::{equivalence, nodes::Nodes};

/// A connection's entries, as text.
pub(crate) type Tracked = std::collections::BTreeSet<String>;

/// How long connections may take to end everywhere.
const PATIENCE: Duration = Duration::from_secs(20);

/// Entries stay until they are compared, however slow the machine is: that of a datagram goes after 30 s by default, that of
/// a connection that was reset after 10 s.
pub(crate) fn remember(node: &Namespace) -> Result<()> {
    let kinds = ["udp_timeout", "udp_timeout_stream", "tcp_timeout_close", "tcp_timeout_time_wait"];
    kinds.into_iter().try_for_each(|kind| node.sysctl(&format!("net.netfilter.nf_conntrack_{kind}"), "3600"))
}

/// All of a node's entries.
pub(crate) struct List(Vec<Entry>);

impl List {
    /// Those of one client.
    pub(crate) fn of(&self, proto: Proto, client: SocketAddr) -> Tracked {
        equivalence::entries(&self.0, proto, client)
    }
}

/// The entries of both nodes, once the connections from these ports have ended.
pub(crate) fn settled(nodes: &Nodes, is_own: impl Fn(u16) -> bool) -> Result<[List; 2]> {
    let begun = Instant::now();
    let own = |entry: &Entry| is_own(entry.original.src.port()) || is_own(entry.reply.dst.port());
    let ended = |entry: &Entry| entry.proto != Proto::Tcp || ["TIME_WAIT", "CLOSE"].contains(&&*entry.state);
    loop {
        let [first, second] = &nodes.labs;
        let lists = [conntrack::list(&first.node.ns)?, conntrack::list(&second.node.ns)?];
        let over = lists.iter().flatten().filter(|entry| own(entry)).all(ended);
        if over || begun.elapsed() > PATIENCE {
            return Ok(lists.map(List));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
