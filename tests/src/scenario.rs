//! Scenarios: text files with manifests in and map contents out, for any implementation of the maps.
//!
//! ```text
//! # What it shows, in a sentence.
//! any-order
//!
//! -- web.yaml --
//! apiVersion: v1
//! …
//! -- maps --
//! Service default/web
//! …
//! ```
//!
//! Sections are carried out from top to bottom:
//!
//! | section | does |
//! |---|---|
//! | `-- NAME.yaml --` | writes the file |
//! | `-- remove NAME.yaml --` | deletes the file |
//! | `-- wait SECONDS --` | lets time pass |
//! | `-- restart --` | ends the agent and starts another one over the same maps |
//! | `-- maps --` | compares the maps, as text |
//! | `-- status --` | compares what is refused or not served |
//! | `-- problems --` | compares what was said of the files since the last such section |
//!
//! Settings stand before the first section, one a line: `any-order` repeats the scenario with the files of each group
//! in every order, each as one step and as many, and lets runs come to rest before it compares; `node NAME` is this
//! node's name (default `node-a`); `addresses ADDR …` are the node's own, of which a default route would start from the
//! first of each family; `capacity MAP=N …` makes maps small; `no-ipv6`.
//!
//! `FAIRLEAD_BLESS=1` writes what came out into the file: read the difference before you commit it.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_agent::dataplane::render::{self, Options};
use proxy_agent::dataplane::{Capacities, Dataplane};
use proxy_agent::diff::QUIET;
use proxy_agent::index::{Event, Kind};
use proxy_agent::source::folder::files::{Files, Read};
use proxy_agent::sync::Sync;
use proxy_common::abi::NodeAddr;

/// Files permuted at most: 720 orders.
const MOST_PERMUTED: usize = 6;

/// An implementation of the maps under test.
pub trait Maps {
    /// A handle to them.
    type Plane: Dataplane;

    /// Empty maps.
    fn empty(&self, capacities: Capacities) -> Result<Self::Plane>;

    /// Another handle to the same maps, as a restarted agent opens it.
    fn reopen(&self, plane: &Self::Plane) -> Result<Self::Plane>;

    /// Checks of its own after each scenario.
    fn check(&self, plane: &Self::Plane) -> Result<()>;
}

/// What a section asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Section {
    Write { file: String, text: String },
    Remove { file: String },
    Wait(Duration),
    Restart,
    Expect { what: What, text: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Maps,
    Status,
    Problems,
}

/// A scenario file.
#[derive(Clone, Debug)]
pub struct Scenario {
    path: PathBuf,
    /// Everything before the first section, as it stands.
    head: String,
    any_order: bool,
    node: String,
    addresses: BTreeMap<IpAddr, u32>,
    capacities: Capacities,
    /// Each with its title line.
    sections: Vec<(String, Section)>,
}

impl Scenario {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(path, &text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let (mut head, mut parts) = (String::new(), Vec::<(String, String)>::new());
        for line in text.split_inclusive('\n') {
            let title = line.trim_end().strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --"));
            match (title, parts.last_mut()) {
                (Some(title), _) => parts.push((title.to_owned(), String::new())),
                (None, Some((_, body))) => body.push_str(line),
                (None, None) => head.push_str(line),
            }
        }
        let (mut any_order, mut node, mut capacities) = (false, "node-a".to_owned(), Capacities::default());
        let mut addresses = BTreeMap::new();
        for line in head.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match line.split_once(' ').unwrap_or((line, "")) {
                ("any-order", "") => any_order = true,
                ("no-ipv6", "") => capacities.ipv6 = false,
                ("node", name) => name.clone_into(&mut node),
                ("addresses", list) => addresses = node_addresses(list)?,
                ("capacity", list) => set_capacities(&mut capacities, list)?,
                _ => bail!("{line:?} is no setting; see the table in tests/src/scenario.rs"),
            }
        }
        let sections = parts.into_iter().map(|(title, body)| Ok((title.clone(), section(&title, body)?)));
        let sections = sections.collect::<Result<_>>()?;
        Ok(Self { path: path.to_owned(), head, any_order, node, addresses, capacities, sections })
    }

    /// Carries it out, in every order that it asks for. Returns the number of runs.
    pub fn run<M: Maps>(&self, maps: &M) -> Result<usize> {
        let plain = self.play(maps, &self.sections, Pace::Steps)?;
        if std::env::var_os("FAIRLEAD_BLESS").is_some_and(|bless| bless == "1") {
            self.bless(&plain)?;
        } else {
            self.compare(&plain, "as written")?;
        }
        let blessed = Self::load(&self.path)?;
        let mut runs = 1;
        if self.any_order {
            for (number, sections) in blessed.orders().into_iter().enumerate() {
                for pace in [Pace::Steps, Pace::AtOnce] {
                    let results = blessed.play(maps, &sections, pace)?;
                    blessed.compare(&results, &format!("order {number}, {pace:?}: {}", titles(&sections)))?;
                    runs += 1;
                }
            }
        }
        Ok(runs)
    }

    /// The sections with the files of each group in every order. Groups are permuted together.
    fn orders(&self) -> Vec<Vec<(String, Section)>> {
        let file = |section: &Section| matches!(section, Section::Write { .. } | Section::Remove { .. });
        let groups: Vec<_> = self.sections.chunk_by(|a, b| file(&a.1) && file(&b.1)).collect();
        let longest = groups.iter().map(|group| group.len()).max().unwrap_or(0).min(MOST_PERMUTED);
        let orders = (1..=longest).product::<usize>();
        let permuted = |number| groups.iter().flat_map(|group| permute(group, number)).collect();
        (0..orders).map(permuted).collect()
    }

    fn play<M: Maps>(&self, maps: &M, sections: &[(String, Section)], pace: Pace) -> Result<Vec<String>> {
        let mut run = Run::start(maps, self)?;
        let mut results = Vec::new();
        let mut sections = sections.iter().peekable();
        while let Some((title, section)) = sections.next() {
            match section {
                Section::Write { file, text } => run.file(file, Read::Text(text.clone())),
                Section::Remove { file } => run.file(file, Read::Gone),
                Section::Wait(time) => run.pass(*time),
                Section::Restart => run = run.restart()?,
                Section::Expect { what, .. } => {
                    if self.any_order {
                        (0..3).for_each(|_| run.pass(QUIET));
                    }
                    results.push(run.result(*what).with_context(|| title.clone())?);
                }
            }
            let next_is_file =
                sections.peek().is_some_and(|(_, s)| matches!(s, Section::Write { .. } | Section::Remove { .. }));
            if pace == Pace::Steps || !next_is_file {
                run.step();
            }
        }
        maps.check(run.sync.dataplane())?;
        Ok(results)
    }

    fn compare(&self, results: &[String], how: &str) -> Result<()> {
        let expected = self.sections.iter().filter_map(|(title, section)| match section {
            Section::Expect { text, .. } => Some((title, text)),
            _ => None,
        });
        for (number, ((title, text), result)) in expected.zip(results).enumerate() {
            let (text, result) = (text.trim_end(), result.trim_end());
            ensure!(
                text == result,
                "{} ({how}): section {title:?} (expectation {}) differs:\n{}\nFAIRLEAD_BLESS=1 accepts what came out",
                self.path.display(),
                number + 1,
                difference(text, result)
            );
        }
        Ok(())
    }

    fn bless(&self, results: &[String]) -> Result<()> {
        let (mut text, mut results) = (self.head.clone(), results.iter());
        for (title, section) in &self.sections {
            _ = writeln!(text, "-- {title} --");
            match section {
                Section::Write { text: body, .. } => text.push_str(body),
                Section::Expect { .. } => {
                    let result = results.next().map_or("", |result| result.trim_end());
                    if !result.is_empty() {
                        _ = writeln!(text, "{result}");
                    }
                }
                Section::Remove { .. } | Section::Wait(_) | Section::Restart => {}
            }
        }
        std::fs::write(&self.path, text).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Addresses as the devices' task would have them.
fn node_addresses(list: &str) -> Result<BTreeMap<IpAddr, u32>> {
    let mut addresses = BTreeMap::<IpAddr, u32>::new();
    for addr in list.split_whitespace() {
        let addr: IpAddr = addr.parse().with_context(|| format!("{addr:?} is no address"))?;
        let first = addresses.keys().all(|other| other.is_ipv4() != addr.is_ipv4());
        addresses.insert(addr, NodeAddr::LOCAL | if first { NodeAddr::NODE_PORTS } else { 0 });
    }
    Ok(addresses)
}

fn set_capacities(capacities: &mut Capacities, list: &str) -> Result<()> {
    for setting in list.split_whitespace() {
        let (map, number) = setting.split_once('=').with_context(|| format!("{setting:?}: write MAP=N"))?;
        let size = match map {
            "services" => &mut capacities.services,
            "cluster-ips" => &mut capacities.cluster_ips,
            "ports" => &mut capacities.ports,
            "slots" => &mut capacities.slots,
            "endpoints" => &mut capacities.live,
            "source-ranges" => &mut capacities.source_ranges,
            _ => bail!("{map:?} is no map: services, cluster-ips, ports, slots, endpoints, source-ranges"),
        };
        *size = number.parse().with_context(|| format!("{number:?} is no number"))?;
    }
    Ok(())
}

fn section(title: &str, body: String) -> Result<Section> {
    let what = match title {
        "maps" => Some(What::Maps),
        "status" => Some(What::Status),
        "problems" => Some(What::Problems),
        _ => None,
    };
    if let Some(what) = what {
        return Ok(Section::Expect { what, text: body });
    }
    match title.split_once(' ').unwrap_or((title, "")) {
        ("restart", "") => Ok(Section::Restart),
        ("wait", secs) => Ok(Section::Wait(Duration::from_secs(secs.parse().context("wait SECONDS")?))),
        ("remove", file) if !file.is_empty() => Ok(Section::Remove { file: file.to_owned() }),
        (file, "") if file.contains('.') => Ok(Section::Write { file: file.to_owned(), text: body }),
        _ => bail!("{title:?} is no section; see the table in tests/src/scenario.rs"),
    }
}

/// When the agent takes notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// After each file.
    Steps,
    /// After each group of files.
    AtOnce,
}

/// The `number`-th order of a group, counted as Lehmer codes.
fn permute(group: &[(String, Section)], mut number: usize) -> Vec<(String, Section)> {
    let (mut rest, mut order): (VecDeque<_>, Vec<_>) = (group.iter().cloned().collect(), Vec::new());
    while !rest.is_empty() {
        let radix = rest.len().min(MOST_PERMUTED);
        let picked = rest.remove(number % radix);
        number /= radix;
        order.extend(picked);
    }
    order
}

fn titles(sections: &[(String, Section)]) -> String {
    sections.iter().map(|(title, _)| title.as_str()).collect::<Vec<_>>().join(", ")
}

/// Both texts line by line, marked where only one has the line.
fn difference(expected: &str, result: &str) -> String {
    let (expected, result): (Vec<_>, Vec<_>) = (expected.lines().collect(), result.lines().collect());
    // Longest common subsequence; scenarios are short.
    let mut common = vec![vec![0_usize; result.len() + 1]; expected.len() + 1];
    for i in (0..expected.len()).rev() {
        for j in (0..result.len()).rev() {
            common[i][j] = if expected[i] == result[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut text) = (0, 0, String::new());
    while i < expected.len() || j < result.len() {
        let (mark, line) = if i < expected.len() && j < result.len() && expected[i] == result[j] {
            (i, j) = (i + 1, j + 1);
            (' ', expected[i - 1])
        } else if j == result.len() || (i < expected.len() && common[i + 1][j] >= common[i][j + 1]) {
            i += 1;
            ('-', expected[i - 1])
        } else {
            j += 1;
            ('+', result[j - 1])
        };
        _ = writeln!(text, "  {mark} {line}");
    }
    text
}

/// A scenario under way.
struct Run<'a, M: Maps> {
    maps: &'a M,
    scenario: &'a Scenario,
    sync: Sync<M::Plane>,
    files: Files,
    texts: Vec<(String, String)>,
    problems: Vec<String>,
    now: Duration,
}

impl<'a, M: Maps> Run<'a, M> {
    fn start(maps: &'a M, scenario: &'a Scenario) -> Result<Self> {
        let plane = maps.empty(scenario.capacities)?;
        let mut run = Self::over(maps, scenario, plane, Duration::ZERO)?;
        run.first_lists(Vec::new());
        Ok(run)
    }

    fn over(maps: &'a M, scenario: &'a Scenario, plane: M::Plane, now: Duration) -> Result<Self> {
        let (sync, files) = (Sync::new(plane, now)?, Files::new(scenario.node.clone()));
        Ok(Self { maps, scenario, sync, files, texts: Vec::new(), problems: Vec::new(), now })
    }

    fn first_lists(&mut self, list: Vec<Event>) {
        Kind::ALL.into_iter().for_each(|kind| self.sync.take(Event::Init(kind)));
        for event in list {
            self.sync.take(match event {
                Event::Apply(object) => Event::InitApply(object),
                other => other,
            });
        }
        Kind::ALL.into_iter().for_each(|kind| self.sync.take(Event::InitDone(kind)));
        self.sync.take(Event::NodeAddrs(self.scenario.addresses.clone()));
        self.step();
    }

    fn file(&mut self, file: &str, read: Read) {
        self.texts.retain(|(name, _)| name != file);
        if let Read::Text(text) = &read {
            self.texts.push((file.to_owned(), text.clone()));
        }
        let outcome = self.files.read(OsStr::new(file), read);
        self.problems.extend(outcome.problems.into_iter().map(|problem| format!("{file}: {problem}")));
        outcome.events.into_iter().for_each(|event| self.sync.take(event));
    }

    fn step(&mut self) {
        self.sync.step(self.now);
        while let Some(grace) = self.sync.begin_grace() {
            self.sync.grace_over(grace());
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.step();
    }

    fn restart(self) -> Result<Self> {
        let plane = self.maps.reopen(self.sync.dataplane())?;
        let mut run = Self::over(self.maps, self.scenario, plane, self.now)?;
        run.problems = self.problems;
        let mut list = Vec::new();
        for (file, text) in &self.texts {
            list.extend(run.files.read(OsStr::new(file), Read::Text(text.clone())).events);
        }
        run.texts = self.texts;
        run.first_lists(list);
        Ok(run)
    }

    fn result(&mut self, what: What) -> Result<String> {
        Ok(match what {
            What::Maps => {
                let maps = self.maps.reopen(self.sync.dataplane())?.dump()?;
                render::render(&maps, Options::default())
            }
            What::Status => self.status(),
            What::Problems => {
                let mut problems = std::mem::take(&mut self.problems);
                if self.scenario.any_order {
                    problems.sort();
                }
                problems.join("\n")
            }
        })
    }

    fn status(&self) -> String {
        let mut text = String::new();
        for entry in self.sync.board().entries() {
            _ = writeln!(text, "{}", entry.subject);
            entry.error.iter().for_each(|error| _ = writeln!(text, "  failed: {error}"));
            entry.unserved.iter().for_each(|unserved| _ = writeln!(text, "  {unserved}"));
        }
        text
    }
}

/// The scenario files below a folder, by name.
pub fn all(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txtar"));
    paths.sort();
    ensure!(!paths.is_empty(), "no scenario (*.txtar) in {}", dir.display());
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_comes_once() {
        let group: Vec<_> = ["a.y", "b.y", "c.y", "d.y"]
            .map(|file| (file.to_owned(), Section::Remove { file: file.to_owned() }))
            .into();
        let orders: std::collections::BTreeSet<_> = (0..24).map(|number| titles(&permute(&group, number))).collect();
        assert_eq!(orders.len(), 24);
    }

    #[test]
    fn a_difference_shows_both_sides() {
        assert_eq!(difference("a\nb\nc", "a\nx\nc"), "    a\n  - b\n  + x\n    c\n");
    }

    #[test]
    fn what_is_no_section_is_an_error() {
        let error = Scenario::parse(Path::new("x"), "-- nonsense --\n").unwrap_err().to_string();
        assert!(error.contains("\"nonsense\" is no section"), "{error}");
        let error = Scenario::parse(Path::new("x"), "nonsense\n").unwrap_err().to_string();
        assert!(error.contains("\"nonsense\" is no setting"), "{error}");
    }
}
