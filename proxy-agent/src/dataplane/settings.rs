//! `CONFIG` while the agent runs: flags change by one store, so that programs see either the old or the new ones.

use std::io;

use aya::maps::MapData;
use proxy_common::abi::Config;

use super::bpf::mmap::MappedArray;
use super::pin::PinRoot;

/// The one entry of `CONFIG`.
#[derive(Debug)]
pub struct SettingsMap(MappedArray);

/// `CONFIG` cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use map CONFIG: {0}")]
pub struct SettingsError(#[from] io::Error);

/// `abi_version` and `flags` share the first word.
const VERSION_AND_FLAGS: usize = std::mem::offset_of!(Config, abi_version) / 8;
const _: () = assert!(std::mem::offset_of!(Config, flags) == 4 && std::mem::offset_of!(Config, abi_version) == 0);

impl SettingsMap {
    /// Opens the pinned map.
    pub fn open(pins: &PinRoot) -> Result<Self, SettingsError> {
        let data = MapData::from_pin(pins.map("CONFIG")).map_err(io::Error::other)?;
        Ok(Self(MappedArray::new(&data, true)?))
    }

    /// Sets or clears a flag. The agent is the only writer of this word.
    pub fn set_flag(&mut self, flag: u32, on: bool) -> Result<(), SettingsError> {
        let mut halves = halves(self.0.load(0, VERSION_AND_FLAGS)?);
        halves[1] = if on { halves[1] | flag } else { halves[1] & !flag };
        Ok(self.0.store(0, VERSION_AND_FLAGS, joined(halves))?)
    }
}

/// The two u32 of a word, in memory order.
fn halves(word: u64) -> [u32; 2] {
    let b = word.to_ne_bytes();
    [u32::from_ne_bytes([b[0], b[1], b[2], b[3]]), u32::from_ne_bytes([b[4], b[5], b[6], b[7]])]
}

fn joined([first, second]: [u32; 2]) -> u64 {
    let (a, b) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_two_halves_in_memory_order() {
        assert_eq!(halves(joined([1, 0x8000_0002])), [1, 0x8000_0002]);
        assert_eq!(joined([7, 9]).to_ne_bytes()[..4], 7u32.to_ne_bytes());
    }
}
