//! Tests that cannot fail prove nothing: each test of the parity table must fail under the mutant that breaks its rule, and
//! so must those of `conformance/faults.yaml`, which guard rules of our own.
//!
//! One build of the test programs has every mutant of the agent and, in the object that it carries, of the programs
//! (feature `mutants`); `FAIRLEAD_MUTANT` chooses one. Needs root and the tools that build eBPF.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use fairlead_tests::conformance::{self, Shown};
use fairlead_tests::programs::{self, Program};

/// Names the mutant.
const VARIABLE: &str = "FAIRLEAD_MUTANT";
/// Programs whose tests are quick enough to be run once for each mutant.
const QUICK: [&str; 4] = ["agent", "common", "packets", "scenarios"];

/// A mutant, and a test that must notice it.
struct Case {
    mutant: String,
    program: &'static str,
    /// The first variant stands for the others.
    test: String,
}

fn cases(programs: &BTreeMap<&'static str, Program>) -> Vec<Case> {
    let rules = conformance::rules().unwrap_or_else(|error| panic!("{error:#}"));
    let faults = conformance::faults().unwrap_or_else(|error| panic!("{error:#}"));
    let shown: Vec<Shown> = rules.into_iter().map(|rule| rule.shown).chain([faults]).collect();
    let pairs: BTreeSet<_> = shown.into_iter().flatten().filter_map(|(name, mutant)| Some((name, mutant.0?))).collect();
    let case = |(name, mutant): (String, String)| {
        let (program, test) = name.split_once(' ').unwrap_or_else(|| panic!("{name:?} is no program and a test"));
        let (program, found) =
            programs.get_key_value(program).unwrap_or_else(|| panic!("{program} is too slow for {mutant}"));
        let test = found.named(test).next().unwrap_or_else(|| panic!("there is no {name}")).clone();
        Case { mutant, program, test }
    };
    pairs.into_iter().map(case).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn run(program: &Program, tests: &[&str], mutant: Option<&str>) -> Output {
    let mut command = Command::new(&program.file);
    command.arg("--exact").args(tests).env_remove(VARIABLE).env("RUST_BACKTRACE", "0");
    command.envs(mutant.map(|mutant| (VARIABLE, mutant)));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("a test program runs")
}

#[test]
fn every_mutant_is_noticed_by_its_tests() {
    let programs = programs::build(&QUICK, &["--features", "proxy-agent/mutants"]).unwrap_or_else(|e| panic!("{e:#}"));
    let cases = cases(&programs);
    for (name, program) in &programs {
        let tests: BTreeSet<_> = cases.iter().filter(|case| case.program == *name).map(|case| &*case.test).collect();
        if !tests.is_empty() {
            let output = run(program, &Vec::from_iter(tests.iter().copied()), None);
            let said = said(&output);
            assert!(
                said.contains(&format!("running {} test", tests.len())),
                "{name} has not all of {tests:?}:\n{said}"
            );
            assert!(output.status.success(), "without any mutant, {name} fails:\n{said}");
            println!("{name}: {} tests pass without a mutant", tests.len());
        }
    }
    let (next, unnoticed, start) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Instant::now());
    // Each is a process of its own, with a namespace of its own; loading programs is the verifier's time.
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(Case { mutant, program, test }) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let output = run(&programs[program], &[test], Some(mutant));
                    let said = said(&output);
                    let complaint = if output.status.success() {
                        Some("passes".to_owned())
                    } else if said.contains("cannot load") {
                        // Programs that do not load show nothing about the test.
                        Some(format!("does not load its programs:\n{said}"))
                    } else {
                        None
                    };
                    let complaint = complaint.map(|what| format!("with {mutant}, {program} {test} {what}"));
                    unnoticed.lock().expect("no worker panics").extend(complaint);
                }
            });
        }
    });
    let unnoticed = unnoticed.into_inner().expect("no worker panics");
    assert!(unnoticed.is_empty(), "{} of {}:\n{}", unnoticed.len(), cases.len(), unnoticed.join("\n"));
    println!("{} mutants and tests in {} s", cases.len(), start.elapsed().as_secs());
}

/// The debug build is loaded once in a while; it must load then.
#[test]
fn the_object_that_logs_works() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace");
    let target_dir: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let features: &[&str] = &["log"];
    let options = proxy_ebpf_build::Options {
        workspace,
        target_dir: &target_dir,
        features,
        opt_level: None,
        subcommand: "build",
    };
    let object = proxy_ebpf_build::build(&options).unwrap_or_else(|e| panic!("cannot build the object: {e}")).object;
    let packets = &programs::build(&["packets"], &[]).unwrap_or_else(|e| panic!("{e:#}"))["packets"];
    for family in ["tcp_v4", "udp_v6"] {
        let test =
            format!("flows::the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service::{family}");
        let output = Command::new(&packets.file)
            .args(["--exact", &test])
            .env("FAIRLEAD_EBPF_OBJECT", &object)
            .output()
            .expect("the packet tier runs");
        assert!(output.status.success() && said(&output).contains("running 1 test"), "{}", said(&output));
    }
}
