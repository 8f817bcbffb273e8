//! The kernels tier: the packet and netns tiers' programs, built here once and run on each other kernel.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_ebpf_build::Options;

use super::libtest::Counts;
use super::limited;
use super::report::{Row, Status};
use super::tier::{TARGETS, Tier};
use crate::kernels::qemu::{Accel, Guest, MARK, quoted};
use crate::kernels::{KERNELS, Kernel};
use crate::{machine, workspace};

/// Holds the object against a golden file, which no kernel changes, and compiles one of its own.
const NOT_THERE: &str = "lookups";

/// What an emulated processor does in some minutes: each outcome once, each kind of entry stored, and real sockets over
/// routed and bridged veths beside netfilter.
const SAMPLE: [&str; 12] = [
    "outcomes::",
    "handshake::what_ingress_translated_egress_leaves_alone::tcp",
    "headers::ip",
    "evictions::a_repeated_syn",
    "evictions::datagrams_make",
    "tuples::pitfall_p1_2_a_direct_packet_on_a_services_tuple_gets_another_port::tcp",
    "cluster_ip::a_pod_reaches_the_endpoints_on_its_node::bridge_nf_invalid_drop",
    "cluster_ip::a_pod_reaches_remote_endpoints::routed_conntrack",
    "cluster_ip::pitfall_p1_3_a_node_process_reaches_remote_endpoints::routed_conntrack",
    "node_port::rule_92_a_process_of_the_node_reaches_itself_by_its_node_port::routed_plain",
    "foreign::a_foreign_clsact",
    "wires::an_ipip_device",
];

/// The newest kernel has these, too: devices that this machine's own need not make, so that nobody else runs them.
const SAMPLE_OF_ONE: [&str; 5] =
    ["wires::a_bond", "wires::pods_behind_netkit", "wires::a_wireguard", "wires::a_geneve", "wires::an_ipvlan"];

/// A test program.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Program {
    name: &'static str,
    tier: Tier,
    file: PathBuf,
    /// Its package's folder, where cargo would run it.
    dir: PathBuf,
}

/// What a guest said that is not a test's output.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    /// Exit status of each program.
    ended: BTreeMap<String, i32>,
    /// The program that prints now.
    running: String,
    complaints: Vec<String>,
}

pub(super) fn run(filter: &[String], all: bool) -> Row {
    let start = Instant::now();
    let (mut counts, mut notes) = (Counts::default(), Vec::new());
    if let Err(error) = run_everywhere(filter, all, &mut counts, &mut notes) {
        counts.failed += 1;
        notes.push(format!("{error:#}"));
    }
    let status = if counts.failed == 0 { Status::Passed } else { Status::Failed };
    Row { tier: Tier::Kernels, status, counts, elapsed: start.elapsed(), notes }
}

fn run_everywhere(filter: &[String], all: bool, counts: &mut Counts, notes: &mut Vec<String>) -> Result<()> {
    let programs = build()?;
    let accel = Accel::find()?;
    let mut sampled = false;
    match &accel {
        Accel::Kvm => {}
        Accel::Tcg(reason) if all || !filter.is_empty() => notes.push(format!("emulated, slowly ({reason})")),
        Accel::Tcg(reason) => {
            sampled = true;
            notes.push(format!(
                "emulated ({reason}): a sample only; `./x test kernels --all` runs everything, for hours"
            ));
        }
    }
    for kernel in KERNELS {
        let mut own = Counts::default();
        let start = Instant::now();
        let filter = if sampled { sample(kernel) } else { filter.to_vec() };
        let result = run_on(kernel, &programs, &accel, &filter, &mut own);
        let seconds = start.elapsed().as_secs();
        let Counts { passed, failed, .. } = own;
        let release = kernel.unpacked().map_or_else(|| kernel.series.to_owned(), |found| found.release);
        notes.push(format!("Linux {release}: {passed} passed, {failed} failed in {seconds} s"));
        if let Err(error) = result {
            if failed == 0 {
                own.failed += 1;
            }
            notes.push(format!("Linux {}: {error:#}", kernel.series));
        }
        let names = own.failures.iter_mut().chain(own.reasons.iter_mut().map(|(name, _)| name));
        let names = names.chain(own.not_run.iter_mut().map(|(case, _)| &mut case.name));
        names.for_each(|name| *name = format!("{} {name}", kernel.series));
        counts.add(&own);
        counts.ran.append(&mut own.ran);
        counts.not_run.append(&mut own.not_run);
        counts.failures.append(&mut own.failures);
        counts.reasons.append(&mut own.reasons);
    }
    Ok(())
}

/// What a kernel runs of the tests where it is emulated.
fn sample(kernel: Kernel) -> Vec<String> {
    let newest = KERNELS.last().is_some_and(|last| last.series == kernel.series);
    let further: &[&str] = if newest { &SAMPLE_OF_ONE } else { &[] };
    SAMPLE.iter().chain(further).map(|name| (*name).to_owned()).collect()
}

/// Builds the test programs, and what they start.
fn build() -> Result<Vec<Program>> {
    workspace::cargo("build").arg("--bins").run()?;
    let targets: Vec<(Tier, &str)> = TARGETS
        .into_iter()
        .filter(|&(tier, name)| matches!(tier, Tier::Packet | Tier::Netns | Tier::Kernels) && name != NOT_THERE)
        .collect();
    let mut cmd = workspace::cargo("test").args(["--no-run", "--message-format=json"]);
    for (_, name) in &targets {
        cmd = cmd.args(["--test", name]);
    }
    eprintln!("+ {cmd}");
    let output = cmd.into_inner().stderr(Stdio::inherit()).output().context("cargo")?;
    ensure!(output.status.success(), "the test programs do not compile: see above");
    let messages = String::from_utf8_lossy(&output.stdout);
    targets
        .into_iter()
        .map(|(tier, name)| program(&messages, tier, name).with_context(|| format!("cargo built no {name}")))
        .collect()
}

/// The test program of a name among cargo's messages.
fn program(messages: &str, tier: Tier, name: &'static str) -> Option<Program> {
    messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).find_map(|message| {
        if message["target"]["name"] != name || message["profile"]["test"] != true {
            return None;
        }
        let file = message["executable"].as_str()?.into();
        let dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
        Some(Program { name, tier, file, dir })
    })
}

/// Boots the kernel and runs everything on it.
fn run_on(kernel: Kernel, programs: &[Program], accel: &Accel, filter: &[String], counts: &mut Counts) -> Result<()> {
    let unpacked = kernel.unpacked().context("it has not been fetched")?;
    println!("\n--- Linux {} ---", unpacked.release);
    let guest = Guest { kernel: unpacked, folder: kernel.folder(), accel: accel.clone(), append: "" };
    let command = guest.command(&script(programs, &other_build()?, filter)?)?;
    let (told, screen) = (&mut Told::default(), &mut std::io::stdout().lock());
    let result = stream(command, Tier::Kernels.limit(), |line| {
        told.read(line);
        counts.program = told.runs(programs);
        counts.read(line);
        writeln!(screen, "{line}")
    });
    if let Err(error) = result {
        bail!("{error:#}; the kernel's last words: {}", guest.last_words());
    }
    told.judge(programs).with_context(|| format!("the kernel's last words: {}", guest.last_words()))?;
    ensure!(counts.passed != 0 || !filter.is_empty(), "no test ran");
    Ok(())
}

/// The object of the same sources that agents are exchanged for, where the netns tier itself would build it: in cargo's
/// folder for tests.
fn other_build() -> Result<PathBuf> {
    let (root, dir) = (machine::root(), machine::target_dir().join("tmp/other-build"));
    let options =
        Options { workspace: &root, target_dir: &dir, features: &[], opt_level: Some("2"), subcommand: "build" };
    Ok(proxy_ebpf_build::build(&options).context("the other object")?.object)
}

/// The lines that `guest.sh` runs.
fn script(programs: &[Program], other_build: &Path, filter: &[String]) -> Result<String> {
    let mut script = format!("export FAIRLEAD_OTHER_BUILD={}\n", quoted(&other_build.to_string_lossy())?);
    for program in programs {
        // As in the tiers that they belong to: cases of netns measure times.
        let threads: &[&str] = if program.tier == Tier::Packet { &[] } else { &["--test-threads=1"] };
        let (dir, file) = (program.dir.to_string_lossy(), program.file.to_string_lossy());
        let mut words = vec!["run".to_owned(), program.name.to_owned(), quoted(&dir)?, quoted(&file)?];
        for word in filter.iter().map(String::as_str).chain(["--color=never"]).chain(threads.iter().copied()) {
            words.push(quoted(word)?);
        }
        script.push_str(&words.join(" "));
        script.push('\n');
    }
    Ok(script)
}

/// Runs a command and gives each line of its output away.
fn stream(command: Command, limit: Duration, mut each: impl FnMut(&str) -> std::io::Result<()>) -> Result<()> {
    let mut child = limited(command, limit).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("qemu")?;
    let stdout = child.stdout.take().context("its output was not piped")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("its output could not be read")?;
        each(String::from_utf8_lossy(&line).trim_end_matches('\r')).context("our own output is closed")?;
    }
    let status = child.wait().context("waiting for qemu")?;
    ensure!(status.success(), "qemu: {status}");
    Ok(())
}

impl Told {
    fn read(&mut self, line: &str) {
        // What a test leaves unfinished on its line stands before ours.
        let Some((_, said)) = line.split_once(MARK) else { return };
        let words: Vec<&str> = said.split_whitespace().collect();
        match words[..] {
            ["ended", name, status] => {
                self.ended.insert(name.to_owned(), status.parse().unwrap_or(-1));
            }
            ["kernel", _] => {}
            ["runs", name] => name.clone_into(&mut self.running),
            _ => self.complaints.push(said.to_owned()),
        }
    }

    /// The program that prints now.
    fn runs(&self, programs: &[Program]) -> &'static str {
        programs.iter().map(|program| program.name).find(|name| *name == self.running).unwrap_or_default()
    }

    /// Every program ran, and to its end.
    fn judge(&self, programs: &[Program]) -> Result<()> {
        let mut wrong = self.complaints.clone();
        for program in programs {
            match self.ended.get(program.name) {
                Some(0) => {}
                Some(status) => wrong.push(format!("{} ended with {status}", program.name)),
                None => wrong.push(format!("{} did not end", program.name)),
            }
        }
        if wrong.is_empty() { Ok(()) } else { bail!(wrong.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn packets() -> Program {
        Program { name: "packets", tier: Tier::Packet, file: "/t/packets-1".into(), dir: "/r/tests".into() }
    }

    #[test]
    fn a_test_program_is_found_among_cargos_messages() {
        let messages = r#"not json
{"reason":"compiler-artifact","manifest_path":"/r/tests/Cargo.toml","target":{"name":"packets"},"profile":{"test":false},"executable":null}
{"reason":"compiler-artifact","manifest_path":"/r/tests/Cargo.toml","target":{"name":"packets"},"profile":{"test":true},"executable":"/t/packets-1"}"#;
        assert_eq!(program(messages, Tier::Packet, "packets"), Some(packets()));
        assert_eq!(program(messages, Tier::Netns, "netns"), None);
    }

    #[test]
    fn a_program_gets_its_folder_and_the_filter() {
        let netns = Program { name: "netns", tier: Tier::Netns, ..packets() };
        assert_eq!(
            script(&[packets(), netns], Path::new("/o"), &["flows::".to_owned()]).unwrap(),
            "export FAIRLEAD_OTHER_BUILD='/o'\n\
             run packets '/r/tests' '/t/packets-1' 'flows::' '--color=never'\n\
             run netns '/r/tests' '/t/packets-1' 'flows::' '--color=never' '--test-threads=1'\n"
        );
    }

    #[test]
    fn a_guest_that_goes_away_has_failed() {
        let mut told = Told::default();
        told.read("test a ... ok");
        let error = told.judge(&[packets()]).unwrap_err().to_string();
        assert_eq!(error, "packets did not end");
        told.read("fairlead-guest: ended packets 101");
        assert_eq!(told.judge(&[packets()]).unwrap_err().to_string(), "packets ended with 101");
    }

    #[test]
    fn what_the_guest_lacks_is_told() {
        let mut told = Told::default();
        told.read("fairlead-guest: kernel 6.1.0-56-amd64");
        assert_eq!(told.runs(&[packets()]), "");
        told.read("fairlead-guest: runs packets");
        assert_eq!(told.runs(&[packets()]), "packets");
        told.read("test b ... fairlead-guest: ended packets 0");
        told.judge(&[packets()]).unwrap();
        told.read("fairlead-guest: modules are missing");
        assert_eq!(told.judge(&[packets()]).unwrap_err().to_string(), "modules are missing");
    }

    #[test]
    fn the_sample_names_tests_that_there_are() {
        let sources: String = ["packets", "netns"]
            .into_iter()
            .flat_map(|folder| fs::read_dir(machine::root().join("tests/tests").join(folder)).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| {
                let module = path.file_stem().unwrap().to_string_lossy().into_owned();
                format!("module {module}::\n{}", fs::read_to_string(path).unwrap())
            })
            .collect();
        for name in SAMPLE.into_iter().chain(SAMPLE_OF_ONE) {
            let mut parts = name.split("::").filter(|part| !part.is_empty());
            let module = parts.next().unwrap();
            assert!(sources.contains(&format!("module {module}::\n")), "no module {module} for {name}");
            assert!(parts.all(|part| part == "tcp" || sources.contains(part)), "no test for {name}");
        }
    }
}
