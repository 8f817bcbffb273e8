//! Two nodes with an agent and pods each, and an external host that reaches both: what kube-proxy's rules say of every
//! client, address and endpoint, with real sockets; and what takes two nodes to show.

mod affinity;
mod change;
mod flows;
mod mtu;
mod pair;

use fairlead_tests::rules;
