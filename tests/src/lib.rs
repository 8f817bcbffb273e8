//! Fairlead's test tiers and their shared tools.

pub mod controlplane;
pub mod deploy;
pub mod image;
pub mod packet;
pub mod scenario;
