//! The tables, as people and as programs read them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use fairlead_lab::{Namespace, janitor};
use serde::Serialize;

use crate::{
    classes::{self, Class, Prepared},
    plane::{self, Plane},
    rows::{Bench, Effort, Row, Traffic},
    tally::{self, Count, Counting},
};

/// Means of one class, of which the median counts.
const ROUNDS: usize = 21;
/// Packets of one mean.
const REPEAT: u32 = 20_000;

/// What a class of packets costs.
#[derive(Clone, Debug, Serialize)]
pub struct ClassRow {
    /// The class.
    pub class: Class,
    /// Over IPv6.
    pub v6: bool,
    /// Nanoseconds in the programs.
    pub ns: f64,
    /// Look-ups of hash maps; none where the counting build could not be made.
    pub hashed: Option<u64>,
    /// Look-ups of arrays.
    pub arrays: Option<u64>,
}

/// Everything.
#[derive(Debug, Serialize)]
struct Results<'a> {
    rows: &'a [Row],
    classes: &'a [ClassRow],
    missed: &'a [String],
}

/// Where pins of test runs go; the lab's janitor removes them if this process cannot.
pub fn pins(name: &str) -> Result<PathBuf> {
    janitor::arm()?;
    Ok(Path::new(janitor::BPF_FS).join(format!("{}{name}", janitor::own_prefix())))
}

/// Measures and prints all rows and classes, or `only` these rows; returns the bounds that are missed.
pub fn all(object: &[u8], effort: Effort, only: &[Traffic], json: Option<&Path>) -> Result<Vec<String>> {
    let rows = ratios(object, effort, if only.is_empty() { &Traffic::ALL } else { only })?;
    let classes = if only.is_empty() { classes(object)? } else { Vec::new() };
    let missed: Vec<_> = rows.iter().flat_map(Row::misses).collect();
    for miss in &missed {
        println!("falls short: {miss}");
    }
    if let Some(file) = json {
        write_json(file, &Results { rows: &rows, classes: &classes, missed: &missed })?;
    }
    Ok(missed)
}

/// Writes results for programs.
pub fn write_json(file: &Path, results: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(results).context("cannot write JSON")?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}

fn ratios(object: &[u8], effort: Effort, traffic: &[Traffic]) -> Result<Vec<Row>> {
    let mut bench = Bench::new(object, effort)?;
    println!(
        "{:<32} {:>6} {:>6} {:>6}  {:<20}  {:<20}  {:<20}",
        "ns per packet, one core", "none", "few", "many", "few ÷ none", "many ÷ none", "many ÷ few"
    );
    let mut rows = Vec::new();
    for &traffic in traffic {
        for v6 in [false, true] {
            let row = bench.row(traffic, v6)?;
            println!("{row}");
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Measures and prints what each class of packets costs in the programs alone.
pub fn classes(object: &[u8]) -> Result<Vec<ClassRow>> {
    let counts = counts();
    if let Err(error) = &counts {
        println!("look-ups are not counted: {error:#}");
    }
    let counts = counts.unwrap_or_default();
    let plane = Plane::new(object, &Namespace::current()?, &[plane::loopback()], pins("classes")?, &classes::plan(2))?;
    println!("\n{:<40} {:>8} {:>6} {:>6}", "in the programs alone", "ns", "hash", "array");
    let mut rows = Vec::new();
    for class in Class::ALL {
        for v6 in [false, true] {
            let ns = Prepared::new(plane.pins(), class, v6)?.ns(ROUNDS, REPEAT)?;
            let count = counts.iter().find(|count| count.class == class && count.v6 == v6);
            let (hashed, arrays) = (count.map(Count::hashed), count.map(|count| count.total() - count.hashed()));
            let shown = |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
            let name = format!("{}, IPv{}", class.describe(), if v6 { 6 } else { 4 });
            println!("{name:<40} {ns:>8.0} {:>6} {:>6}", shown(hashed), shown(arrays));
            rows.push(ClassRow { class, v6, ns, hashed, arrays });
        }
    }
    Ok(rows)
}

/// Look-ups of every class, by the counting build.
pub fn counts() -> Result<Vec<Count>> {
    let object = tally::build()?;
    let counting = Counting::new(&object, pins("tally")?)?;
    let mut counts = Vec::new();
    for class in Class::ALL {
        for v6 in [false, true] {
            counts.push(counting.count(class, v6)?);
        }
    }
    Ok(counts)
}
