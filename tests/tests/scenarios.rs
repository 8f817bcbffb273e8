//! The scenario tier on maps in memory: needs nothing. One test for each file, by its name.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};
use fairlead_tests::scenario::{self, Maps, Scenario};
use proxy_agent::dataplane::Capacities;
use proxy_agent::dataplane::memory::MemoryDataplane;

/// Maps in memory, which also notice what a packet could trip over on the way.
struct Memory;

impl Maps for Memory {
    type Plane = MemoryDataplane;

    fn empty(&self, capacities: Capacities) -> Result<MemoryDataplane> {
        Ok(MemoryDataplane::new(capacities))
    }

    fn reopen(&self, plane: &MemoryDataplane) -> Result<MemoryDataplane> {
        Ok(plane.clone())
    }

    fn check(&self, plane: &MemoryDataplane) -> Result<()> {
        let violations = plane.violations();
        ensure!(violations.is_empty(), "packets could meet: {violations:#?}");
        Ok(())
    }
}

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");

#[track_caller]
fn ends_as_written(name: &str) {
    let path = Path::new(FOLDER).join(name.replace('_', "-")).with_extension("txtar");
    if let Err(error) = Scenario::load(&path).and_then(|scenario| scenario.run(&Memory)) {
        panic!("{error:#}");
    }
}

macro_rules! files {
    ($($name:ident),+ $(,)?) => {
        const NAMES: &[&str] = &[$(stringify!($name)),+];
        $(
            #[test]
            fn $name() {
                ends_as_written(stringify!($name));
            }
        )+
    };
}

files! {
    affinity,
    bad_input,
    clusterip,
    duplicate_clusterip,
    duplicate_endpoint,
    duplicate_node_port,
    endpoints,
    every_class,
    external_local,
    full_map,
    full_source_ranges,
    internal_local,
    leading_zeros,
    multi_port,
    no_endpoints,
    no_ipv6,
    node_port_local,
    other_proxy,
    own_node,
    recreate,
    rename_port,
    restart,
    same_address_twice,
    same_node_port,
    scale,
    service_cidrs,
    shared_external_ip,
    slice_changes_service,
    slice_moves,
    source_ranges,
    terminating,
    topology_hints,
    type_changes,
}

#[test]
fn every_file_has_its_test() {
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().replace('-', "_"));
    let files: BTreeSet<_> = scenario::all(Path::new(FOLDER)).unwrap().iter().filter_map(|path| stem(path)).collect();
    assert_eq!(files, NAMES.iter().map(|name| (*name).to_owned()).collect());
}
