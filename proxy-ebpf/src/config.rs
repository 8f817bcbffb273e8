//! `CONFIG[0]`, read where a flow begins.

use proxy_common::abi::{Config, Tally};

use crate::maps;

/// The settings; `None` only if the map were empty, which an array is not.
#[inline(always)]
pub(crate) fn get() -> Option<&'static Config> {
    maps::tally(Tally::Config);
    maps::CONFIG.get(0)
}
