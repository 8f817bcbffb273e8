//! The tables of `tests/conformance`: kube-proxy's rules and upstream's cases, and the parity page that is made of them;
//! pitfalls, and theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// The table's source.
pub const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conformance/rules.yaml");
/// Upstream's end-to-end cases.
pub const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conformance/e2e.yaml");
/// What breaks real traffic.
pub const PITFALLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conformance/pitfalls.yaml");
/// Mutants that break no rule of kube-proxy's, but one of our own.
pub const FAULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conformance/faults.yaml");
/// The page.
pub const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kube-proxy-parity.md");
/// The page of the pitfalls.
pub const PAGE_OF_PITFALLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/pitfalls.md");
/// What it says before its table.
const OF_PITFALLS: &str = include_str!("../conformance/pitfalls.md");
/// What the page says before its tables.
const INTRODUCTION: &str = include_str!("../conformance/introduction.md");
/// What it says before the second one.
const OF_CASES: &str = "
## Every end-to-end case of Kubernetes

| case | upstream's file | upstream's name | shown by, or why not |
|---|---|---|---|
";

/// Tests, and the mutant that each notices.
pub type Shown = BTreeMap<String, Mutant>;

/// A rule of kube-proxy's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its number.
    #[serde(rename = "rule")]
    pub number: Number,
    /// The rule.
    pub says: String,
    /// Whether Fairlead does the same.
    pub fairlead: Parity,
    /// What it does instead, and why.
    pub because: Option<String>,
    /// By which tests.
    #[serde(default)]
    pub shown: Shown,
    /// Why no test has a mutant.
    #[serde(rename = "no mutant")]
    pub no_mutant: Option<String>,
}

/// A case of Kubernetes' own end-to-end tests.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Its number.
    #[serde(rename = "case")]
    pub number: u16,
    /// Upstream's file.
    #[serde(rename = "of")]
    pub file: String,
    /// Upstream's name of it.
    pub says: String,
    /// By which tests.
    #[serde(default)]
    pub shown: Vec<String>,
    /// What is not shown, or why nothing is.
    #[serde(rename = "but")]
    pub except: Option<String>,
}

/// Something that breaks real traffic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pitfall {
    /// Its number.
    #[serde(rename = "pitfall")]
    pub number: u16,
    /// What goes wrong.
    pub says: String,
    /// By which tests it is shown not to.
    #[serde(default)]
    pub shown: Vec<String>,
    /// What is not shown, or why nothing is.
    #[serde(rename = "but")]
    pub except: Option<String>,
}

/// 75, or 75b.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub enum Number {
    /// As a rule.
    Plain(u16),
    /// Put in later.
    Lettered(String),
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain(number) => number.fmt(f),
            Self::Lettered(text) => text.fmt(f),
        }
    }
}

/// Whether Fairlead does the same.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Parity {
    /// It does.
    #[serde(rename = "same")]
    Same,
    /// It does something else, and means it.
    #[serde(rename = "different")]
    Different,
    /// The rule is about something that it does not have.
    #[serde(rename = "not concerned")]
    NotConcerned,
    /// It will.
    #[serde(rename = "not yet")]
    NotYet,
}

/// The mutant that a test notices.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(from = "String")]
pub struct Mutant(pub Option<String>);

impl From<String> for Mutant {
    fn from(name: String) -> Self {
        Self(Some(name).filter(|name| name != "-"))
    }
}

/// A file that is read as YAML.
fn read<T: serde::de::DeserializeOwned>(file: &str) -> Result<T> {
    let text = std::fs::read_to_string(file).with_context(|| file.to_owned())?;
    serde_saphyr::from_str(&text).with_context(|| file.to_owned())
}

/// The rules, as they stand in the file.
pub fn rules() -> Result<Vec<Rule>> {
    read(RULES)
}

/// Upstream's cases, as they stand in the file.
pub fn cases() -> Result<Vec<Case>> {
    read(CASES)
}

/// The pitfalls, as they stand in the file.
pub fn pitfalls() -> Result<Vec<Pitfall>> {
    read(PITFALLS)
}

/// What the name of a test of upstream's cases begins with, and that of one of a pitfall.
pub const OF_CASE: &str = "e2e_";
/// The other one.
pub const OF_PITFALL: &str = "pitfall_p1_";

/// The numbers in the name of a test, or of the case that it is a variant of: `e2e_10_56_to_58_every_client` has four.
pub fn numbers_of(test: &str, prefix: &str) -> Vec<u16> {
    let Some(rest) = test.split("::").find_map(|name| name.strip_prefix(prefix)) else { return Vec::new() };
    let (mut numbers, mut range) = (Vec::new(), false);
    for word in rest.split('_') {
        match (word.parse::<u16>(), numbers.last()) {
            (Ok(number), Some(&first)) if range => numbers.extend(first + 1..=number),
            (Ok(number), _) => numbers.push(number),
            (Err(_), _) if word == "to" => {}
            (Err(_), _) => break,
        }
        range = word == "to";
    }
    numbers
}

/// Mutants that no rule speaks of, by test.
pub fn faults() -> Result<Shown> {
    read(FAULTS)
}

/// Every number that there must be, in order.
pub fn numbers() -> Vec<String> {
    let mut numbers: Vec<_> = (1..=129).map(|number: u16| number.to_string()).collect();
    numbers.insert(75, "75b".to_owned());
    numbers
}

/// What is wrong with a rule as it is written.
pub fn complaints(rule: &Rule) -> Vec<String> {
    let Rule { number, fairlead, because, shown, no_mutant, .. } = rule;
    let mutants = shown.values().filter(|mutant| mutant.0.is_some()).count();
    let (same, found) = (*fairlead == Parity::Same, mutants != 0);
    let checks = [
        (same == because.is_none(), "`because` belongs to every rule that is not the same, and to no other"),
        (found == no_mutant.is_none(), "`no mutant` belongs to every rule without one, and to no other"),
        (!shown.is_empty() || !matches!(fairlead, Parity::Same | Parity::Different), "no test shows it"),
    ];
    checks.iter().filter(|(holds, _)| !holds).map(|(_, what)| format!("rule {number}: {what}")).collect()
}

/// The page.
pub fn page(rules: &[Rule], cases: &[Case]) -> String {
    let mut page = INTRODUCTION.to_owned();
    for (parity, title) in [
        (Parity::Different, "Deliberate differences"),
        (Parity::NotYet, "Not there yet"),
        (Parity::NotConcerned, "What does not concern Fairlead"),
    ] {
        let of_it: Vec<_> = rules.iter().filter(|rule| rule.fairlead == parity).collect();
        if of_it.is_empty() {
            continue;
        }
        line(&mut page, format_args!("\n## {title}\n"));
        for Rule { number, says, because, .. } in of_it {
            let because = because.as_deref().unwrap_or_default();
            line(&mut page, format_args!("* **{number}.** kube-proxy: {says} Fairlead: {because}"));
        }
    }
    page.push_str("\n## Every rule\n\n| number | rule | Fairlead | shown by |\n|---|---|---|---|\n");
    for rule in rules {
        line(&mut page, format_args!("| {} | {} | {} | {} |", rule.number, rule.says, verdict(rule), tests(rule)));
    }
    page.push_str(OF_CASES);
    for Case { number, file, says, shown, except } in cases {
        let shown = told(shown, except.as_deref());
        line(&mut page, format_args!("| e2e {number} | {file} | {says} | {shown} |"));
    }
    page
}

/// The page of the pitfalls.
pub fn page_of_pitfalls(pitfalls: &[Pitfall]) -> String {
    let mut page = OF_PITFALLS.to_owned();
    for Pitfall { number, says, shown, except } in pitfalls {
        line(&mut page, format_args!("| {number} | {says} | {} |", told(shown, except.as_deref())));
    }
    page
}

/// Tests, and what they do not show.
fn told(shown: &[String], except: Option<&str>) -> String {
    let tests = shown.iter().map(|test| format!("`{test}`"));
    tests.chain(except.map(str::to_owned)).collect::<Vec<_>>().join("<br>")
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(page, "{text}").expect("a String takes it");
}

const fn verdict(rule: &Rule) -> &'static str {
    match rule.fairlead {
        Parity::Same => "same",
        Parity::Different => "deliberately different",
        Parity::NotConcerned => "not concerned",
        Parity::NotYet => "not yet",
    }
}

fn tests(rule: &Rule) -> String {
    let test = |(name, mutant): (&String, &Mutant)| match &mutant.0 {
        Some(mutant) => format!("`{name}` ({mutant})"),
        None => format!("`{name}`"),
    };
    let reason = rule.no_mutant.iter().map(|why| format!("no mutant: {why}"));
    rule.shown.iter().map(test).chain(reason).collect::<Vec<_>>().join("<br>")
}

/// Names in `mutant!("…")` below a folder of sources.
pub fn mutants_below(folder: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            mutants_below(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let names = text.split("mutant!(\"").skip(1).filter_map(|rest| rest.split_once('"'));
            found.extend(names.map(|(name, _)| name.to_owned()));
        }
    }
    Ok(())
}
