//! The tiers: what each one needs, and the commands that run it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;

use super::ran;
use crate::image::Arch;
use crate::process::Cmd;
use crate::setup::{self, Need};
use crate::{kernels, machine, workspace};

/// Every test program of the workspace and the tier that runs it; `tidy` finds one that stands in no tier.
pub(crate) const TARGETS: [(Tier, &str); 10] = [
    (Tier::Packet, "packets"),
    (Tier::Packet, "object"),
    (Tier::Packet, "lookups"),
    (Tier::Scenario, "scenarios"),
    (Tier::Netns, "direct"),
    (Tier::Netns, "netns"),
    (Tier::Matrix, "matrix"),
    (Tier::Cluster, "cluster"),
    (Tier::Mutants, "mutants"),
    (Tier::Conformance, "conformance"),
];

/// Names an object that was built elsewhere; the agent's build script takes it.
const PREBUILT: &str = "FAIRLEAD_PREBUILT_EBPF";
/// Names a folder with the control plane, as Kubernetes' own test tools call it.
const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// Names the archive that the cluster tier runs the pods of `deploy/` from.
const IMAGE: &str = "FAIRLEAD_IMAGE";
/// What that folder must hold; envtest's own lacks the last two.
const CONTROL_PLANE: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-proxy"];

/// A tier of tests, from the one that needs nothing to the one that needs most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Pure logic, layouts, checksums, parsers. Needs nothing.
    Unit,
    /// Byte-exact packets through the loaded programs. Needs BPF.
    Packet,
    /// One fault at a time in the agent or the programs, which the tests of the tiers before must notice. Needs BPF, and
    /// minutes: runs by name and in CI.
    Mutants,
    /// Manifests in, contents of maps out. Needs nothing; with BPF it takes real maps too.
    Scenario,
    /// Real sockets between network namespaces. Needs root.
    Netns,
    /// How CNIs wire pods, times what netfilter does: every client, endpoint and address between two nodes. Needs root, Go
    /// for the CNIs' plugins, and minutes: runs by name and in CI.
    Matrix,
    /// The agent against a real control plane. Needs root, and Go or a folder with that (KUBEBUILDER_ASSETS).
    Cluster,
    /// The packet and netns tiers on other kernels, in qemu. Needs minutes, and without KVM hours: there it is a
    /// sample, unless --all is given. Runs by name and in CI.
    Kernels,
    /// The parity table: whether the tests that it names are there, and passed in the tiers that ran before. Needs
    /// nothing.
    Conformance,
}

impl Tier {
    pub(super) const ALL: [Self; 9] = [
        Self::Unit,
        Self::Packet,
        Self::Scenario,
        Self::Netns,
        Self::Matrix,
        Self::Cluster,
        Self::Mutants,
        Self::Kernels,
        // Last: it looks at what the others did.
        Self::Conformance,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Packet => "packet",
            Self::Mutants => "mutants",
            Self::Scenario => "scenario",
            Self::Netns => "netns",
            Self::Matrix => "matrix",
            Self::Cluster => "cluster",
            Self::Kernels => "kernels",
            Self::Conformance => "conformance",
        }
    }

    /// Does it run where no tier is named?
    pub(super) const fn by_default(self) -> bool {
        !matches!(self, Self::Matrix | Self::Mutants | Self::Kernels)
    }

    /// Why it cannot run here, and what would make it run.
    pub(super) fn obstacle(self) -> Option<String> {
        match self {
            Self::Unit | Self::Scenario | Self::Conformance => None,
            Self::Packet | Self::Mutants => object_missing().or_else(bpf_denied),
            Self::Netns => object_missing().or_else(bpf_denied).or_else(namespaces_denied),
            Self::Matrix => object_missing().or_else(bpf_denied).or_else(namespaces_denied).or_else(plugins_missing),
            Self::Cluster => {
                object_missing().or_else(bpf_denied).or_else(namespaces_denied).or_else(control_plane_missing)
            }
            // What the tests need is there; here only their programs are built.
            Self::Kernels => object_missing().or_else(kernels::obstacle),
        }
    }

    /// The calls of cargo that run it, each with the test program that it runs, if it is one: what that prints does not say
    /// which it is. `filter` goes to the test programs.
    pub(super) fn commands(self, filter: &[String]) -> Vec<(Cmd, &'static str)> {
        let test = |args: &[&str], threads: Option<u32>| {
            let mut cmd = workspace::cargo("test").arg("--no-fail-fast").args(args).arg("--").args(filter);
            if let Some(threads) = threads {
                cmd = cmd.arg(format!("--test-threads={threads}"));
            }
            without_object(cmd)
        };
        let targets = |threads| {
            let own = TARGETS.into_iter().filter(move |(tier, _)| *tier == self);
            own.map(move |(_, name)| (test(&["--test", name], threads), name))
        };
        let ebpf = || {
            let cmd =
                Cmd::cargo("test").args(["--locked", "--no-fail-fast", "--package", workspace::EBPF, "--lib", "--"]);
            cmd.args(filter).current_dir(&machine::root())
        };
        let programs = || (without_object(workspace::cargo("build").arg("--bins")), "");
        match self {
            Self::Unit => vec![(test(&["--lib", "--bins"], None), ""), (ebpf(), ""), (test(&["--doc"], None), "")],
            // Loading programs is mostly the verifier's time; more tests at once than processors gain nothing.
            Self::Packet | Self::Scenario => targets(None).collect(),
            // They build, and run tests on all processors.
            Self::Mutants => targets(Some(1)).collect(),
            // Cases measure times and share the machine's connection tracking: one at a time.
            Self::Netns => [programs()].into_iter().chain(targets(Some(1))).collect(),
            // Cases measure no times; one builds its nodes while the other's packets are on their way.
            Self::Matrix => [programs()].into_iter().chain(targets(Some(2))).collect(),
            // Cases mostly wait; those that measure see to it that they are alone. Each has at most half a gigabyte in use.
            Self::Cluster => {
                let image = image(filter);
                let tests = targets(Some(6)).map(|(cmd, name)| match &image {
                    Some((_, archive)) => (cmd.env(IMAGE, &archive.to_string_lossy()), name),
                    None => (cmd, name),
                });
                let tests: Vec<_> = tests.collect();
                let build = image.map(|(build, _)| (build, ""));
                [programs()].into_iter().chain(build).chain(tests).collect()
            }
            // What runs there is no command of cargo's: `super::kernels`.
            Self::Kernels => Vec::new(),
            Self::Conformance => {
                let ran = |(cmd, name): (Cmd, _)| (cmd.env(ran::VARIABLE, &ran::folder().to_string_lossy()), name);
                targets(None).map(ran).collect()
            }
        }
    }

    /// The most that CI gives each of its commands, compiling included; of the kernels, to each.
    pub(super) const fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Unit => 1800,
            Self::Packet | Self::Scenario | Self::Matrix | Self::Conformance => 900,
            Self::Netns | Self::Mutants | Self::Kernels => 2400,
            Self::Cluster => 1500,
        })
    }
}

/// Sets up what the tiers need. What cannot be installed is told, and shows again as an obstacle of the tiers it concerns.
pub(super) fn prepare(tiers: &[Tier]) -> Option<anyhow::Error> {
    let run = tiers.iter().any(|tier| !matches!(tier, Tier::Unit | Tier::Scenario | Tier::Conformance));
    let base = setup::ensure(if run { Need::Run } else { Need::Build }).err();
    let kernels = tiers.contains(&Tier::Kernels).then(|| setup::ensure(Need::Kernels).err()).flatten();
    base.or(kernels)
}

/// What makes the image, and where: for the cases that run it, and unless one is named. Where it cannot be made, they
/// run the plain program.
fn image(filter: &[String]) -> Option<(Cmd, PathBuf)> {
    let wanted = filter.is_empty() || filter.iter().any(|name| name.contains("deploy"));
    if !wanted || std::env::var_os(IMAGE).is_some() {
        return None;
    }
    if let Err(error) = setup::ensure(Need::Image(Arch::host())) {
        println!("test: the pods of deploy/ are run without their image, which cannot be made here: {error:#}");
        return None;
    }
    let archive = machine::target_dir().join("image").join("tests.tar");
    let cmd = Cmd::cargo("run").args(["--locked", "--quiet", "--package", "xtask", "--", "image", "--output"]);
    Some((cmd.arg(&archive).current_dir(&machine::root()), archive))
}

fn object_missing() -> Option<String> {
    if std::env::var_os(PREBUILT).is_some() {
        return None;
    }
    setup::object_obstacle()
        .map(|absence| format!("the eBPF object cannot be built: {absence}; `./x setup` as root installs it"))
}

fn bpf_denied() -> Option<String> {
    machine::bpf_denied()
        .map(|reason| format!("{reason}; run `./x test` as root, on a host or in a container that allows BPF"))
}

fn namespaces_denied() -> Option<String> {
    machine::namespaces_denied()
        .map(|reason| format!("{reason}; run `./x test` as root, outside of a container that forbids this"))
}

/// The plugins of the matrix tier are built with Go.
fn plugins_missing() -> Option<String> {
    setup::go_missing()
        .map(|reason| format!("{reason}: it builds the CNIs' plugins; `./x setup --go` tries to install it"))
}

/// The control plane of the cluster tier is built with Go, unless a folder with one is named.
fn control_plane_missing() -> Option<String> {
    if let Some(folder) = std::env::var_os(ASSETS) {
        return assets_incomplete(Path::new(&folder));
    }
    setup::go_missing().map(|reason| {
        format!(
            "{reason}: it builds the control plane; `./x setup --go` tries to install it, and {ASSETS} may name a \
             folder with {} instead",
            CONTROL_PLANE.join(", ")
        )
    })
}

fn assets_incomplete(folder: &Path) -> Option<String> {
    let missing: Vec<_> = CONTROL_PLANE.into_iter().filter(|name| !folder.join(name).is_file()).collect();
    let told = || {
        format!(
            "{ASSETS} is {}, which lacks {}: put there those of the same release, or unset it to build all with Go",
            folder.display(),
            missing.join(" and ")
        )
    };
    (!missing.is_empty()).then(told)
}

/// Where the object cannot be built, tests of pure logic still can be: the agent is compiled with an empty one.
fn without_object(cmd: Cmd) -> Cmd {
    if object_missing().is_none() {
        return cmd;
    }
    let [empty, flat] = ["no-object", "no-object-flat"].map(|name| machine::target_dir().join(name));
    let written = fs::create_dir_all(machine::target_dir()).and_then(|()| fs::write(&empty, ""));
    match written.and_then(|()| fs::write(flat, "")) {
        Ok(()) => cmd.env(PREBUILT, &empty.to_string_lossy()),
        Err(error) => {
            eprintln!("test: cannot write {}: {error}", empty.display());
            cmd
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_a_control_plane_takes_the_place_of_go() {
        let folder = std::env::temp_dir().join(format!("fairlead-assets-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for name in &CONTROL_PLANE[..2] {
            fs::write(folder.join(name), "").unwrap();
        }
        let incomplete = assets_incomplete(&folder);
        for name in &CONTROL_PLANE[2..] {
            fs::write(folder.join(name), "").unwrap();
        }
        let complete = assets_incomplete(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert!(incomplete.is_some_and(|reason| reason.contains("lacks kube-controller-manager and kube-proxy:")));
        assert_eq!(complete, None);
    }
}
