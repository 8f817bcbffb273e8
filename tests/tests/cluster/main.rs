//! The cluster tier: the agent against a real control plane, judged by what clients of its Services see.
//!
//! A cluster is some network namespaces, an API server on the node's loopback and an agent that reaches it through a [`relay`],
//! which a case can cut. Cases that take nothing away from others share one (see [`e2e`]); the rest have one to themselves.
//! Several run at a time, because most of them wait; those in [`alone`] measure, have the machine to themselves and, by the
//! order of names, come first.

// Says to lints, too, that all of this is test code.
#![cfg(test)]

mod agent;
mod alone;
mod broken_watch;
mod chaos;
mod client;
mod deploy;
mod e2e;
mod fixture;
mod labels;
mod objects;
mod oracle;
mod own_node;
mod plane;
mod pods;
mod prober;
mod reach;
mod relay;
mod restart;
