//! Rules about what may be used where.

use super::tree::{File, Tree};

/// Modules that decide: the same input gives the same output, on any machine, at any time.
const PURE: [&str; 4] = ["model", "index", "plan", "diff"];
/// What would tie them to a cluster, a kernel, a runtime, a clock or chance.
const IMPURE: [&str; 9] =
    ["kube::", "k8s_openapi::", "aya::", "tokio::", "Instant::now", "SystemTime", "rand::", "std::fs", "std::net::Tcp"];

/// Crates in which `unsafe` is the exception, and the files or folders that it is confined to. The programs in
/// `proxy-ebpf` are not among them: there, every map and every helper is reached through it.
const SAFE: [&str; 3] = ["proxy-agent/", "proxy-common/", "xtask/"];
const UNSAFE: [&str; 3] = ["proxy-common/src/pod.rs", "proxy-agent/src/dataplane/", "proxy-agent/src/devices/"];

pub(super) fn the_core_is_pure(tree: &Tree) -> Vec<String> {
    let pure = |file: &&File| {
        file.path.strip_prefix("proxy-agent/src/").is_some_and(|inner| {
            PURE.iter()
                .any(|module| inner.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/')))
        })
    };
    let uses = |line: &str| IMPURE.iter().copied().find(|name| has_path(line, name));
    tree.rust().filter(pure).flat_map(|file| complaints(file, uses, "is not for modules that only decide")).collect()
}

pub(super) fn unsafe_is_confined(tree: &Tree) -> Vec<String> {
    let keyword = concat!("un", "safe");
    let forms = ["{", "fn", "impl", "extern", "trait"].map(|next| format!("{keyword} {next}"));
    let uses = |line: &str| forms.iter().any(|form| line.contains(form.as_str())).then_some(keyword);
    tree.rust()
        .filter(|file| SAFE.iter().any(|krate| file.path.starts_with(krate)))
        .filter(|file| !UNSAFE.iter().any(|place| file.path.starts_with(place)))
        .flat_map(|file| complaints(file, uses, "has its places, listed in xtask/src/tidy/boundary.rs"))
        .collect()
}

fn complaints<'a>(file: &File, uses: impl Fn(&str) -> Option<&'a str>, why: &str) -> Vec<String> {
    let code = file.text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
    code.filter_map(|(index, line)| uses(line).map(|name| format!("{}:{}: `{name}` {why}", file.path, index + 1)))
        .collect()
}

/// Does the name stand in the line as a path of its own, not as the end of a longer one?
fn has_path(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_impure_name_is_found_in_each_pure_module() {
        for module in PURE {
            for name in IMPURE {
                let text = format!("//! Pure.\n// {name} in a comment\nuse {name}Thing;\n");
                for path in [format!("proxy-agent/src/{module}.rs"), format!("proxy-agent/src/{module}/part.rs")] {
                    let broken = the_core_is_pure(&Tree::of(&[(&path, &text)]));
                    assert_eq!(broken.len(), 1, "{path} {name}");
                    assert!(broken[0].starts_with(&format!("{path}:3: ")), "{broken:?}");
                }
            }
        }
    }

    #[test]
    fn other_modules_and_longer_names_are_free() {
        let tree = Tree::of(&[
            ("proxy-agent/src/k8s/watch.rs", "use kube::Client;\n"),
            ("proxy-agent/src/planet.rs", "use tokio::spawn;\n"),
            ("proxy-agent/src/plan.rs", "use crate::operand::Thing;\nuse my_aya::x;\n"),
        ]);
        assert!(the_core_is_pure(&tree).is_empty());
    }

    #[test]
    fn unsafe_outside_of_its_places_is_found() {
        let block = concat!("    un", "safe { read(p) }\n");
        let tree = Tree::of(&[
            ("proxy-agent/src/plan.rs", block),
            ("proxy-common/src/pod.rs", concat!("un", "safe impl Pod for Key {}\n")),
            ("xtask/src/main.rs", concat!("// un", "safe { in a comment }\n")),
        ]);
        let broken = unsafe_is_confined(&tree);
        assert_eq!(broken.len(), 1, "{broken:?}");
        assert!(broken[0].starts_with("proxy-agent/src/plan.rs:1: "), "{broken:?}");
    }
}
