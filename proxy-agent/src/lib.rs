//! Fairlead's agent: watches Services and EndpointSlices and keeps the eBPF maps in step.

#[macro_use]
pub mod mutants;

pub mod affinity;
pub mod args;
pub mod cli;
pub mod config;
pub mod dataplane;
pub mod devices;
pub mod diff;
pub mod events;
pub mod flows;
pub mod gc;
pub mod health;
pub mod http;
pub mod index;
pub mod k8s;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod run;
pub mod run_file;
pub mod settings;
pub mod source;
pub mod source_ports;
pub mod startup;
pub mod status;
pub mod sync;
pub mod sysctl;
pub mod telemetry;
