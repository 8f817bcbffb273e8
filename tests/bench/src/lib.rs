//! What Fairlead costs, measured on this machine.
//!
//! * [`rows`]: ratios of the same path with and without the programs, in network namespaces, on one core;
//! * [`classes`]: nanoseconds and look-ups per packet for each class of packet, by `BPF_PROG_TEST_RUN`;
//! * [`soak`], [`exchange`], [`masquerade`]: long runs that must lose nothing.
//! * [`scale`]: thousands of Services behind a real API server.
//!
//! `docs/benchmarks.md` explains the method.

pub mod classes;
pub mod exchange;
pub mod harness;
pub mod masquerade;
pub mod path;
pub mod plane;
pub mod report;
pub mod rows;
pub mod scale;
pub mod sender;
pub mod services;
pub mod soak;
pub mod stats;
pub mod tally;
