//! The netns tier: real sockets between namespaces, through the programs that the agent attached.
//!
//! A case is a function; [`matrix!`] makes one test of it for each [`cell::Cell`] (CNI shape × netfilter). Inside a
//! test it runs for both families and both transports, and a failure names the combination. Cases of a cell share one
//! cluster and take turns; what would disturb others or needs long gets a cluster of its own ([`cell::Cluster::own`]).

/// One test of a case for each cell.
macro_rules! matrix {
    ($($case:ident),+ $(,)?) => {
        $(mod $case {
            use crate::cell::Cell;
            matrix!(@cells $case
                routed_plain, routed_conntrack, routed_invalid_drop,
                bridge_plain, bridge_conntrack, bridge_invalid_drop,
                bridge_nf_plain, bridge_nf_conntrack, bridge_nf_invalid_drop);
        })+
    };
    (@cells $case:ident $($cell:ident),+) => {
        $(#[test]
        fn $cell() {
            Cell::named(stringify!($cell)).run(super::$case);
        })+
    };
}

#[cfg(test)]
mod affinity;
#[cfg(test)]
mod bridge;
#[cfg(test)]
mod cell;
#[cfg(test)]
mod churn;
#[cfg(test)]
mod cluster_ip;
#[cfg(test)]
mod devices;
#[cfg(test)]
mod endpoints;
#[cfg(test)]
mod equivalence;
#[cfg(test)]
mod flat;
#[cfg(test)]
mod flood;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod health;
#[cfg(test)]
mod logs;
#[cfg(test)]
mod masq_agent;
#[cfg(test)]
mod masquerade;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod mount;
#[cfg(test)]
mod neighbours;
#[cfg(test)]
mod node_port;
#[cfg(test)]
mod payload;
#[cfg(test)]
mod reject;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod settings;
#[cfg(test)]
mod source_ranges;
#[cfg(test)]
mod status;
#[cfg(test)]
mod tuples;
#[cfg(test)]
mod two_nodes;
#[cfg(test)]
mod unallocated;
#[cfg(test)]
mod uplinks;
#[cfg(test)]
mod wires;
