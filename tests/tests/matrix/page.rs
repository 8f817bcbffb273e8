//! `docs/cni-matrix.md`: what came of every topology, ours and kube-proxy's. Each test holds its own row against the page;
//! `FAIRLEAD_BLESS=1` writes it.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_tests::rules::Source;

use crate::{
    SHAPES,
    cells::{Cell, Failure, Fate, cells, client_name, endpoint_name, routes, way_name, ways},
    proxy::Kind,
    shape::{Filter, Topology},
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cni-matrix.md");
/// What the page says before its tables.
const INTRODUCTION: &str = include_str!("introduction.md");
/// With every mode of netfilter.
const ALWAYS: &str = "always";
/// A row that has not been run.
const NOT_RUN: &str = "not run";

/// What came of a topology with one of the two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    topology: String,
    count: String,
    otherwise: Vec<String>,
}

impl Row {
    pub(crate) fn new(topology: &Topology, cells: usize, failures: &[Failure]) -> Self {
        let count = match failures.len() {
            0 => format!("all {cells}"),
            failed => format!("{} of {cells}", cells - failed),
        };
        Self { topology: topology.name.to_owned(), count, otherwise: grouped(failures) }
    }
}

/// Failures by whom they are about, as lines.
fn grouped(failures: &[Failure]) -> Vec<String> {
    let mut lines: Vec<(String, Vec<&str>, Vec<String>)> = Vec::new();
    let mut by_way: Vec<(String, &str, Vec<String>)> = Vec::new();
    for Failure { cell, what, .. } in failures {
        let (pair, way, combo) = parts(cell);
        let pair = format!("{pair}: {what}");
        match by_way.iter_mut().find(|(known, other, _)| *known == pair && *other == way) {
            Some((_, _, combos)) => combos.push(combo),
            None => by_way.push((pair, way, vec![combo])),
        }
    }
    for (pair, way, combos) in by_way {
        match lines.iter_mut().find(|(known, _, others)| *known == pair && *others == combos) {
            Some((_, ways, _)) => ways.push(way),
            None => lines.push((pair, vec![way], combos)),
        }
    }
    let shown = |(pair, ways, combos): (String, Vec<&str>, Vec<String>)| {
        let combos = if combos.len() == 4 { String::new() } else { format!(" ({})", combos.join(", ")) };
        format!("{pair} by {}{combos}", ways.join("; "))
    };
    lines.into_iter().map(shown).collect()
}

fn parts(cell: &Cell) -> (String, &'static str, String) {
    let route = cell.route;
    let pair = format!("{} → {}", client_name(route.client), endpoint_name(route.client, route.endpoint));
    let combo = format!("{}/IPv{}", cell.proto, if cell.v6 { 6 } else { 4 });
    (pair, way_name(route.address, route.policy), combo)
}

/// What the page holds of one topology.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    count: [String; 2],
    otherwise: [Vec<String>; 2],
}

type Entries = BTreeMap<String, Entry>;

/// Both, in the order of the page's columns.
const KINDS: [Kind; 2] = [Kind::Fairlead, Kind::KubeProxy];

fn place(kind: Kind) -> usize {
    KINDS.iter().position(|one| *one == kind).unwrap_or_default()
}

/// Two topologies may come to their ends at the same time.
static WRITING: Mutex<()> = Mutex::new(());

/// Holds a row against the page, or writes it there.
pub(crate) fn hold(kind: Kind, row: &Row) -> Result<()> {
    if !is_blessing() {
        return compare(kind, row);
    }
    let _one = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut entries = read(&fs::read_to_string(PAGE).unwrap_or_default());
    let (entry, at) = (entries.entry(row.topology.clone()).or_default(), place(kind));
    entry.count[at] = row.count.clone();
    entry.otherwise[at] = row.otherwise.clone();
    fs::write(PAGE, render(&entries)).context(PAGE)
}

/// Holds a row against the page.
pub(crate) fn compare(kind: Kind, row: &Row) -> Result<()> {
    let _one = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let Entry { count, otherwise } =
        read(&fs::read_to_string(PAGE).context(PAGE)?).remove(&row.topology).unwrap_or_default();
    let (at, topology) = (place(kind), row.topology.clone());
    let page = Row { topology, count: count[at].clone(), otherwise: otherwise[at].clone() };
    let lines = |row: &Row| format!("{}\n{}", row.count, row.otherwise.join("\n"));
    ensure!(
        page == *row,
        "{PAGE} says of {}:\n{}\nand it came:\n{}\n(FAIRLEAD_BLESS=1 writes it)",
        kind.name(),
        lines(&page),
        lines(row)
    );
    Ok(())
}

fn is_blessing() -> bool {
    std::env::var_os("FAIRLEAD_BLESS").is_some()
}

/// The names of all topologies, in their order.
fn topologies() -> impl Iterator<Item = String> {
    SHAPES.iter().flat_map(|(shape, _)| Filter::ALL.map(|filter| format!("{shape}::{}", filter.name())))
}

/// Reads the rows of a page.
fn read(page: &str) -> Entries {
    let mut entries = Entries::new();
    for line in page.lines() {
        if let Some(row) = line.strip_prefix("| `") {
            let cells: Vec<_> = row.trim_end_matches(" |").split(" | ").collect();
            if let [name, ours, theirs] = cells[..] {
                let entry = entries.entry(name.trim_end_matches('`').to_owned()).or_default();
                entry.count = [ours.to_owned(), theirs.to_owned()];
            }
        } else if let Some((shape, rest)) = line.strip_prefix("* `").and_then(|rest| rest.split_once("`, "))
            && let Some((whose, what)) = rest.split_once(": ")
            && let Some((kind, filters)) = whose.split_once(", ")
            && let Some(at) = KINDS.iter().position(|one| one.name() == kind)
        {
            let always = Filter::ALL.map(Filter::name).join(" ");
            for filter in (if filters == ALWAYS { &always } else { filters }).split(' ') {
                let entry = entries.entry(format!("{shape}::{filter}")).or_default();
                entry.otherwise[at].push(what.to_owned());
            }
        }
    }
    entries
}

fn render(entries: &Entries) -> String {
    let mut text = INTRODUCTION.to_owned();
    text += "\n## What the rules say\n\nWhat the endpoint sees of the client: its own address, that of the *node*, or that of the *Service*; or why\n\
             nothing comes.\n\n| client | endpoint |";
    let ways = ways();
    for (address, policy) in ways {
        text += &format!(" {} |", way_name(address, policy));
    }
    text += &format!("\n|---|---|{}\n", "---|".repeat(ways.len()));
    let routes: Vec<_> = routes().collect();
    for row in routes.chunks(ways.len()) {
        let (client, endpoint) = (row[0].client, row[0].endpoint);
        text += &format!("| {} | {} |", client_name(client), endpoint_name(client, endpoint));
        for route in row {
            let [ours, theirs] = KINDS.map(|kind| shown(route.fate(kind)));
            let cell = if ours == theirs { ours.to_owned() } else { format!("{ours} (kube-proxy: {theirs})") };
            text += &format!(" {cell} |");
        }
        text += "\n";
    }
    text +=
        "\n## What came\n\nCells that came as the rules say.\n\n| topology | Fairlead | kube-proxy |\n|---|---|---|\n";
    let none = Entry::default();
    for name in topologies() {
        let entry = entries.get(&name).unwrap_or(&none);
        let [ours, theirs] = entry.count.each_ref().map(|count| if count.is_empty() { NOT_RUN } else { count });
        text += &format!("| `{name}` | {ours} | {theirs} |\n");
    }
    text += "\n## Where it came otherwise\n\n";
    text += "With which modes of netfilter; cells of both families and transports, where none are named:\n\n";
    for (shape, _) in SHAPES {
        for (at, kind) in KINDS.into_iter().enumerate() {
            let lines =
                |filter: Filter| entries.get(&format!("{shape}::{}", filter.name())).map(|entry| &entry.otherwise[at]);
            let mut told: Vec<&String> = Vec::new();
            for line in Filter::ALL.into_iter().filter_map(lines).flatten() {
                if told.contains(&line) {
                    continue;
                }
                told.push(line);
                let with = Filter::ALL.into_iter().filter(|one| lines(*one).is_some_and(|lines| lines.contains(line)));
                let with: Vec<_> = with.map(Filter::name).collect();
                let with = if with.len() == Filter::ALL.len() { ALWAYS.to_owned() } else { with.join(" ") };
                text += &format!("* `{shape}`, {}, {}: {line}\n", kind.name(), with);
            }
        }
    }
    text
}

const fn shown(fate: Fate) -> &'static str {
    match fate {
        Fate::Answered(Source::Client) => "own",
        Fate::Answered(Source::Egress(_)) => "*node*",
        Fate::Answered(Source::Service) => "*Service*",
        Fate::Refused => "refused",
        Fate::Silent(why) => why,
    }
}

/// What is not measured: the texts, the table of the rules, the list of topologies.
#[test]
fn the_page_is_made_of_its_rows() {
    let page = fs::read_to_string(PAGE).unwrap_or_default();
    let rendered = render(&read(&page));
    if is_blessing() {
        fs::write(PAGE, &rendered).expect("the page can be written");
    } else {
        assert!(page == rendered, "{PAGE} is not what its rows and the rules render to; FAIRLEAD_BLESS=1 writes it");
    }
}

/// The rule that this tier is for: every cell comes as the rules say. Every topology has been run with both.
#[test]
fn what_kube_proxy_passes_fairlead_passes() {
    let (entries, cells) = (read(&fs::read_to_string(PAGE).unwrap_or_default()), cells().len());
    let topologies: Vec<_> = topologies().collect();
    assert_eq!(entries.len(), topologies.len(), "topologies of the page");
    let all = format!("all {cells}");
    for name in topologies {
        let Entry { count: [ours, theirs], otherwise } =
            entries.get(&name).unwrap_or_else(|| panic!("{name} is not on the page"));
        assert_eq!((ours, otherwise[0].len()), (&all, 0), "{name}");
        let some = theirs.ends_with(&format!(" of {cells}"));
        assert_eq!((*theirs == all, some), (otherwise[1].is_empty(), !otherwise[1].is_empty()), "{name}: {theirs}");
    }
}
