//! Loads the objects: maps sized and pinned, or taken over after a comparison; programs loaded and switched in.
//!
//! One is for devices with an Ethernet header and is loaded at once. The other one, for those without, waits for the first
//! of them: most nodes have none, and the verifier takes its time. Both work on the same maps.

mod flat;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use aya::maps::{Array, MapData, MapInfo, ProgramArray};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use aya_obj::generated::bpf_map_type;
use aya_obj::{EbpfSectionKind, Object};
use proxy_common::ABI_VERSION;
use proxy_common::abi::{Config as Settings, program};

use super::names;
use super::pin::{self, PinError, PinRoot};
use super::probe::Features;
use super::settings::Wanted;
use super::sys;
use crate::config::Sizes;
use flat::Flat;

/// The eBPF object that belongs to this agent.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FAIRLEAD_EBPF_OBJECT"));
/// The same programs for packets that begin with the IP header.
pub static FLAT_OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FAIRLEAD_EBPF_OBJECT_FLAT"));

// The object is for this byte order, and so are words that are stored through `mmap`. All else of a layout is the same on
// every processor: fields of stated sizes without a hole between them (`abi_struct!`).
const _: () = assert!(cfg!(target_endian = "little"), "the eBPF object is for little-endian machines");

/// What links and filters hold.
pub const INGRESS_STUB: &str = "ingress_stub";
/// The same at egress.
pub const EGRESS_STUB: &str = "egress_stub";

/// Loading failed.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The place of the pins.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A system call.
    #[error("cannot {op}: {source}")]
    System {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The object is no object.
    #[error("the eBPF object cannot be read: {0}")]
    Object(#[from] aya_obj::ParseError),
    /// The pinned maps belong to another version.
    #[error(
        "the maps under {path} have layout version {found}, this agent has version {ABI_VERSION}; \
         run `fairlead cleanup --pin-path {root}` with an agent of that version first (established flows are lost), or go \
         on with that one; what it attached goes on working until then"
    )]
    Version {
        /// Directory of maps.
        path: String,
        /// Version found.
        found: u32,
        /// The pin directory.
        root: String,
    },
    /// A pinned map is not what this agent needs.
    #[error(
        "the pinned map {map} has {what} {found}, wanted is {wanted}; start with the options of before, \
         or run `fairlead cleanup --pin-path {root}` first (established flows are lost)"
    )]
    Shape {
        /// The map.
        map: String,
        /// Type, key size, value size, entries or flags.
        what: &'static str,
        /// What is pinned.
        found: String,
        /// What is needed.
        wanted: String,
        /// The pin directory.
        root: String,
    },
    /// aya's loader.
    #[error("cannot create the maps: {0}")]
    Maps(#[source] aya::EbpfError),
    /// A map that cannot be used.
    #[error("cannot use map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// Why not.
        source: aya::maps::MapError,
    },
    /// A program that cannot be loaded.
    #[error("cannot load program {program}: {source}")]
    Program {
        /// The program.
        program: &'static str,
        /// Why not; the verifier's log.
        source: aya::programs::ProgramError,
    },
    /// The object lacks something.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// The programs for devices without Ethernet did not load.
    #[error(
        "the programs for devices without an Ethernet header do not load; the log says why, and they are tried again"
    )]
    Flat,
}

/// What a map looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
    /// Creation flags.
    pub flags: u32,
}

/// Working space of one program run, and of one build: not pinned, so that its layout is free to change.
const SCRATCH: [&str; 6] = ["REQUEST_V4", "REQUEST_V6", "REPLY_V4", "REPLY_V6", "CHOICE", "CLOCK"];

/// True if the map outlives the agent.
pub fn is_pinned(map: &str) -> bool {
    !SCRATCH.contains(&map)
}

/// The maps of the built-in object with their default sizes.
pub fn shapes() -> Result<BTreeMap<String, Shape>, aya_obj::ParseError> {
    shapes_of(OBJECT)
}

/// The maps of an object with their default sizes.
pub fn shapes_of(object: &[u8]) -> Result<BTreeMap<String, Shape>, aya_obj::ParseError> {
    let object = Object::parse(object)?;
    let maps = object.maps.iter().filter(|(_, map)| map.section_kind() == EbpfSectionKind::BtfMaps);
    Ok(maps
        .map(|(name, map)| {
            let shape = Shape {
                kind: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: map.max_entries(),
                flags: map.map_flags(),
            };
            (name.clone(), shape)
        })
        .collect())
}

impl Sizes {
    /// The size of a map; `None` if it is fixed. Maps of a family that the node does not have hold one entry.
    pub fn entries(&self, map: &str, ipv6: bool) -> Option<u32> {
        let (stem, family) = match map.strip_suffix("_V6") {
            Some(stem) => (stem, 6),
            None => (map.strip_suffix("_V4").unwrap_or(map), 4),
        };
        let entries = match stem {
            "SERVICES" => self.services,
            "CLUSTER_IPS" => self.cluster_ips,
            "PORTS" | "PORT_STATS" | "NAMES" => self.ports,
            "SLOTS" => self.slots,
            "LIVE" => self.endpoints,
            "FLOWS" => self.flows,
            "NEW" => self.half_open,
            "NODE_ADDRS" => self.node_addrs,
            "AFFINITY" => self.affinity,
            "SRC_RANGES" => self.source_ranges,
            "DEVICES" => self.devices,
            _ => return None,
        };
        Some(if family == 6 && !ipv6 { 1 } else { entries })
    }
}

/// The maps of the built-in object as these sizes make them.
pub fn sized_shapes(sizes: &Sizes, ipv6: bool) -> Result<BTreeMap<String, Shape>, aya_obj::ParseError> {
    shapes().map(|shapes| sized(shapes, sizes, ipv6))
}

fn sized(mut shapes: BTreeMap<String, Shape>, sizes: &Sizes, ipv6: bool) -> BTreeMap<String, Shape> {
    for (name, shape) in &mut shapes {
        if let Some(entries) = sizes.entries(name, ipv6) {
            shape.max_entries = entries;
        }
    }
    shapes
}

/// How to load.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// What to load: [`OBJECT`], unless another is asked for.
    pub object: &'a Cow<'static, [u8]>,
    /// Where the pins are.
    pub pins: &'a PinRoot,
    /// Map sizes.
    pub sizes: &'a Sizes,
    /// Whether the node has IPv6.
    pub ipv6: bool,
    /// What the kernel can do.
    pub features: Features,
    /// See `CONFIG`.
    pub settings: &'a Wanted,
    /// See `CONFIG`.
    pub half_open_secs: u32,
    /// See `CONFIG`.
    pub rejects_per_sec: u32,
    /// The bits of `skb->mark` that replies get; a constant of the programs.
    pub reply_mark: u32,
}

/// One of the two objects, and what it is called among the pins.
struct Set {
    /// Where its programs stand.
    programs: &'static str,
    slots: [(&'static str, u32); 12],
    /// Begins the names of its pins.
    prefix: &'static str,
}

const ETHERNET: Set = Set { programs: "PROGRAMS", slots: program::ALL, prefix: "" };
const FLAT: Set = Set { programs: "PROGRAMS_FLAT", slots: program::ALL_FLAT, prefix: "flat_" };

type Stubs = [(&'static str, SchedClassifier); 2];

/// What is left to do with the loaded programs. All else is the kernel's: the slots of `PROGRAMS` hold them, and what
/// they were loaded from is megabytes.
#[derive(Debug)]
pub struct Programs {
    common: Common,
    /// What those of devices with Ethernet were loaded from.
    object: Cow<'static, [u8]>,
    stubs: Stubs,
    flat: Flat,
}

/// What both objects are loaded with.
#[derive(Clone, Debug)]
struct Common {
    pins: PinRoot,
    sizes: Sizes,
    ipv6: bool,
    reply_mark: u32,
}

/// The pinned stubs.
fn stubs(set: &Set, pins: &PinRoot) -> Result<Stubs, LoadError> {
    let stub = |name| {
        let stub = SchedClassifier::from_pin(set.pin(pins, name));
        stub.map(|stub| (name, stub)).map_err(|source| LoadError::Program { program: name, source })
    };
    Ok([stub(INGRESS_STUB)?, stub(EGRESS_STUB)?])
}

impl Set {
    fn pin(&self, pins: &PinRoot, program: &str) -> PathBuf {
        pins.programs().join(format!("{}{program}", self.prefix))
    }
}

impl Programs {
    /// The stub that is attached under this name, [`INGRESS_STUB`] or [`EGRESS_STUB`]. The first of a `flat` device loads
    /// its programs.
    pub fn stub(&mut self, name: &'static str, flat: bool) -> Result<&mut SchedClassifier, LoadError> {
        let Self { common, stubs, flat: others, .. } = self;
        let stubs = if flat { others.stubs(common)? } else { stubs };
        let stub = stubs.iter_mut().find(|(stub, _)| *stub == name);
        stub.map(|(_, program)| program).ok_or(LoadError::Missing(name))
    }

    /// Hands out another program of a stub's instructions.
    pub fn with_another_stub<T, E: From<LoadError>>(
        &self,
        name: &'static str,
        flat: bool,
        then: impl FnOnce(&mut SchedClassifier) -> Result<T, E>,
    ) -> Result<T, E> {
        let object = if flat { FLAT_OBJECT } else { &self.object };
        let mut ebpf = create_maps(object, &self.common)?;
        let stub = classifier(&mut ebpf, name)?;
        stub.load().map_err(|source| LoadError::Program { program: name, source })?;
        then(stub)
    }
}

/// Loads everything and switches the new programs in.
///
/// What runs already goes on running: maps are taken over, and a packet meets either the old or the new program.
pub fn load(options: &Options<'_>) -> Result<Programs, LoadError> {
    // Since 5.11 maps do not count against it, and in a container nobody may lift it.
    if let Err(error) = sys::raise_memlock() {
        tracing::debug!(%error, "cannot lift the limit on locked memory");
    }
    check_versions(options.pins)?;
    let &Options { object, pins, sizes, ipv6, reply_mark, .. } = options;
    let common = Common { pins: pins.clone(), sizes: *sizes, ipv6, reply_mark };
    let mut ebpf = create_maps(object, &common)?;
    configure(&mut ebpf, options)?;
    // All are verified before the first is switched in.
    load_programs(&mut ebpf)?;
    switch(&mut ebpf, &ETHERNET, pins)?;
    Ok(Programs { common, object: object.clone(), stubs: stubs(&ETHERNET, pins)?, flat: Flat::default() })
}

/// Creates the maps of an object, or takes over those that are pinned and are as they should be.
fn create_maps(object: &[u8], common: &Common) -> Result<Ebpf, LoadError> {
    let Common { pins, sizes, ipv6, reply_mark } = common;
    let shapes = sized(shapes_of(object)?, sizes, *ipv6);
    check_pinned(pins, &shapes)?;
    if let Some(shape) = shapes.get("NAMES") {
        names::make(pins, shape).map_err(|source| LoadError::System { op: "make the map NAMES", source })?;
    }
    let mut loader = EbpfLoader::new();
    loader.override_global("REPLY_MARK", reply_mark, true);
    for (name, shape) in &shapes {
        loader.map_max_entries(name, shape.max_entries);
        if is_pinned(name) {
            loader.map_pin_path(name, pins.map(name));
        }
    }
    loader.load(object).map_err(LoadError::Maps)
}

/// Loads the programs of an object with the smallest maps and lets go of them at once: does this kernel's verifier accept
/// them?
pub fn verify(object: &[u8]) -> Result<(), LoadError> {
    let shapes = shapes_of(object)?;
    let mut loader = EbpfLoader::new();
    for name in shapes.keys().filter(|name| TINY.entries(name, false).is_some()) {
        loader.map_max_entries(name, 1);
    }
    load_programs(&mut loader.load(object).map_err(LoadError::Maps)?)
}

/// Every program.
fn names() -> impl Iterator<Item = &'static str> {
    program::ALL.map(|(name, _)| name).into_iter().chain([INGRESS_STUB, EGRESS_STUB])
}

/// Has the kernel verify every program, one on each processor at a time: a start waits for nothing longer.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), LoadError> {
    let mut found: BTreeMap<_, _> = ebpf.programs_mut().collect();
    let mut waiting = Vec::new();
    for name in names() {
        let program = found.remove(name).ok_or(LoadError::Missing(name))?;
        let program: &mut SchedClassifier =
            program.try_into().map_err(|source| LoadError::Program { program: name, source })?;
        waiting.push((name, program));
    }
    let waiting = Mutex::new(waiting.into_iter());
    let load = || {
        loop {
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((name, program)) = next else { return Ok(()) };
            program.load().map_err(|source| LoadError::Program { program: name, source })?;
        }
    };
    let processors = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let threads: Vec<_> = (1..processors.min(MOST_AT_ONCE)).map(|_| scope.spawn(load)).collect();
        let own = load();
        threads.into_iter().fold(own, |result, thread| {
            result.and(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    })
}

/// The long ones are so many.
const MOST_AT_ONCE: usize = 8;

const TINY: Sizes = Sizes {
    services: 1,
    cluster_ips: 1,
    ports: 1,
    slots: 1,
    endpoints: 1,
    flows: 1,
    half_open: 1,
    node_addrs: 1,
    affinity: 1,
    source_ranges: 1,
    devices: 1,
};

/// Refuses to stand beside another version: its stubs are on the same devices, and each packet would meet both.
fn check_versions(pins: &PinRoot) -> Result<(), LoadError> {
    match pins.other_version().map_err(LoadError::Pin)? {
        Some((path, found)) => {
            let (path, root) = (path.display().to_string(), pins.path().display().to_string());
            Err(LoadError::Version { path, found, root })
        }
        None => Ok(()),
    }
}

/// Compares what is pinned with what is wanted, because aya takes over any map of the right name.
fn check_pinned(pins: &PinRoot, wanted: &BTreeMap<String, Shape>) -> Result<(), LoadError> {
    let root = || pins.path().display().to_string();
    let pinned = pin::names(&pins.maps())
        .map_err(|source| PinError::Io { op: "read", path: pins.maps(), source })
        .map_err(LoadError::Pin)?;
    if pinned.iter().any(|name| name == "CONFIG") {
        let found = pinned_version(pins)?;
        // Zero: an agent died between making the map and filling it.
        if found != 0 && found != ABI_VERSION {
            return Err(LoadError::Version { path: pins.maps().display().to_string(), found, root: root() });
        }
    }
    for (name, wanted) in wanted.iter().filter(|(name, _)| pinned.contains(name)) {
        let found = pinned_shape(&pins.map(name)).map_err(|source| LoadError::Map { map: "pinned", source })?;
        let differs = |what, found: String, wanted: String| {
            Err(LoadError::Shape { map: name.clone(), what, found, wanted, root: root() })
        };
        if found.kind != wanted.kind {
            return differs("type", kind_name(found.kind), kind_name(wanted.kind));
        }
        let numbers = [
            ("a key size of", found.key_size, wanted.key_size),
            ("a value size of", found.value_size, wanted.value_size),
            ("a number of entries of", found.max_entries, wanted.max_entries),
            ("flags", found.flags, wanted.flags),
        ];
        if let Some((what, found, wanted)) = numbers.into_iter().find(|(_, found, wanted)| found != wanted) {
            return differs(what, found.to_string(), wanted.to_string());
        }
    }
    Ok(())
}

fn pinned_version(pins: &PinRoot) -> Result<u32, LoadError> {
    let failed = |source| LoadError::Map { map: "CONFIG", source };
    let data = MapData::from_pin(pins.map("CONFIG")).map_err(failed)?;
    let info = data.info().map_err(failed)?;
    if info.value_size() as usize != size_of::<Settings>() {
        // The shape check names what differs; the version stands first in every layout.
        return Ok(0);
    }
    let map: Array<_, Settings> = Array::try_from(aya::maps::Map::Array(data)).map_err(failed)?;
    Ok(map.get(&0, 0).map_err(failed)?.abi_version)
}

fn pinned_shape(path: &Path) -> Result<Shape, aya::maps::MapError> {
    let info = MapInfo::from_pin(path)?;
    Ok(Shape {
        kind: info.map_type()? as u32,
        key_size: info.key_size(),
        value_size: info.value_size(),
        max_entries: info.max_entries(),
        flags: info.map_flags(),
    })
}

/// A map type's name, as `bpftool` writes it.
pub fn kind_name(kind: u32) -> String {
    match bpf_map_type::try_from(kind) {
        Ok(kind) => format!("{kind:?}").trim_start_matches("BPF_MAP_TYPE_").to_lowercase(),
        Err(_) => format!("number {kind}"),
    }
}

/// Fills `CONFIG`. The seed is drawn once per set of maps: half-open flows are found again by it.
fn configure(ebpf: &mut Ebpf, options: &Options<'_>) -> Result<(), LoadError> {
    let failed = |source| LoadError::Map { map: "CONFIG", source };
    let map = ebpf.map_mut("CONFIG").ok_or(LoadError::Missing("map CONFIG"))?;
    let mut config: Array<_, Settings> = Array::try_from(map).map_err(failed)?;
    let mut settings = config.get(&0, 0).map_err(failed)?;
    if settings.seed == 0 {
        settings.seed =
            sys::random_u64().map_err(|source| LoadError::System { op: "draw a random number", source })?.max(1);
    }
    settings.abi_version = ABI_VERSION;
    settings.flags = settings.flags & !Settings::FIB_SOURCE | options.features.flags();
    options.settings.fill(&mut settings);
    settings.new_timeout_secs = options.half_open_secs;
    settings.reject_per_sec = options.rejects_per_sec;
    config.set(0, settings, 0).map_err(failed)
}

/// Pins the programs and puts them into their slots: each packet runs through the old or the new one.
fn switch(ebpf: &mut Ebpf, set: &Set, pins: &PinRoot) -> Result<(), LoadError> {
    for name in names() {
        pin_program(ebpf, name, set.pin(pins, name))?;
    }
    let failed = |source| LoadError::Map { map: set.programs, source };
    let map = ebpf.take_map(set.programs).ok_or(LoadError::Missing(set.programs))?;
    let mut programs: ProgramArray<_> = map.try_into().map_err(failed)?;
    for (name, slot) in set.slots {
        let program = classifier(ebpf, name)?;
        let fd = program.fd().map_err(|source| LoadError::Program { program: name, source })?;
        programs.set(slot, fd, 0).map_err(failed)?;
    }
    Ok(())
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, LoadError> {
    let program = ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
    program.try_into().map_err(|source| LoadError::Program { program: name, source })
}

/// Pins a program under its name in place of its predecessor. The pin is for `bpftool`: links and the slots of
/// `PROGRAMS` keep programs alive.
fn pin_program(ebpf: &mut Ebpf, name: &'static str, path: PathBuf) -> Result<(), LoadError> {
    let program = classifier(ebpf, name)?;
    match std::fs::remove_file(&path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(PinError::Io { op: "unpin", path, source }.into()),
    }
    program.pin(&path).map_err(|e| {
        let source = std::io::Error::other(e);
        PinError::Io { op: "pin a program at", path, source }.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_reaches_its_maps() {
        let shapes = sized_shapes(&TINY, true).unwrap();
        let fixed = [
            "CONFIG",
            "FILTER",
            "NODE_PORTS",
            "PROGRAMS",
            "STATS",
            "REJECTS",
            "CURSORS",
            "SVC_CIDRS_V4",
            "SVC_CIDRS_V6",
            "FRAGS_V4",
            "FRAGS_V6",
        ];
        for (name, shape) in shapes.iter().filter(|(name, _)| is_pinned(name) && !fixed.contains(&name.as_str())) {
            assert_eq!(shape.max_entries, 1, "{name} has no flag for its size");
        }
    }
}
