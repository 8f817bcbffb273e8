//! Fairlead's test tiers and their shared tools.

pub mod conformance;
pub mod controlplane;
pub mod deploy;
pub mod image;
pub mod packet;
pub mod programs;
pub mod scenario;
