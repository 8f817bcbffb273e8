//! Grace periods: waiting until every program that may have read the old state has ended.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::dataplane::sys;

/// Ways to wait.
#[derive(Clone, Debug)]
pub struct Grace {
    nested: Option<Arc<Nested>>,
}

/// A map in a map: an update of the outer one waits for all programs that may hold the inner one.
#[derive(Debug)]
struct Nested {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Grace {
    /// Chooses the way for this machine: `membarrier(GLOBAL)`, which answers at once where only one CPU is online and
    /// refuses with `nohz_full`; in these cases an update of a map in a map.
    pub fn new() -> io::Result<Self> {
        if several_cpus_online() && sys::membarrier_global().is_ok() {
            return Ok(Self { nested: None });
        }
        let inner = sys::create_array(4, 1)?;
        let outer = sys::create_array_of_maps(&inner)?;
        Ok(Self { nested: Some(Arc::new(Nested { outer, inner })) })
    }

    /// Waits. Takes tens of milliseconds.
    pub fn wait(&self) -> io::Result<()> {
        match &self.nested {
            // A CPU may have gone offline since; the last one has nobody to wait for but itself, and this thread runs
            // on it: no program does.
            None => sys::membarrier_global(),
            Some(nested) => sys::put_inner_map(&nested.outer, &nested.inner),
        }
    }
}

fn several_cpus_online() -> bool {
    fs::read_to_string("/sys/devices/system/cpu/online").is_ok_and(|list| list.contains(['-', ',']))
}
