//! Fairlead's agent: watches Services and EndpointSlices and keeps the eBPF maps in step.

pub mod dataplane;
pub mod model;
