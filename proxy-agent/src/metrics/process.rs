//! The metrics that every Prometheus client has of its process, from `/proc/self`.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::dataplane::sys;

/// This process.
#[derive(Debug)]
pub(super) struct Process;

/// Figures of `/proc/self/stat`, which counts from 1: user and system time, virtual size, resident pages.
const UTIME: usize = 14;
const STIME: usize = 15;
const VSIZE: usize = 23;
const RSS: usize = 24;

impl Collector for Process {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Behind the name of the program, which may contain anything; the third figure is the first behind it.
        let figures: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
        let figure = |index: usize| figures.get(index - 3).and_then(|text| text.parse::<f64>().ok());
        if let (Some(user), Some(system)) = (figure(UTIME), figure(STIME)) {
            let secs = (user + system) / sys::clock_ticks() as f64;
            let metric = to.encode_descriptor(
                "process_cpu_seconds",
                "Time that the process has spent on CPUs",
                None,
                MetricType::Counter,
            )?;
            ConstCounter::new(secs).encode(metric)?;
        }
        let gauges = [
            ("process_resident_memory_bytes", "Resident memory", figure(RSS).map(|n| n * sys::page_size() as f64)),
            ("process_virtual_memory_bytes", "Virtual memory", figure(VSIZE)),
            ("process_open_fds", "Open file descriptors", fs::read_dir("/proc/self/fd").ok().map(|d| d.count() as f64)),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let metric = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
                ConstGauge::new(value).encode(metric)?;
            }
        }
        Ok(())
    }
}
