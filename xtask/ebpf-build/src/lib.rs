//! Builds the eBPF object; used by xtask and by the agent's build script.
