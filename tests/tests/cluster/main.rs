//! The cluster tier: the agent against a real control plane, judged by what clients of its Services see.
//!
//! Each case has a small cluster of network namespaces, an API server on the node's loopback and an agent to itself; those
//! in [`e2e`] share theirs. The agent reaches the server through a [`relay`] that a case can cut. Cases run one at a time:
//! they measure.

// Says to lints, too, that all of this is test code.
#![cfg(test)]

mod agent;
mod burst;
mod chaos;
mod deploy;
mod e2e;
mod fixture;
mod labels;
mod latency;
mod objects;
mod oracle;
mod own_node;
mod plane;
mod pods;
mod prober;
mod reach;
mod relay;
mod restart;
mod watch;
