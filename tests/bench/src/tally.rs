//! Look-ups per packet, counted by a build of the programs that does nothing else differently.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
};
use fairlead_lab::Namespace;
use proxy_agent::dataplane::pin::PinRoot;
use proxy_common::{
    Family, V4, V6,
    abi::{Flow, FlowKey, Tally},
};

use crate::{
    classes::{self, Class, Prepared},
    plane::{self, Plane},
};

/// What one packet of a class did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The class.
    pub class: Class,
    /// Over IPv6.
    pub v6: bool,
    /// Look-ups, updates and deletes by map.
    pub by_map: BTreeMap<Tally, u64>,
    /// Entries that came (or went) in `NEW`.
    pub half_open: i64,
    /// Entries that came (or went) in `FLOWS`.
    pub confirmed: i64,
}

impl Count {
    /// Look-ups that walk memory.
    pub fn hashed(&self) -> u64 {
        self.by_map.iter().filter(|(map, _)| map.is_hash()).map(|(_, count)| count).sum()
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.by_map.values().sum()
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { 6 } else { 4 };
        write!(
            f,
            "{}, IPv{family}: {} hash + {} array",
            self.class.describe(),
            self.hashed(),
            self.total() - self.hashed()
        )?;
        for (n, (map, count)) in self.by_map.iter().enumerate() {
            write!(f, "{} {} {count}", if n == 0 { ":" } else { "," }, map.name())?;
        }
        for (what, change) in [("NEW", self.half_open), ("FLOWS", self.confirmed)] {
            if change != 0 {
                write!(f, "; {what} {change:+}")?;
            }
        }
        Ok(())
    }
}

/// The section of the programs' global data: the counters are all there is of it.
const COUNTERS: &str = ".bss";

/// Builds the counting object.
pub fn build() -> Result<Vec<u8>> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let options = proxy_ebpf_build::Options {
        workspace: &workspace,
        target_dir: &target.join("ebpf-tally"),
        features: &["tally"],
        opt_level: None,
        subcommand: "build",
    };
    let built = proxy_ebpf_build::build(&options).context("the counting object cannot be built")?;
    std::fs::read(&built.object).with_context(|| format!("cannot read {}", built.object.display()))
}

/// The counting build, loaded and filled; attached nowhere.
pub struct Counting {
    plane: Plane,
    tally: Array<MapData, [u64; Tally::ALL.len()]>,
}

impl fmt::Debug for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counting").field("plane", &self.plane).finish_non_exhaustive()
    }
}

impl Counting {
    /// Loads an object that was built with the feature `tally`, and fills its maps.
    pub fn new(object: &[u8], pins: PathBuf) -> Result<Self> {
        let node = Namespace::current()?;
        let mut plane = Plane::new(object, &node, &[plane::loopback()], pins, &classes::plan(2))?;
        let tally = plane.take_map(COUNTERS);
        let tally = tally.context("the object counts no look-ups: it was built without feature tally")?;
        Ok(Self { plane, tally: tally.try_into()? })
    }

    /// Counts one packet of a class.
    pub fn count(&self, class: Class, v6: bool) -> Result<Count> {
        let prepared = Prepared::new(self.plane.pins(), class, v6)?;
        let (tally, entries) = (self.tally()?, self.entries(v6)?);
        prepared.once()?;
        let mut by_map = self.tally()?;
        by_map.iter_mut().for_each(|(map, count)| *count -= tally.get(map).copied().unwrap_or(0));
        by_map.retain(|_, count| *count != 0);
        let now = self.entries(v6)?;
        Ok(Count { class, v6, by_map, half_open: now.0 - entries.0, confirmed: now.1 - entries.1 })
    }

    fn tally(&self) -> Result<BTreeMap<Tally, u64>> {
        let counts = self.tally.get(&0, 0).context("cannot read the counters")?;
        Ok(Tally::ALL.iter().copied().zip(counts).collect())
    }

    /// Entries of `NEW` and of `FLOWS`.
    fn entries(&self, v6: bool) -> Result<(i64, i64)> {
        if v6 {
            Ok((entries::<V6>(self.plane.pins(), "NEW_V6")?, entries::<V6>(self.plane.pins(), "FLOWS_V6")?))
        } else {
            Ok((entries::<V4>(self.plane.pins(), "NEW_V4")?, entries::<V4>(self.plane.pins(), "FLOWS_V4")?))
        }
    }
}

fn entries<F: Family>(pins: &PinRoot, name: &str) -> Result<i64>
where
    FlowKey<F>: Pod,
    Flow<F>: Pod,
{
    let data = MapData::from_pin(pins.map(name)).with_context(|| format!("cannot open {name}"))?;
    let map = if name.starts_with("NEW") { Map::LruHashMap(data) } else { Map::HashMap(data) };
    let map: HashMap<_, FlowKey<F>, Flow<F>> = HashMap::try_from(map).with_context(|| format!("{name} is no hash"))?;
    let mut count = 0;
    for key in map.keys() {
        key.with_context(|| format!("cannot list {name}"))?;
        count += 1;
    }
    Ok(count)
}
