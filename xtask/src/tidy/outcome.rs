//! Each outcome code stands in the documents and in a packet test.

use proxy_common::Outcome;

use super::tree::Tree;

const DOCUMENT: &str = "docs/packet-path.md";
/// The packet tier: one file, or a folder of them.
const TESTS: [&str; 2] = ["tests/tests/packets.rs", "tests/tests/packets/"];

pub(super) fn every_code_is_documented(tree: &Tree) -> Vec<String> {
    let text = tree.get(DOCUMENT).map_or("", |file| file.text.as_str());
    let documented = |outcome: &Outcome| text.contains(&format!("`{}`", outcome.name()));
    let missing = Outcome::ALL.iter().filter(|outcome| !documented(outcome));
    missing.map(|outcome| format!("{DOCUMENT}: `{}` is not in it", outcome.name())).collect()
}

pub(super) fn every_code_is_tested(tree: &Tree) -> Vec<String> {
    let tests: Vec<&str> = tree
        .rust()
        .filter(|file| TESTS.iter().any(|place| file.path.starts_with(place)))
        .map(|file| file.text.as_str())
        .collect();
    let tested = |outcome: &Outcome| tests.iter().any(|text| mentions(text, &format!("Outcome::{outcome:?}")));
    let missing = Outcome::ALL.iter().filter(|outcome| !tested(outcome));
    missing.map(|outcome| format!("Outcome::{outcome:?} is in no packet test ({})", TESTS[1])).collect()
}

/// `Outcome::Request` is not mentioned by `Outcome::RequestNew`.
fn mentions(text: &str, name: &str) -> bool {
    text.match_indices(name).any(|(at, _)| !text[at + name.len()..].starts_with(|c: char| c.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_that_no_document_names_is_found() {
        let all: String = Outcome::ALL.iter().map(|outcome| format!("| `{}` |\n", outcome.name())).collect();
        assert!(every_code_is_documented(&Tree::of(&[(DOCUMENT, &all)])).is_empty());
        let without = all.replace("`request`", "request");
        let broken = every_code_is_documented(&Tree::of(&[(DOCUMENT, &without)]));
        assert_eq!(broken, ["docs/packet-path.md: `request` is not in it"]);
        assert_eq!(every_code_is_documented(&Tree::default()).len(), Outcome::ALL.len());
    }

    #[test]
    fn a_code_that_no_packet_test_names_is_found() {
        let all: String = Outcome::ALL.iter().map(|outcome| format!("expect(Outcome::{outcome:?});\n")).collect();
        assert!(every_code_is_tested(&Tree::of(&[("tests/tests/packets/all.rs", &all)])).is_empty());
        let without = all.replace("Outcome::Request)", "Outcome::RequestNew)");
        let broken = every_code_is_tested(&Tree::of(&[("tests/tests/packets/all.rs", &without)]));
        assert_eq!(broken.len(), 1, "{broken:?}");
        assert!(broken[0].starts_with("Outcome::Request is in no"), "{broken:?}");
        assert_eq!(every_code_is_tested(&Tree::of(&[("tests/tests/netns/all.rs", &all)])).len(), Outcome::ALL.len());
    }
}
