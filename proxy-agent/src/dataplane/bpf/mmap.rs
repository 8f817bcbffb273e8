//! Arrays written through `mmap`: each 64-bit word by one atomic store, without a system call.

use std::io::{self, Error};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;

/// Bytes mapped at a time. A mapping counts as resident memory in whole, so a large array with few used entries is
/// mapped where it is used.
const WINDOW: usize = 256 << 10;

/// An array of 64-bit words behind a BPF array map.
#[derive(Debug)]
pub struct MappedArray {
    fd: OwnedFd,
    entries: u32,
    /// Words per entry: the kernel rounds values up to 8 bytes.
    stride: usize,
    windows: Vec<Option<Window>>,
    write: bool,
}

impl MappedArray {
    /// Maps the array behind `map`, which must have been made with `BPF_F_MMAPABLE`.
    pub fn new(map: &MapData, write: bool) -> io::Result<Self> {
        let info = map.info().map_err(Error::other)?;
        let fd = map.fd().as_fd().try_clone_to_owned()?;
        let stride = info.value_size().div_ceil(8) as usize;
        let bytes = info.max_entries() as usize * stride * 8;
        let mut windows = Vec::new();
        windows.resize_with(bytes.div_ceil(WINDOW), || None);
        Ok(Self { fd, entries: info.max_entries(), stride, windows, write })
    }

    /// Number of entries.
    pub const fn entries(&self) -> u32 {
        self.entries
    }

    /// Words per entry.
    pub const fn stride(&self) -> usize {
        self.stride
    }

    /// Reads a word of an entry.
    pub fn load(&mut self, index: u32, word: usize) -> io::Result<u64> {
        Ok(self.word(index, word)?.load(Ordering::Acquire))
    }

    /// Stores a word of an entry. Programs see stores in the order in which they were made.
    pub fn store(&mut self, index: u32, word: usize, value: u64) -> io::Result<()> {
        self.word(index, word)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Calls `each` with the words of every entry, and leaves nothing mapped that was not mapped before.
    pub fn scan(&mut self, mut each: impl FnMut(u32, &[u64])) -> io::Result<()> {
        let (mut index, mut entry) = (0, Vec::with_capacity(self.stride));
        for number in 0..self.windows.len() {
            let temporary;
            let window = match &self.windows[number] {
                Some(window) => window,
                None => {
                    temporary = self.map(number)?;
                    &temporary
                }
            };
            for word in window.words() {
                entry.push(word.load(Ordering::Acquire));
                if entry.len() == self.stride {
                    each(index, &entry);
                    entry.clear();
                    index += 1;
                }
            }
        }
        Ok(())
    }

    fn word(&mut self, index: u32, word: usize) -> io::Result<&AtomicU64> {
        if index >= self.entries || word >= self.stride {
            let text = format!("entry {index}, word {word} of an array of {} entries", self.entries);
            return Err(Error::new(io::ErrorKind::InvalidInput, text));
        }
        let byte = (index as usize * self.stride + word) * 8;
        let (number, offset) = (byte / WINDOW, byte % WINDOW / 8);
        if self.windows[number].is_none() {
            self.windows[number] = Some(self.map(number)?);
        }
        let window = self.windows[number].as_ref().and_then(|window| window.words().get(offset));
        window.ok_or_else(|| Error::other("a window shorter than its array"))
    }

    fn map(&self, number: usize) -> io::Result<Window> {
        let total = self.entries as usize * self.stride * 8;
        let start = number * WINDOW;
        Window::map(&self.fd, start, (total - start).min(WINDOW), self.write)
    }
}

/// A mapped part of an array.
#[derive(Debug)]
struct Window {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is shared with the kernel anyway and only accessed through atomics; unmapping needs `&mut`.
unsafe impl Send for Window {}

impl Window {
    fn map(fd: &OwnedFd, start: usize, len: usize, write: bool) -> io::Result<Self> {
        let protection = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        let offset = libc::off_t::try_from(start).map_err(Error::other)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; `start` is a multiple of the page size.
        let ptr =
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        if ptr == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(ptr.cast()).ok_or_else(|| Error::other("mmap returned no address"))?;
        Ok(Self { start, words: len / 8 })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words * 8` bytes long, and lives as long as `self`; programs change it
        // at any time, which atomics allow.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; nothing borrows it any more. It cannot fail for a whole mapping.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use aya::maps::Array;

    use super::*;

    /// Arrays need CAP_BPF; without it there is nothing to test here, and the packet tier covers it.
    fn array(entries: u32) -> Option<MapData> {
        const BPF_F_MMAPABLE: u32 = 1 << 10;
        let obj = aya_obj::Map::new_from_params(2, 4, 40, entries, BPF_F_MMAPABLE);
        MapData::create(obj, "mmap_test", None).ok()
    }

    #[test]
    fn stores_reach_the_map_across_windows() {
        let Some(map) = array(20_000) else { return };
        let mut mapped = MappedArray::new(&map, true).unwrap();
        assert_eq!((mapped.entries(), mapped.stride()), (20_000, 5));
        // Entry 6553 straddles the first two windows: 6553 × 40 < 256 KiB < 6554 × 40.
        for index in [0, 6_553, 19_999] {
            for word in 0..5 {
                mapped.store(index, word, u64::from(index) << 8 | word as u64).unwrap();
            }
        }
        let read: Array<_, [u64; 5]> = Array::try_from(aya::maps::Map::Array(map)).unwrap();
        for index in [0, 6_553, 19_999] {
            let expected: [u64; 5] = std::array::from_fn(|word| u64::from(index) << 8 | word as u64);
            assert_eq!(read.get(&index, 0).unwrap(), expected);
        }
        let mut found = Vec::new();
        mapped.scan(|index, words| found.extend(words.iter().any(|w| *w != 0).then_some(index))).unwrap();
        assert_eq!(found, [0, 6_553, 19_999]);
    }

    #[test]
    fn a_scan_maps_nothing_for_good() {
        let Some(map) = array(20_000) else { return };
        let mut mapped = MappedArray::new(&map, false).unwrap();
        let mut entries = 0;
        mapped.scan(|_, _| entries += 1).unwrap();
        assert_eq!(entries, 20_000);
        assert!(mapped.windows.iter().all(Option::is_none));
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let Some(map) = array(10) else { return };
        let mut mapped = MappedArray::new(&map, true).unwrap();
        assert!(mapped.store(10, 0, 1).is_err());
        assert!(mapped.load(0, 5).is_err());
    }
}
