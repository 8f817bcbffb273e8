//! Fairlead's eBPF programs.
