//! Rules for single files.

use super::tree::{File, Tree};

/// The most lines of a source file; half of it is the aim.
const MOST_LINES: usize = 700;

/// What must not be left behind. Split, because this file is held to the rule too.
const UNDONE: [&str; 6] = [
    concat!("#[ig", "nore"),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("FIX", "ME"),
    concat!("TO", "DO"),
    concat!("X", "XX"),
];

/// Paths of somebody's machine, and papers that are not in the repository.
const FOREIGN: [&str; 8] = [
    concat!("/wo", "rk/"),
    concat!("/ho", "me/"),
    concat!("/Us", "ers/"),
    concat!("design", ".md"),
    concat!("style", ".md"),
    concat!("[P", "1."),
    concat!("[P", "2."),
    concat!("[P", "3."),
];

/// Files of others' making: lists of checksums and versions.
const GENERATED: [&str; 2] = ["Cargo.lock", "go.sum"];

/// Every module begins by saying what lives there.
pub(super) fn modules_say_what_they_hold(tree: &Tree) -> Vec<String> {
    tree.rust()
        .filter(|file| !file.text.starts_with("//! "))
        .map(|file| format!("{}:1: does not begin with `//!` and what lives there", file.path))
        .collect()
}

pub(super) fn files_are_short(tree: &Tree) -> Vec<String> {
    tree.rust()
        .map(|file| (file, file.text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .map(|(file, lines)| format!("{}: {lines} lines, {MOST_LINES} are the limit", file.path))
        .collect()
}

pub(super) fn nothing_is_left_undone(tree: &Tree) -> Vec<String> {
    tree.rust().flat_map(|file| occurrences(file, &UNDONE, "is left undone")).collect()
}

/// `foo.rs` beside `foo/`, so that tabs and search results show the module's name.
pub(super) fn modules_are_self_named(tree: &Tree) -> Vec<String> {
    tree.rust()
        .filter(|file| file.path.ends_with("/mod.rs"))
        .map(|file| format!("{}: name it after its folder, beside the folder", file.path))
        .collect()
}

/// Nothing refers to what a reader of the repository does not have.
pub(super) fn the_project_speaks_of_itself(tree: &Tree) -> Vec<String> {
    tree.all()
        .iter()
        .filter(|file| !GENERATED.iter().any(|name| file.path.ends_with(name)))
        .flat_map(|file| occurrences(file, &FOREIGN, "refers to something outside the repository"))
        .collect()
}

/// Relative links of the documents.
pub(super) fn links_lead_somewhere(tree: &Tree) -> Vec<String> {
    let mut broken = Vec::new();
    for file in tree.all().iter().filter(|file| file.path.ends_with(".md")) {
        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (number, line) in numbered(file) {
            for target in link_targets(line) {
                if !tree.has(&joined(folder, target)) {
                    broken.push(format!("{}:{number}: the link to {target} leads nowhere", file.path));
                }
            }
        }
    }
    broken
}

/// Targets of `[text](target)` that are paths, without their `#part`.
fn link_targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|target| !target.contains("://") && !target.starts_with("mailto:") && !target.starts_with('#'))
        .filter_map(|target| target.split('#').next())
}

/// `a/b` and `../c/./d` make `a/c/d`.
fn joined(folder: &str, target: &str) -> String {
    let mut parts: Vec<&str> = if target.starts_with('/') { Vec::new() } else { folder.split('/').collect() };
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts.join("/")
}

fn occurrences<'a>(file: &'a File, words: &'a [&str], complaint: &'a str) -> impl Iterator<Item = String> + use<'a> {
    numbered(file).flat_map(move |(number, line)| {
        let found = words.iter().filter(move |word| line.contains(**word));
        found.map(move |word| format!("{}:{number}: `{word}` {complaint}", file.path))
    })
}

fn numbered(file: &File) -> impl Iterator<Item = (usize, &str)> {
    file.text.lines().enumerate().map(|(index, line)| (index + 1, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: (&str, &str) = ("a/src/lib.rs", "//! What it holds.\n\nfn f() {}\n");

    #[test]
    fn a_module_without_its_heading_is_found() {
        let tree = Tree::of(&[GOOD, ("a/src/b.rs", "fn f() {}\n"), ("a/src/c.rs", "")]);
        assert_eq!(modules_say_what_they_hold(&tree).len(), 2);
    }

    #[test]
    fn a_long_file_is_found() {
        let longest = "//! Long.\n".repeat(MOST_LINES);
        assert!(files_are_short(&Tree::of(&[GOOD, ("a/src/b.rs", &longest)])).is_empty());
        let broken = files_are_short(&Tree::of(&[GOOD, ("a/src/b.rs", &format!("{longest}\n"))]));
        assert_eq!(broken, ["a/src/b.rs: 701 lines, 700 are the limit"]);
    }

    #[test]
    fn each_mark_of_unfinished_work_is_found() {
        assert!(nothing_is_left_undone(&Tree::of(&[GOOD])).is_empty());
        for mark in UNDONE {
            let text = format!("//! Holds it.\n\n{mark}\n");
            let broken = nothing_is_left_undone(&Tree::of(&[GOOD, ("a/src/b.rs", &text)]));
            assert_eq!(broken.len(), 1, "{mark}");
            assert!(broken[0].starts_with("a/src/b.rs:3: "), "{broken:?}");
        }
    }

    #[test]
    fn a_module_that_hides_its_name_is_found() {
        assert!(modules_are_self_named(&Tree::of(&[GOOD])).is_empty());
        assert_eq!(modules_are_self_named(&Tree::of(&[GOOD, ("a/src/b/mod.rs", "//! B.\n")])).len(), 1);
    }

    #[test]
    fn each_foreign_word_is_found_in_any_text_but_generated_lists() {
        for word in FOREIGN {
            let text = format!("see {word} there");
            assert_eq!(the_project_speaks_of_itself(&Tree::of(&[GOOD, ("docs/a.md", &text)])).len(), 1, "{word}");
            assert!(the_project_speaks_of_itself(&Tree::of(&[("x/go.sum", &text)])).is_empty());
        }
    }

    #[test]
    fn a_link_to_nothing_is_found() {
        let tree = Tree::of(&[
            ("README.md", "[a](docs/a.md#part) [b](https://example.org/x) [c](#here) [d](docs) [e](docs/no.md)"),
            ("docs/a.md", "[up](../README.md) [beside](./a.md) [gone](../../README)"),
        ]);
        let broken = links_lead_somewhere(&tree);
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken[0].contains("docs/no.md") && broken[1].contains("../../README"), "{broken:?}");
    }
}
