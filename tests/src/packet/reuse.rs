//! Loaded objects are used again by later tests, empty as new: the verifier's time is most of a test's.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use aya::maps::Map;
use aya_obj::generated::{BPF_F_MMAPABLE, BPF_F_RDONLY_PROG, bpf_attr, bpf_cmd};
use proxy_agent::dataplane::bpf::BpfDataplane;

use super::maps::Maps;
use super::programs::Programs;
use crate::sys::{bpf, zeroed};

/// What loading an object gives.
pub(super) struct Loaded {
    pub(super) dataplane: BpfDataplane,
    pub(super) programs: Programs,
    pub(super) maps: Maps,
}

/// At most as many of each kind as tests ran beside each other.
static IDLE: Mutex<Vec<(Kind, Loaded)>> = Mutex::new(Vec::new());

/// What the programs were loaded with that cannot be changed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) reply_mark: u32,
}

/// One that a test has done with.
pub(super) fn take(kind: Kind) -> Option<Loaded> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let at = idle.iter().position(|(other, _)| *other == kind)?;
    Some(idle.swap_remove(at).1)
}

/// The test has done with it.
pub(super) fn give_back(kind: Kind, loaded: Loaded) {
    match loaded.empty() {
        Ok(()) => IDLE.lock().unwrap_or_else(PoisonError::into_inner).push((kind, loaded)),
        // It must not reach the next test; this one has passed and need not fail for it.
        Err(error) => eprintln!("the loaded programs are not used again: {error:#}"),
    }
}

impl Loaded {
    /// Makes every map what it was when it was loaded.
    pub(super) fn empty(&self) -> Result<()> {
        self.maps.all().try_for_each(|(name, map)| empty(map).with_context(|| format!("cannot empty {name}")))
    }
}

/// Every element of every map that can change, by the map's name.
pub(super) fn contents(maps: &Maps) -> Result<BTreeMap<String, Elements>> {
    maps.all().map(|(name, map)| Ok((name.to_owned(), elements(map)?))).collect()
}

/// Keys and values.
pub type Elements = BTreeMap<Vec<u8>, Vec<u8>>;

/// A map's shape.
struct Shape {
    fd: RawFd,
    array: bool,
    key_size: usize,
    value_size: usize,
    entries: u32,
    mapped: bool,
    /// What the compiler calls constant: the loader has frozen it.
    constant: bool,
}

impl Shape {
    fn of(map: &Map) -> Result<Self> {
        let (data, array, per_cpu) = match map {
            Map::Array(data) => (data, true, false),
            Map::PerCpuArray(data) => (data, true, true),
            Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data) => (data, false, false),
            other => bail!("nobody has said how: {other:?}"),
        };
        let info = data.info()?;
        let value_size = info.value_size() as usize;
        let cpus = aya::util::nr_cpus().map_err(|(file, error)| io::Error::other(format!("{file}: {error}")))?;
        Ok(Self {
            fd: data.fd().as_fd().as_raw_fd(),
            array,
            key_size: info.key_size() as usize,
            value_size: if per_cpu { value_size.next_multiple_of(8) * cpus } else { value_size },
            entries: info.max_entries(),
            mapped: info.map_flags() & BPF_F_MMAPABLE != 0,
            constant: info.map_flags() & BPF_F_RDONLY_PROG != 0,
        })
    }
}

fn empty(map: &Map) -> Result<()> {
    let shape = Shape::of(map)?;
    if shape.constant {
        return Ok(());
    }
    if shape.mapped {
        Mapping::of(&shape)?.bytes().fill(0);
        return Ok(());
    }
    if shape.array {
        let zero = vec![0; shape.value_size];
        return (0..shape.entries).try_for_each(|index| write(shape.fd, &index.to_ne_bytes(), &zero));
    }
    let mut key = vec![0; shape.key_size];
    while next_key(shape.fd, None, &mut key)? {
        remove(shape.fd, &key)?;
    }
    Ok(())
}

fn elements(map: &Map) -> Result<Elements> {
    let shape = Shape::of(map)?;
    let mut elements = Elements::new();
    if shape.mapped {
        elements.insert(Vec::new(), Mapping::of(&shape)?.bytes().to_vec());
        return Ok(elements);
    }
    let mut key = vec![0; shape.key_size];
    let mut more = !shape.constant && next_key(shape.fd, None, &mut key)?;
    while more {
        let mut value = vec![0; shape.value_size];
        read(shape.fd, &key, &mut value)?;
        elements.insert(key.clone(), value);
        let before = key.clone();
        more = next_key(shape.fd, Some(&before), &mut key)?;
    }
    Ok(elements)
}

/// A whole array in memory: a system call per word would take longer than the verifier.
struct Mapping {
    at: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn of(shape: &Shape) -> Result<Self> {
        let length = shape.entries as usize * shape.value_size.next_multiple_of(8);
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, rights, libc::MAP_SHARED, shape.fd, 0) };
        let at = NonNull::new(at.cast::<u8>()).filter(|at| at.as_ptr().cast() != libc::MAP_FAILED);
        Ok(Self { at: at.ok_or_else(io::Error::last_os_error).context("map an array")?, length })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as `self` lives; no program runs and no other test has this map.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what `of` mapped. It fails only for what is not mapped.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.length) };
    }
}

fn element(fd: RawFd, key: &[u8]) -> bpf_attr {
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = fd as u32;
    element.key = key.as_ptr() as u64;
    attr
}

fn write(fd: RawFd, key: &[u8], value: &[u8]) -> Result<()> {
    let mut attr = element(fd, key);
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop).context("write an element")
}

fn read(fd: RawFd, key: &[u8], value: &mut [u8]) -> Result<()> {
    let mut attr = element(fd, key);
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr).map(drop).context("read an element")
}

fn remove(fd: RawFd, key: &[u8]) -> Result<()> {
    bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut element(fd, key)).map(drop).context("remove an element")
}

/// Writes the key after this one, or the first; false if there is none.
fn next_key(fd: RawFd, key: Option<&[u8]>, next: &mut [u8]) -> Result<bool> {
    let mut attr = element(fd, key.unwrap_or_default());
    if key.is_none() {
        // The kernel starts from the beginning.
        attr.__bindgen_anon_2.key = 0;
    }
    attr.__bindgen_anon_2.__bindgen_anon_1.next_key = next.as_mut_ptr() as u64;
    match bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).context("find a key"),
    }
}
