//! `STATS`: what the programs said of the packets so far.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData, PerCpuArray};
use fairlead_lab::Lab;
use proxy_agent::dataplane::pin::PinRoot;
use proxy_common::{CODES, Outcome};

/// Packets by outcome; those that are not counted are not listed.
pub type Outcomes = BTreeMap<Outcome, u64>;

/// The counters of one set of maps.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Counters {
    /// Opens the pinned map.
    pub fn open(pins: &PinRoot) -> Result<Self> {
        let data = MapData::from_pin(pins.map("STATS")).context("cannot open STATS")?;
        Ok(Self(PerCpuArray::try_from(Map::PerCpuArray(data)).context("STATS is no per-CPU array of u64")?))
    }

    /// All counts so far.
    pub fn read(&self) -> Result<Outcomes> {
        (0..CODES)
            .filter_map(Outcome::from_code)
            .map(|outcome| {
                let values = self.0.get(&(outcome as u32), 0).context("cannot read STATS")?;
                Ok((outcome, values.iter().sum()))
            })
            .collect()
    }

    /// What was counted since `before`; no outcome that was not.
    pub fn since(&self, before: &Outcomes) -> Result<Outcomes> {
        let mut now = self.read()?;
        now.iter_mut().for_each(|(outcome, count)| *count -= before.get(outcome).copied().unwrap_or(0));
        now.retain(|_, count| *count != 0);
        Ok(now)
    }
}

/// What a lab's node has counted so far. Nothing where it cannot be read: it explains failures, no more.
pub fn of(lab: &Lab) -> Outcomes {
    let counters = PinRoot::new(lab.pin_path()).map_err(anyhow::Error::from).and_then(|pins| Counters::open(&pins));
    counters.and_then(|counters| counters.read()).unwrap_or_default()
}

/// The same since `before`, in words: `1 drop_no_route, 3 request`.
pub fn told_since(before: &Outcomes, lab: &Lab) -> String {
    let counts = of(lab).into_iter().map(|(outcome, now)| (outcome, now - before.get(&outcome).copied().unwrap_or(0)));
    let seen = counts.filter(|(_, count)| *count > 0).map(|(outcome, count)| format!("{count} {}", outcome.name()));
    seen.collect::<Vec<_>>().join(", ")
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counters")
    }
}
