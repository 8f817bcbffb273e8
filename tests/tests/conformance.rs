//! The parity table against what there is: its numbers, its page, the tests that it names, and whether those ran.
//!
//! `./x test` says in `FAIRLEAD_RAN` where each tier's results of this run stand. Without it only the names are checked.
//! That each test can fail is shown by `mutants.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fairlead_tests::conformance::{self, Mutant, PAGE, Rule, complaints, mutants_below};
use fairlead_tests::programs::{self, is_of};

/// Names the folder with a file for each tier that ran completely: one line for each test that passed.
const RAN: &str = "FAIRLEAD_RAN";

fn rules() -> Vec<Rule> {
    conformance::rules().unwrap_or_else(|error| panic!("{error:#}"))
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
fn the_page_is_what_the_table_says() {
    let made = conformance::page(&rules());
    if std::env::var_os("FAIRLEAD_BLESS").is_some() {
        std::fs::write(PAGE, &made).unwrap();
    }
    let page = std::fs::read_to_string(PAGE).unwrap_or_default();
    for (number, (page, made)) in page.lines().zip(made.lines()).enumerate() {
        assert_eq!(page, made, "docs/kube-proxy-parity.md, line {}; FAIRLEAD_BLESS=1 writes it", number + 1);
    }
    assert_eq!(page.lines().count(), made.lines().count(), "lines of docs/kube-proxy-parity.md and of the table");
}

#[test]
fn every_test_of_the_table_is_there_and_passed_where_its_tier_ran() {
    let programs = programs::build(&[], &[]).unwrap_or_else(|error| panic!("{error:#}"));
    let ran = std::env::var_os(RAN).map(PathBuf::from);
    if ran.is_none() {
        println!("{RAN} is not set: whether the tests passed is not looked at");
    }
    let (mut wrong, mut passed) = (Vec::new(), 0);
    for rule in rules() {
        for name in rule.shown.keys() {
            let Some((program, test)) = name.split_once(' ') else {
                wrong.push(format!("rule {}: {name:?} is no program and a test", rule.number));
                continue;
            };
            let Some(found) = programs.get(program).filter(|found| found.named(test).next().is_some()) else {
                wrong.push(format!("rule {}: there is no {name}", rule.number));
                continue;
            };
            let Some(results) = ran.as_deref().and_then(|dir| results(dir, found.tier)) else { continue };
            match found.named(test).find(|variant| !results.contains(*variant)) {
                Some(variant) => {
                    wrong.push(format!("rule {}: {program} {variant} did not pass in this run", rule.number));
                }
                None => passed += 1,
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{passed} tests of the table passed in this run");
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
