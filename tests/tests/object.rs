//! The inventory of the built eBPF object: programs and maps with their shapes. A change shows up as a difference of
//! `tests/golden/object.txt`, to be reviewed beside `ABI_VERSION`. `FAIRLEAD_BLESS=1` writes the file anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use aya_obj::{EbpfSectionKind, Object};
use proxy_agent::dataplane::load::{self, FLAT_OBJECT, OBJECT, Shape};
use proxy_common::{ABI_VERSION, Outcome, abi};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/object.txt");

fn inventory() -> String {
    let object = Object::parse(OBJECT).expect("the built object is an ELF that aya reads");
    let mut text = format!("layout version {ABI_VERSION}\n\nprograms\n");
    let programs: BTreeMap<_, _> = object.programs.iter().collect();
    for (name, program) in programs {
        writeln!(text, "  {name:<14} {:?}", program.section).expect("a String takes it");
    }
    text.push_str("\nmaps             type          key  value  entries  flags\n");
    for (name, shape) in load::shapes().expect("the built object names its maps") {
        let Shape { kind, key_size, value_size, max_entries, flags } = shape;
        let kind = load::kind_name(kind);
        let kept = if load::is_pinned(&name) { flag_names(flags) } else { "scratch, not pinned".to_owned() };
        let line = format!("  {name:<14} {kind:<13} {key_size:>3} {value_size:>6} {max_entries:>8}  {kept}");
        writeln!(text, "{}", line.trim_end()).expect("a String takes it");
    }
    text.push_str("\noutcomes\n");
    for outcome in Outcome::ALL {
        writeln!(text, "  {:>2} {}", *outcome as u32, outcome.name()).expect("a String takes it");
    }
    text
}

fn flag_names(flags: u32) -> String {
    const KNOWN: [(u32, &str); 2] = [(1, "no_prealloc"), (1 << 10, "mmapable")];
    let mut names: Vec<String> =
        KNOWN.into_iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| name.to_owned()).collect();
    let unknown = KNOWN.into_iter().fold(flags, |rest, (bit, _)| rest & !bit);
    if unknown != 0 {
        names.push(format!("{unknown:#x}"));
    }
    names.join(" ")
}

#[test]
fn the_object_is_the_one_that_was_reviewed() {
    let found = inventory();
    if std::env::var_os("FAIRLEAD_BLESS").is_some() {
        std::fs::create_dir_all(Path::new(GOLDEN).parent().unwrap()).unwrap();
        std::fs::write(GOLDEN, &found).unwrap();
    }
    let golden = std::fs::read_to_string(GOLDEN).unwrap_or_default();
    for (number, (golden, found)) in golden.lines().zip(found.lines()).enumerate() {
        assert_eq!(golden, found, "tests/golden/object.txt, line {}", number + 1);
    }
    assert_eq!(golden.lines().count(), found.lines().count(), "lines of tests/golden/object.txt and of the object");
}

/// What user space believes of a map's key and value must be what the object says: aya compares sizes only when a map
/// is opened.
#[test]
fn key_and_value_sizes_are_those_of_the_shared_types() {
    use abi::{
        Affinity, AffinityKey, Config, Device, Flow, FlowKey, Live, Name, NodeAddr, Port, PortStats, Service,
        ServiceKey, Slot, SourceRange,
    };
    use proxy_common::{Addr4, Addr6, V4, V6};
    let sizes: [(&str, usize, usize); 32] = [
        ("SERVICES_V4", size_of::<ServiceKey<V4>>(), size_of::<Service>()),
        ("SERVICES_V6", size_of::<ServiceKey<V6>>(), size_of::<Service>()),
        ("CLUSTER_IPS_V4", size_of::<Addr4>(), 4),
        ("CLUSTER_IPS_V6", size_of::<Addr6>(), 4),
        ("PORTS", 4, size_of::<Port>()),
        ("SLOTS_V4", 4, size_of::<Slot<V4>>()),
        ("SLOTS_V6", 4, size_of::<Slot<V6>>()),
        ("LIVE", 4, size_of::<Live>()),
        ("FLOWS_V4", size_of::<FlowKey<V4>>(), size_of::<Flow<V4>>()),
        ("FLOWS_V6", size_of::<FlowKey<V6>>(), size_of::<Flow<V6>>()),
        ("NEW_V4", size_of::<FlowKey<V4>>(), size_of::<Flow<V4>>()),
        ("NEW_V6", size_of::<FlowKey<V6>>(), size_of::<Flow<V6>>()),
        ("NODE_ADDRS_V4", size_of::<Addr4>(), size_of::<NodeAddr>()),
        ("NODE_ADDRS_V6", size_of::<Addr6>(), size_of::<NodeAddr>()),
        ("AFFINITY_V4", size_of::<AffinityKey<V4>>(), size_of::<Affinity>()),
        ("AFFINITY_V6", size_of::<AffinityKey<V6>>(), size_of::<Affinity>()),
        // Behind the length of the prefix.
        ("SRC_RANGES_V4", 4 + size_of::<SourceRange<V4>>(), 4),
        ("SRC_RANGES_V6", 4 + size_of::<SourceRange<V6>>(), 4),
        ("SVC_CIDRS_V4", 4 + size_of::<Addr4>(), 4),
        ("SVC_CIDRS_V6", 4 + size_of::<Addr6>(), 4),
        ("FRAGS_V4", size_of::<FlowKey<V4>>(), size_of::<Flow<V4>>()),
        ("FRAGS_V6", size_of::<FlowKey<V6>>(), size_of::<Flow<V6>>()),
        ("CURSORS", 4, 4),
        ("NODE_PORTS", 4, 8),
        ("FILTER", 4, 8),
        ("DEVICES", 4, size_of::<Device>()),
        ("CONFIG", 4, size_of::<Config>()),
        ("STATS", 4, 8),
        ("PORT_STATS", 4, size_of::<PortStats>()),
        ("REJECTS", 4, size_of::<abi::config::RejectBucket>()),
        ("NAMES", 4, size_of::<Name>()),
        ("PROGRAMS", 4, 4),
    ];
    let shapes = load::shapes().unwrap();
    for (name, key, value) in sizes {
        let shape = shapes.get(name).unwrap_or_else(|| panic!("the object has no map {name}"));
        assert_eq!((shape.key_size as usize, shape.value_size as usize), (key, value), "{name}");
    }
    let pinned = shapes.keys().filter(|name| load::is_pinned(name)).count();
    assert_eq!(pinned, sizes.len(), "a pinned map that this table does not know");
}

/// The kernel keeps 15 bytes of a name; `bpftool` and the pins must say the same.
#[test]
fn names_survive_the_kernel() {
    let object = Object::parse(OBJECT).unwrap();
    let maps =
        object.maps.iter().filter(|(_, map)| map.section_kind() == EbpfSectionKind::BtfMaps).map(|(name, _)| name);
    for name in maps.chain(object.programs.keys()) {
        assert!(name.len() <= 15, "{name} is longer than 15 bytes");
    }
}

/// Flows that began on a device of one kind go on over one of the other.
#[test]
fn the_objects_differ_in_their_arrays_of_programs_alone() {
    let [mut maps, mut flat] = [OBJECT, FLAT_OBJECT].map(|object| load::shapes_of(object).unwrap());
    assert_eq!(maps.remove("PROGRAMS").unwrap(), flat.remove("PROGRAMS_FLAT").unwrap());
    assert_eq!(maps, flat);
    let [programs, flat] = [OBJECT, FLAT_OBJECT].map(|object| Object::parse(object).unwrap().programs);
    assert!(programs.keys().collect::<BTreeSet<_>>() == flat.keys().collect());
}

/// Faults are for `mutants.rs` alone: neither agent nor programs have one to choose from.
#[test]
fn nothing_that_is_shipped_has_mutants() {
    const { assert!(!proxy_agent::mutants::AVAILABLE) };
    let chooses = |object: &[u8]| object.windows(7).any(|bytes| bytes == b"MUTANT\0");
    assert!(!chooses(OBJECT) && !chooses(FLAT_OBJECT), "an object has the global that chooses a fault");
}
