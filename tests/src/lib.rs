//! Fairlead's test tiers and their shared tools.

pub mod cni;
pub mod conformance;
pub mod controlplane;
pub mod counters;
pub mod deploy;
pub mod equivalence;
pub mod foreign;
pub mod image;
pub mod listed;
pub mod nodes;
pub mod not_run;
pub mod packet;
pub mod programs;
pub mod rules;
pub mod scenario;
pub mod second_uplink;
pub mod sys;
