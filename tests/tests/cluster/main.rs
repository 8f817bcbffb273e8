//! The cluster tier: the agent against a real control plane, judged by what clients of its Services see.
//!
//! A cluster is some network namespaces, an API server on the node's loopback and an agent that reaches it through a [`relay`],
//! which a case can cut. Cases that take nothing away from others share one (see [`upstream`]); the rest have one to themselves.
//! Several run at a time, because most of them wait. They begin in the order of their names: first those in [`alone`], which
//! measure and have the machine to themselves, then those that take long, and last the many short ones in [`upstream`].

// Says to lints, too, that all of this is test code.
#![cfg(test)]

mod agent;
mod alone;
mod broken_watch;
mod chaos;
mod client;
mod deploy;
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
mod upstream;
