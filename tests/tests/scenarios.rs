//! The scenario tier on maps in memory: needs nothing. One test for all files, which names each file that differs.

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

#[test]
fn every_scenario_ends_as_written() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut failures = Vec::new();
    for path in scenario::all(&dir).unwrap() {
        if let Err(error) = Scenario::load(&path).and_then(|scenario| scenario.run(&Memory)) {
            failures.push(format!("{error:#}"));
        }
    }
    assert!(failures.is_empty(), "{} scenarios failed:\n\n{}", failures.len(), failures.join("\n\n"));
}
