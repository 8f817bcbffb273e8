//! `setup`: everything that building and running needs and this machine lacks.
//!
//! Each item is probed first (a second run installs nothing and takes well under a second), and each says why it is needed.

use anyhow::{Result, bail};
use clap::Args as ClapArgs;

use crate::image::Arch;
use crate::{kernels, machine};

pub(crate) mod apt;
mod core;
mod linker;
mod musl;
mod tools;

/// Installs what is missing.
#[derive(ClapArgs, Debug)]
pub(crate) struct Args {
    /// Only report what is here and what is missing; exit 1 if anything is.
    #[arg(long)]
    check: bool,
    /// Also the formatter and the linter that `lint` runs.
    #[arg(long)]
    lint: bool,
    /// Also Go, which builds the control plane of the cluster tier and the CNIs' plugins of the matrix tier.
    #[arg(long)]
    go: bool,
    /// Also qemu, and the kernels that the kernels tier boots.
    #[arg(long)]
    kernels: bool,
}

impl Args {
    /// What CI needs.
    pub(crate) const fn for_ci() -> Self {
        Self { check: false, lint: true, go: true, kernels: true }
    }
}

/// What a command is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Compile the object and the agent.
    Build,
    /// Load programs and carry traffic between namespaces.
    Run,
    /// Check format and style.
    Lint,
    /// Compile a static agent.
    Image(Arch),
    /// Boot other kernels.
    Kernels,
}

/// What a probe found.
pub(crate) enum State {
    /// It is here: which one.
    Here(String),
    /// It is not here, and only some tier asks for it: which one.
    Optional(String),
    /// It is not here: what is missing.
    Missing(String),
}

impl State {
    fn missing(&self) -> Option<&str> {
        if let Self::Missing(absence) = self { Some(absence) } else { None }
    }
}

impl From<Result<String, String>> for State {
    fn from(found: Result<String, String>) -> Self {
        found.map_or_else(Self::Missing, Self::Here)
    }
}

/// One thing that setup looks after.
pub(crate) struct Item {
    /// What it is.
    pub(crate) name: String,
    /// Why it is needed.
    pub(crate) why: &'static str,
    pub(crate) state: State,
    /// Brings it here.
    pub(crate) install: fn() -> Result<()>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut items = core_items();
    items.extend(tools::items());
    if args.lint {
        items.extend(tools::lint_items());
    }
    items.push(tools::go(args.go));
    items.extend(kernels::items(args.kernels));
    let missing: Vec<&Item> = items.iter().filter(|item| item.state.missing().is_some()).collect();
    for item in &items {
        let (word, detail) = match &item.state {
            State::Here(found) => ("have", found),
            State::Optional(absence) => ("optional", absence),
            State::Missing(absence) => ("MISSING", absence),
        };
        println!("{word:<8} {:<15} {detail} - {}", item.name, item.why);
    }
    if args.check {
        if !missing.is_empty() {
            bail!("{} of {} items are missing; `./x setup` installs them", missing.len(), items.len());
        }
        println!("nothing is missing");
        return Ok(());
    }
    install(&missing)?;
    println!("setup: {}", if missing.is_empty() { "nothing to do" } else { "done" });
    Ok(())
}

fn items(need: Need) -> Vec<Item> {
    match need {
        Need::Build => core_items(),
        Need::Run => core_items().into_iter().chain(tools::items()).collect(),
        Need::Lint => tools::lint_items(),
        Need::Image(arch) => musl::items(arch),
        Need::Kernels => kernels::items(true),
    }
}

/// What is missing of what `need` requires; `None` where nothing is.
pub(crate) fn lacks(need: Need) -> Option<String> {
    items(need).iter().find_map(|item| item.state.missing().map(|absence| format!("{}: {absence}", item.name)))
}

/// Sets up what `need` requires, silently where nothing is missing.
pub(crate) fn ensure(need: Need) -> Result<()> {
    let items = items(need);
    let missing: Vec<&Item> = items.iter().filter(|item| item.state.missing().is_some()).collect();
    for item in &missing {
        let absence = item.state.missing().unwrap_or_default();
        println!("setup: {} is missing ({absence}): {}", item.name, item.why);
    }
    install(&missing)
}

/// What is missing for building the eBPF object; `None` where nothing is.
pub(crate) fn object_obstacle() -> Option<String> {
    core_items().iter().find_map(|item| item.state.missing().map(str::to_owned))
}

/// Why the cluster tier's server cannot be built here; `None` where it can.
pub(crate) fn go_missing() -> Option<String> {
    tools::go(true).state.missing().map(str::to_owned)
}

fn core_items() -> Vec<Item> {
    vec![core::item(), linker::item()]
}

/// All are tried, so that one run tells everything that is wrong.
fn install(missing: &[&Item]) -> Result<()> {
    let mut failures = Vec::new();
    // Items that come with one call (all tools of the system's packages) share their installer.
    let mut done: Vec<fn() -> Result<()>> = Vec::new();
    for item in missing {
        if done.iter().any(|&install| std::ptr::fn_addr_eq(install, item.install)) {
            continue;
        }
        done.push(item.install);
        if let Err(error) = (item.install)() {
            failures.push(format!("{}: {error:#}", item.name));
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    let hint = if machine::is_root() { "" } else { "\n  (not root: system packages cannot be installed)" };
    bail!("setup could not do everything:\n  {}{hint}", failures.join("\n  "))
}
