//! Rules for `Cargo.toml` files.

use super::tree::Tree;

/// A lint that a crate does not inherit is a lint that does not exist.
pub(super) fn lints_are_inherited(tree: &Tree) -> Vec<String> {
    tree.manifests()
        .filter(|file| section(&file.text, "package").is_some())
        .filter(|file| !section(&file.text, "lints").is_some_and(|lines| lines.contains(&"workspace = true")))
        .map(|file| format!("{}: [lints] workspace = true is missing", file.path))
        .collect()
}

/// The ABI crate is compiled for the kernel too: `core`, and `aya`'s marker trait in user space.
pub(super) fn the_abi_depends_on_nothing(tree: &Tree) -> Vec<String> {
    let Some(file) = tree.get("proxy-common/Cargo.toml") else { return Vec::new() };
    section(&file.text, "dependencies")
        .unwrap_or_default()
        .into_iter()
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with("aya"))
        .map(|line| format!("{}: depends on more than aya: {line}", file.path))
        .collect()
}

/// The lines of a section; `None` where there is none.
fn section<'a>(text: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let heading = format!("[{name}]");
    let mut lines = text.lines().map(str::trim).skip_while(|line| *line != heading);
    lines.next()?;
    Some(lines.take_while(|line| !line.starts_with('[')).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_without_the_lints_is_found() {
        let tree = Tree::of(&[
            ("Cargo.toml", "[workspace]\nmembers = []\n"),
            ("good/Cargo.toml", "[package]\nname = \"good\"\n\n[lints]\nworkspace = true\n"),
            ("bad/Cargo.toml", "[package]\nname = \"bad\"\n\n[lints]\n\n[dependencies]\nworkspace = true\n"),
            ("worse/Cargo.toml", "[package]\nname = \"worse\"\n"),
        ]);
        let broken = lints_are_inherited(&tree);
        assert_eq!(broken.len(), 2);
        assert!(broken[0].starts_with("bad/") && broken[1].starts_with("worse/"), "{broken:?}");
    }

    #[test]
    fn a_dependency_of_the_abi_is_found() {
        let good = "[package]\nname = \"proxy-common\"\n[dependencies]\n# For Pod.\naya = { workspace = true, optional = true }\n";
        assert!(the_abi_depends_on_nothing(&Tree::of(&[("proxy-common/Cargo.toml", good)])).is_empty());
        let bad = format!("{good}serde.workspace = true\n[dev-dependencies]\nproptest.workspace = true\n");
        let broken = the_abi_depends_on_nothing(&Tree::of(&[("proxy-common/Cargo.toml", &bad)]));
        assert_eq!(broken, ["proxy-common/Cargo.toml: depends on more than aya: serde.workspace = true"]);
    }
}
