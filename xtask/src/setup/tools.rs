//! Programs that demo, tests and lints run.

use anyhow::{Context as _, Result, bail};

use super::{Item, State, apt};
use crate::machine;
use crate::process::Cmd;

/// A program, the packages that may bring it (the first one the distribution has is taken), and what uses it.
struct Tool {
    program: &'static str,
    packages: &'static [&'static str],
    why: &'static str,
}

const TOOLS: [Tool; 7] = [
    Tool { program: "ip", packages: &["iproute2"], why: "namespaces, veth pairs and routes of demo and tests" },
    Tool { program: "bpftool", packages: &["bpftool", "linux-tools-generic"], why: "shows what the maps hold" },
    Tool { program: "nft", packages: &["nftables"], why: "tests run beside netfilter's rules" },
    Tool { program: "conntrack", packages: &["conntrack"], why: "tests compare what netfilter tracks" },
    Tool {
        program: "tcpdump",
        packages: &["tcpdump"],
        why: "captures, for a person who looks into the demo's cluster",
    },
    Tool { program: "wg", packages: &["wireguard-tools"], why: "keys of the tests' WireGuard devices" },
    Tool { program: "ethtool", packages: &["ethtool"], why: "offloads of the tests' devices" },
];

/// The least Go that fetches the release which a module asks for by itself.
const OLDEST_GO: (u32, u32) = (1, 21);

pub(super) fn items() -> Vec<Item> {
    let mut items: Vec<Item> = TOOLS
        .iter()
        .map(|tool| Item {
            name: tool.program.into(),
            why: tool.why,
            state: machine::which(tool.program)
                .map(|path| path.display().to_string())
                .ok_or_else(|| format!("package {}", tool.packages[0]))
                .into(),
            install: install_tools,
        })
        .collect();
    items.push(bpffs());
    items
}

fn install_tools() -> Result<()> {
    let missing: Vec<&Tool> = TOOLS.iter().filter(|tool| machine::which(tool.program).is_none()).collect();
    if apt::usable().is_ok() && missing.iter().any(|tool| available(tool).is_none()) {
        apt::update();
    }
    let packages: Vec<&str> = missing.iter().map(|tool| available(tool).unwrap_or(tool.packages[0])).collect();
    apt::install(&packages)
}

fn available(tool: &Tool) -> Option<&'static str> {
    tool.packages.iter().copied().find(|package| apt::candidate(package).is_some())
}

/// Pins live in a BPF file system. systemd mounts it; containers and bare roots have none.
fn bpffs() -> Item {
    let state = if machine::bpffs_mounted() || !machine::is_root() {
        State::Here("/sys/fs/bpf".to_owned())
    } else {
        State::Missing("nothing is mounted at /sys/fs/bpf".to_owned())
    };
    Item { name: "bpf file system".into(), why: "maps and links are pinned there", state, install: mount_bpffs }
}

fn mount_bpffs() -> Result<()> {
    Cmd::new("mount")
        .args(["-t", "bpf", "bpf", "/sys/fs/bpf"])
        .run()
        .context("no BPF file system (is /sys mounted, and does the kernel have CONFIG_BPF_SYSCALL?)")
}

/// Go is asked for by one tier only: a machine without it is complete, unless `wanted`.
pub(super) fn go(wanted: bool) -> Item {
    let state = match go_version() {
        Some(version) if version >= OLDEST_GO => State::Here(format!("go {}.{}", version.0, version.1)),
        Some(version) => missing_go(wanted, format!("go {}.{} is too old", version.0, version.1)),
        None => missing_go(wanted, "no go".to_owned()),
    };
    Item {
        name: "go".into(),
        why: "optional: builds the control plane of the cluster tier and the CNIs' plugins of the matrix tier",
        state,
        install: install_go,
    }
}

fn missing_go(wanted: bool, absence: String) -> State {
    let absence = format!("{absence}; {}.{} or newer is needed", OLDEST_GO.0, OLDEST_GO.1);
    if wanted { State::Missing(absence) } else { State::Optional(format!("{absence} (`./x setup --go`)")) }
}

fn go_version() -> Option<(u32, u32)> {
    parse_go_version(&Cmd::new("go").arg("version").env("GOTOOLCHAIN", "local").probe()?)
}

fn parse_go_version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split_whitespace().nth(2)?.strip_prefix("go")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn install_go() -> Result<()> {
    if apt::usable().is_ok() {
        apt::update();
    }
    let version = apt::candidate("golang-go").unwrap_or_else(|| "none".to_owned());
    let found = parse_go_version(&format!("go version go{}", version.split(['~', '-']).next().unwrap_or_default()));
    if found.is_none_or(|found| found < OLDEST_GO) {
        bail!(
            "this distribution's golang-go is {version}, {}.{} or newer is needed: install Go from https://go.dev/dl, or on Debian 12 from its backports",
            OLDEST_GO.0,
            OLDEST_GO.1
        );
    }
    apt::install(&["golang-go"])
}

pub(super) fn lint_items() -> Vec<Item> {
    [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .map(|(subcommand, name)| Item {
            name: name.into(),
            why: "`./x lint` runs it",
            state: Cmd::cargo(subcommand)
                .arg("--version")
                .probe()
                .map(|said| said.trim().to_owned())
                .ok_or_else(|| format!("cargo {subcommand} does not run"))
                .into(),
            install: install_lint_tools,
        })
        .collect()
}

fn install_lint_tools() -> Result<()> {
    if std::env::var_os("RUSTUP_TOOLCHAIN").is_some() {
        return Cmd::new("rustup").args(["component", "add", "rustfmt", "clippy"]).run();
    }
    // The same family as the rustc in use: the tools link its libraries.
    let web = Cmd::new("dpkg-query").args(["-W", "rustc-web"]).probe().is_some();
    apt::install(if web { &["rustfmt-web", "rust-web-clippy"] } else { &["rustfmt", "rust-clippy"] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_says_its_version_in_several_ways() {
        assert_eq!(parse_go_version("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(parse_go_version("go version go1.19 linux/amd64"), Some((1, 19)));
        assert_eq!(parse_go_version("go version devel"), None);
    }

    #[test]
    fn go_is_optional_unless_it_is_asked_for() {
        assert!(matches!(missing_go(false, "no go".into()), State::Optional(said) if said.contains("setup --go")));
        assert!(matches!(missing_go(true, "no go".into()), State::Missing(_)));
    }
}
