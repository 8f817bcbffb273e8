//! Every source file belongs to a program: one that no `mod` names is neither compiled nor tested.

use std::collections::BTreeSet;

use super::tree::{File, Tree};
use crate::test::TARGETS;

pub(super) fn every_file_is_compiled(tree: &Tree) -> Vec<String> {
    let folders = packages(tree);
    // (file, is it the root of a program?)
    let mut queue: Vec<(&File, bool)> =
        tree.rust().filter(|file| is_program(tree, &folders, file)).map(|file| (file, true)).collect();
    let mut reached: BTreeSet<&str> = queue.iter().map(|(file, _)| file.path.as_str()).collect();
    while let Some((file, root)) = queue.pop() {
        for path in modules(file, root) {
            if let Some(found) = tree.get(&path)
                && reached.insert(&found.path)
            {
                queue.push((found, false));
            }
        }
    }
    tree.rust()
        .filter(|file| !reached.contains(file.path.as_str()))
        .map(|file| format!("{}: no `mod` names it, so it is never compiled", file.path))
        .collect()
}

/// A test program that no tier runs is compiled, and never run.
pub(super) fn every_test_program_has_a_tier(tree: &Tree) -> Vec<String> {
    let folders = packages(tree);
    tree.rust()
        .filter(|file| is_program(tree, &folders, file))
        .filter_map(|file| {
            let inner = &file.path[package_of(&folders, file)?.len()..];
            let name = inner.strip_prefix("tests/")?;
            Some((file, name.strip_suffix("/main.rs").or_else(|| name.strip_suffix(".rs"))?))
        })
        .filter(|(_, name)| !TARGETS.iter().any(|(_, target)| target == name))
        .map(|(file, name)| format!("{}: no tier runs `{name}` (xtask/src/test/tier.rs lists them)", file.path))
        .collect()
}

/// Folders of packages, each with its `/`.
fn packages(tree: &Tree) -> Vec<&str> {
    tree.manifests()
        .filter(|file| file.text.lines().any(|line| line.trim() == "[package]"))
        .map(|file| file.path.strip_suffix("Cargo.toml").unwrap_or_default())
        .collect()
}

/// The folder of the package that a file belongs to: one below another takes its files with it.
fn package_of<'a>(folders: &[&'a str], file: &File) -> Option<&'a str> {
    folders.iter().copied().filter(|folder| file.path.starts_with(folder)).max_by_key(|folder| folder.len())
}

/// The files that cargo compiles by itself.
fn is_program(tree: &Tree, folders: &[&str], file: &File) -> bool {
    let Some(folder) = package_of(folders, file) else { return false };
    let inner = &file.path[folder.len()..];
    if matches!(inner, "build.rs" | "src/lib.rs" | "src/main.rs") {
        return true;
    }
    let by_folder = ["src/bin/", "tests/", "benches/", "examples/"].iter().any(|kind| {
        inner
            .strip_prefix(kind)
            .is_some_and(|rest| !rest.contains('/') || rest.matches('/').count() == 1 && rest.ends_with("/main.rs"))
    });
    let named = || {
        let path = format!("path = \"{inner}\"");
        tree.get(&format!("{folder}Cargo.toml")).is_some_and(|manifest| manifest.text.contains(&path))
    };
    by_folder || named()
}

/// The files that the modules of a file may live in.
fn modules(file: &File, root: bool) -> Vec<String> {
    let (folder, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
    let stem = name.strip_suffix(".rs").unwrap_or(name);
    let folder = if root { folder.to_owned() } else { format!("{folder}/{stem}") };
    file.text.lines().filter_map(declared).map(|module| format!("{folder}/{module}.rs")).collect()
}

/// `module` of a line `pub(crate) mod module;`.
fn declared(line: &str) -> Option<&str> {
    let line = line.trim().strip_suffix(';')?;
    let (visibility, module) = line.strip_prefix("mod ").map(|m| ("", m)).or_else(|| line.split_once(" mod "))?;
    let plain = module.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    (plain && (visibility.is_empty() || visibility.starts_with("pub"))).then_some(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGE: &str = "[package]\nname = \"a\"\n";

    #[test]
    fn a_file_that_no_module_names_is_found() {
        let tree = Tree::of(&[
            ("a/Cargo.toml", PACKAGE),
            ("a/build.rs", ""),
            ("a/src/lib.rs", "mod b;\npub(crate) mod c;\n// mod e;\n"),
            ("a/src/b.rs", "pub mod d;\n"),
            ("a/src/b/d.rs", ""),
            ("a/src/c.rs", ""),
            ("a/src/e.rs", ""),
            ("a/src/b/f.rs", ""),
        ]);
        let broken = every_file_is_compiled(&tree);
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken[0].starts_with("a/src/e.rs") && broken[1].starts_with("a/src/b/f.rs"), "{broken:?}");
    }

    #[test]
    fn programs_are_found_by_their_place_or_their_manifest() {
        let manifest = format!("{PACKAGE}[[bin]]\nname = \"a\"\npath = \"src/other.rs\"\n");
        let tree = Tree::of(&[
            ("a/Cargo.toml", &manifest),
            ("a/src/other.rs", ""),
            ("a/src/bin/one.rs", ""),
            ("a/tests/two.rs", ""),
            ("a/tests/three/main.rs", "mod four;\n"),
            ("a/tests/three/four.rs", ""),
            ("a/tests/three/five.rs", ""),
        ]);
        assert_eq!(
            every_file_is_compiled(&tree),
            ["a/tests/three/five.rs: no `mod` names it, so it is never compiled"]
        );
    }

    #[test]
    fn a_package_inside_another_is_its_own() {
        let tree = Tree::of(&[
            ("tests/Cargo.toml", PACKAGE),
            ("tests/src/lib.rs", ""),
            ("tests/lab/Cargo.toml", PACKAGE),
            ("tests/lab/src/lib.rs", "mod x;\n"),
            ("tests/lab/src/x.rs", ""),
        ]);
        assert!(every_file_is_compiled(&tree).is_empty());
    }

    #[test]
    fn a_test_program_without_a_tier_is_found() {
        let tree = Tree::of(&[
            ("tests/Cargo.toml", PACKAGE),
            ("tests/tests/packets/main.rs", "mod flows;\n"),
            ("tests/tests/packets/flows.rs", ""),
            ("tests/tests/forgotten.rs", ""),
            ("tests/tests/lost/main.rs", ""),
        ]);
        let broken = every_test_program_has_a_tier(&tree);
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken[0].contains("`forgotten`") && broken[1].contains("`lost`"), "{broken:?}");
    }
}
