//! Fairlead's agent: watches Services and EndpointSlices and keeps the eBPF maps in step.
