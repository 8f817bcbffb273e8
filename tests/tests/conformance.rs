//! The parity tables against what there is: their numbers, their page, the tests that they name, and whether those ran.
//!
//! `./x test` says in `FAIRLEAD_RAN` where each tier's results of this run stand. Without it only the names are checked.
//! That each test can fail is shown by `mutants.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fairlead_tests::conformance::{
    self, Case, Mutant, OF_CASE, OF_PITFALL, PAGE, PAGE_OF_PITFALLS, Pitfall, Rule, complaints, mutants_below,
    numbers_of,
};
use fairlead_tests::programs::{self, is_of};

/// Names the folder with a file for each tier that ran completely: one line for each test that passed.
const RAN: &str = "FAIRLEAD_RAN";

fn rules() -> Vec<Rule> {
    conformance::rules().unwrap_or_else(|error| panic!("{error:#}"))
}

fn cases() -> Vec<Case> {
    conformance::cases().unwrap_or_else(|error| panic!("{error:#}"))
}

fn pitfalls() -> Vec<Pitfall> {
    conformance::pitfalls().unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn every_rule_stands_there_once_and_in_order() {
    let rules = rules();
    let numbers: Vec<_> = rules.iter().map(|rule| rule.number.to_string()).collect();
    assert_eq!(numbers, conformance::numbers());
    let wrong: Vec<_> = rules.iter().flat_map(complaints).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_case_of_upstream_stands_there_once_and_in_order() {
    let cases = cases();
    let numbers: Vec<_> = cases.iter().map(|case| case.number).collect();
    assert_eq!(numbers, (1..=110).collect::<Vec<_>>());
    let silent: Vec<_> = cases.iter().filter(|case| case.shown.is_empty() && case.except.is_none()).collect();
    assert!(silent.is_empty(), "neither a test nor a reason: {silent:?}");
}

/// Each has a test, but for features that are not there yet; and those tests carry its number.
#[test]
fn every_pitfall_stands_there_once_and_in_order() {
    let pitfalls = pitfalls();
    let numbers: Vec<_> = pitfalls.iter().map(|pitfall| pitfall.number).collect();
    assert_eq!(numbers, (1..=18).collect::<Vec<_>>());
    for Pitfall { number, shown, except, .. } in &pitfalls {
        assert!(!shown.is_empty() || except.is_some(), "pitfall {number}: neither a test nor a reason");
        for name in shown {
            assert_eq!(numbers_of(name, OF_PITFALL), [*number], "{name}");
        }
    }
}

#[test]
fn the_pages_are_what_the_tables_say() {
    for (file, made) in
        [(PAGE, conformance::page(&rules(), &cases())), (PAGE_OF_PITFALLS, conformance::page_of_pitfalls(&pitfalls()))]
    {
        if std::env::var_os("FAIRLEAD_BLESS").is_some() {
            std::fs::write(file, &made).unwrap();
        }
        let page = std::fs::read_to_string(file).unwrap_or_default();
        for (number, (page, made)) in page.lines().zip(made.lines()).enumerate() {
            assert_eq!(page, made, "{file}, line {}; FAIRLEAD_BLESS=1 writes it", number + 1);
        }
        assert_eq!(page.lines().count(), made.lines().count(), "lines of {file} and of its tables");
    }
}

#[test]
fn every_test_of_the_tables_is_there_and_passed_where_its_tier_ran() {
    let programs = programs::build(&[], &[]).unwrap_or_else(|error| panic!("{error:#}"));
    let ran = std::env::var_os(RAN).map(PathBuf::from);
    if ran.is_none() {
        println!("{RAN} is not set: whether the tests passed is not looked at");
    }
    let cases = cases();
    let (mut wrong, mut passed) = (Vec::new(), 0);
    let of_rules = rules().into_iter().flat_map(|Rule { number, shown, .. }| {
        shown.into_keys().map(move |name| (format!("rule {number}"), name)).collect::<Vec<_>>()
    });
    let of_cases =
        cases.iter().flat_map(|case| case.shown.iter().map(|name| (format!("case {}", case.number), name.clone())));
    let pitfalls = pitfalls();
    let of_pitfalls = pitfalls.iter().flat_map(|Pitfall { number, shown, .. }| {
        shown.iter().map(move |name| (format!("pitfall {number}"), name.clone()))
    });
    for (whose, name) in of_rules.chain(of_cases).chain(of_pitfalls) {
        let Some((program, test)) = name.split_once(' ') else {
            wrong.push(format!("{whose}: {name:?} is no program and a test"));
            continue;
        };
        let Some(found) = programs.get(program).filter(|found| found.named(test).next().is_some()) else {
            wrong.push(format!("{whose}: there is no {name}"));
            continue;
        };
        let Some(results) = ran.as_deref().and_then(|dir| results(dir, found.tier)) else { continue };
        match found.named(test).find(|variant| !results.contains(*variant)) {
            Some(variant) => wrong.push(format!("{whose}: {program} {variant} did not pass in this run")),
            None => passed += 1,
        }
    }
    // And the other way round: a test of a case stands in the row of each number that it carries.
    for test in &programs["cluster"].tests {
        for number in numbers_of(test, OF_CASE) {
            let row = cases.iter().find(|case| case.number == number);
            if !row.is_some_and(|row| row.shown.iter().any(|name| name.strip_prefix("cluster ") == Some(test))) {
                wrong.push(format!("case {number} does not name cluster {test}"));
            }
        }
    }
    for (program, found) in &programs {
        for test in &found.tests {
            let named =
                |shown: &String| shown.split_once(' ').is_some_and(|(of, name)| of == *program && is_of(test, name));
            for number in numbers_of(test, OF_PITFALL) {
                if !pitfalls.iter().any(|pitfall| pitfall.number == number && pitfall.shown.iter().any(named)) {
                    wrong.push(format!("pitfall {number} does not name {program} {test}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{passed} tests of the tables passed in this run");
}

#[test]
fn the_name_of_a_test_says_which_cases_it_is_of() {
    let of_cases = |test| numbers_of(test, OF_CASE);
    assert_eq!(of_cases("upstream::traffic::e2e_10_56_to_58_70_every_one_of_3_clients"), [10, 56, 57, 58, 70]);
    assert_eq!(of_cases("upstream::edits::a_cluster_ip_is_kept_through_24_edits"), [0; 0]);
    assert_eq!(numbers_of("cluster_ip::pitfall_p1_17_a_pod_reaches_itself::bridge_plain", OF_PITFALL), [17]);
}

/// What passed in a tier; none if it did not run here.
fn results(dir: &Path, tier: &str) -> Option<BTreeSet<String>> {
    let text = std::fs::read_to_string(dir.join(tier)).ok()?;
    Some(text.lines().map(str::to_owned).collect())
}

#[test]
fn a_variant_is_of_its_case_and_of_no_other() {
    assert!(is_of("policy::a_case::tcp_v4", "policy::a_case") && is_of("policy::a_case", "policy::a_case"));
    assert!(!is_of("policy::a_case_more", "policy::a_case"));
}

#[test]
fn every_mutant_is_noticed_by_a_test_and_every_test_has_one_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut there = BTreeSet::new();
    for folder in ["proxy-agent/src", "proxy-ebpf/src"] {
        mutants_below(&root.join(folder), &mut there).unwrap_or_else(|error| panic!("{error:#}"));
    }
    let faults = conformance::faults().unwrap_or_else(|error| panic!("{error:#}"));
    let of_rules = rules().into_iter().flat_map(|rule| rule.shown.into_values());
    let named: BTreeSet<_> = of_rules.chain(faults.into_values()).filter_map(|Mutant(name)| name).collect();
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect::<Vec<_>>().join(", ");
    assert_eq!((only(&there, &named), only(&named, &there)), Default::default(), "not tried, and not there");
}
