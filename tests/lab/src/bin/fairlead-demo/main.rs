//! `fairlead-demo`: a small cluster in network namespaces, served by eBPF, shown step by step.
//!
//! Every number comes from what servers and clients saw; nothing is assumed of the proxy but its Services' addresses.

mod cluster;
mod keep;
mod show;
mod steps;

use std::{
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail};
use fairlead_lab::{Shape, janitor};
use nix::sys::signal::{SigSet, Signal};

use crate::{cluster::Cluster, show::Screen};

const USAGE: &str = "\
Shows Fairlead at work: a node, pods and an external host in network namespaces, real TCP and UDP connections to
Services, balanced by eBPF programs in the running kernel. Needs root. Takes seconds, and leaves nothing behind.

Usage: fairlead-demo [--shape routed|bridge] [--keep]
       fairlead-demo ask HOST tcp|udp ADDRESS:PORT [COUNT]   with a kept cluster: HOST is client, node, ext or a pod
       fairlead-demo --clean

  --shape SHAPE   how pods are wired: routed veths (default), or ports of a bridge
  --keep          leave the cluster up to play with
  --clean         remove a cluster that was left up
  --help          this text";

/// What the command line asks for.
enum Task {
    Show { shape: Shape, keep: bool },
    Clean,
    Help,
    Serve(Vec<String>),
    Ask(Vec<String>),
}

fn main() -> ExitCode {
    let task = match parse(std::env::args().skip(1).collect()) {
        Ok(task) => task,
        Err(error) => {
            eprintln!("fairlead-demo: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match task {
        Task::Help => {
            println!("{USAGE}");
            Ok(())
        }
        Task::Clean => keep::clean(),
        Task::Serve(args) => keep::serve(&args),
        Task::Ask(args) => keep::ask(&args),
        Task::Show { shape, keep } => demo(shape, keep),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fairlead-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(args: Vec<String>) -> Result<Task> {
    match args.first().map(String::as_str) {
        Some("serve") => return Ok(Task::Serve(args[1..].to_vec())),
        Some("ask") => return Ok(Task::Ask(args[1..].to_vec())),
        _ => {}
    }
    let (mut shape, mut keep, mut clean) = (Shape::Routed, false, false);
    let mut words = args.into_iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--help" | "-h" => return Ok(Task::Help),
            "--keep" => keep = true,
            "--clean" => clean = true,
            "--shape" => {
                shape = match words.next().as_deref() {
                    Some("routed") => Shape::Routed,
                    Some("bridge") => Shape::Bridge { br_netfilter: true },
                    other => bail!("--shape takes routed or bridge, not {other:?}"),
                }
            }
            other => bail!("unknown argument {other:?}"),
        }
    }
    Ok(if clean { Task::Clean } else { Task::Show { shape, keep } })
}

fn demo(shape: Shape, keep: bool) -> Result<()> {
    let screen = Screen::new();
    let id = keep.then(|| keep::ID.to_owned());
    clean_up_on_signals(id.as_ref().map_or_else(janitor::own_prefix, |id| format!("{id}-")))?;
    screen.title("Fairlead: Services by eBPF, in a small cluster made of network namespaces");
    let mut cluster = Cluster::build(&screen, shape, id).inspect_err(|_| give_way())?;
    let mut summary = Vec::new();
    for step in steps::ALL {
        screen.step(step.title);
        match (step.run)(&screen, &mut cluster) {
            Ok(result) => summary.push((step.title, result)),
            Err(error) => {
                give_way();
                screen.failed(&format!("{error:#}"));
                screen.note(&format!("the agent's last words:\n{}", cluster.log_tail(15)));
                bail!("step {:?} failed: {error:#}", step.title);
            }
        }
    }
    screen.step("Summary");
    for (title, result) in summary {
        screen.passed(&format!("{title}: {result}"));
    }
    if keep { keep::leave(&screen, cluster) } else { Ok(()) }
}

/// A signal has come: what fails from now on fails because the cluster is being removed.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Leaves the rest to the thread that removes the cluster and ends the process, if there is one.
fn give_way() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// On Ctrl-C (and TERM, HUP) everything that carries the prefix is removed before the process ends.
fn clean_up_on_signals(prefix: String) -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Before any other thread begins: they all inherit that these signals are for the one that waits.
    signals.thread_block().context("cannot block signals")?;
    let wait = move || {
        let Ok(signal) = signals.wait() else { return };
        INTERRUPTED.store(true, Ordering::SeqCst);
        eprintln!("\n{signal}: removing the cluster");
        let code = match janitor::end(&prefix) {
            Ok(()) => 128 + signal as i32,
            Err(error) => {
                eprintln!("fairlead-demo: {error:#}");
                1
            }
        };
        std::process::exit(code);
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("cannot start a thread")?;
    Ok(())
}
