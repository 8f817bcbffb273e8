//! Fairlead's agent: watches Services and EndpointSlices and keeps the eBPF maps in step.

pub mod args;
pub mod config;
pub mod dataplane;
pub mod devices;
pub mod model;
pub mod telemetry;
pub mod diff;
pub mod index;
pub mod plan;
pub mod flows;
pub mod gc;
pub mod cli;
pub mod run;
pub mod k8s;
pub mod status;
pub mod sync;
pub mod source;
