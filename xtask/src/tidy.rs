//! `tidy`: the repository's own rules, which no compiler and no linter knows. Also run as a unit test.
//!
//! Each rule is a function from the tree of sources to what breaks it, and each has a test with a sample that does.

use anyhow::{Result, bail};

use crate::machine;

mod boundary;
mod manifest;
mod outcome;
mod reach;
mod source;
mod tree;

use tree::Tree;

/// A rule: what breaks it, one line each.
type Rule = fn(&Tree) -> Vec<String>;

const RULES: [Rule; 14] = [
    manifest::lints_are_inherited,
    manifest::the_abi_depends_on_nothing,
    source::modules_say_what_they_hold,
    source::files_are_short,
    source::nothing_is_left_undone,
    source::modules_are_self_named,
    source::links_lead_somewhere,
    source::the_project_speaks_of_itself,
    reach::every_file_is_compiled,
    reach::every_test_program_has_a_tier,
    boundary::the_core_is_pure,
    boundary::unsafe_is_confined,
    outcome::every_code_is_documented,
    outcome::every_code_is_tested,
];

pub(crate) fn run() -> Result<()> {
    let broken = check(&Tree::load(&machine::root())?);
    for line in &broken {
        eprintln!("tidy: {line}");
    }
    if !broken.is_empty() {
        bail!("tidy: {} rules broken", broken.len());
    }
    println!("tidy: ok ({} rules)", RULES.len());
    Ok(())
}

fn check(tree: &Tree) -> Vec<String> {
    RULES.iter().flat_map(|rule| rule(tree)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        let broken = check(&Tree::load(&machine::root()).unwrap());
        assert!(broken.is_empty(), "\n{}", broken.join("\n"));
    }

    #[test]
    fn rules_find_nothing_in_an_empty_tree_but_missing_documents() {
        let broken = check(&Tree::default());
        assert!(
            broken.iter().all(|line| line.contains("docs/packet-path.md") || line.contains("packet test")),
            "{broken:?}"
        );
    }
}
