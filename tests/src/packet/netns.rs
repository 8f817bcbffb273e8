//! A network namespace for the calling thread alone.

use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::marker::PhantomData;
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use nix::sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, setns, unshare};
use nix::unistd::Pid;

use super::world;

/// Namespaces that tests have done with, as they were made: making one takes longer than most tests.
static IDLE: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// The thread is in a namespace of its own until this is dropped; then it goes back. The namespace goes to a later test,
/// or away if this one changed it.
pub(super) struct NetNs {
    before: File,
    own: File,
    changed: Cell<bool>,
    // Namespaces belong to threads.
    _not_send: PhantomData<*const ()>,
}

impl NetNs {
    /// A namespace with the devices of [`world`]; holds the thread to one CPU: the programs keep counters and the limit on
    /// answers by CPU.
    pub(super) fn enter() -> Self {
        let before = open();
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match &idle {
            Some(own) => setns(own.as_fd(), CloneFlags::CLONE_NEWNET).expect("cannot enter a network namespace"),
            None => unshare(CloneFlags::CLONE_NEWNET).expect("cannot make one: the packet tier needs root"),
        }
        stay_on_this_cpu();
        let made = idle.is_none();
        let own = idle.unwrap_or_else(open);
        let guard = Self { before, own, changed: Cell::new(false), _not_send: PhantomData };
        if made {
            make();
        }
        guard
    }

    /// Runs commands of `ip` here.
    pub(super) fn ip(&self, lines: &str) {
        self.changed.set(true);
        ip_batch(lines);
    }
}

fn open() -> File {
    File::open("/proc/thread-self/ns/net").expect("cannot open the thread's network namespace")
}

/// The devices of [`world`], in the thread's new namespace.
fn make() {
    // Before any device: new devices inherit it.
    for (key, value) in [
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/addr_gen_mode", "1"),
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
    ] {
        write_sysctl(key, value);
    }
    ip_batch(&world::commands());
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // The thread ends with its test; a failure here can only mean that it already does.
        let back = setns(self.before.as_fd(), CloneFlags::CLONE_NEWNET).is_ok();
        if back && !self.changed.get() && !std::thread::panicking() {
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).extend(self.own.try_clone());
        }
    }
}

fn stay_on_this_cpu() {
    let mut cpus = CpuSet::new();
    let cpu = sched_getcpu().expect("the kernel knows the CPU");
    cpus.set(cpu).expect("a CPU that runs us is one of the set");
    sched_setaffinity(Pid::from_raw(0), &cpus).expect("a thread may choose among its CPUs");
}

/// Sets a sysctl of the thread's namespace.
fn write_sysctl(key: &str, value: &str) {
    let path = format!("/proc/sys/{key}");
    std::fs::write(&path, value).unwrap_or_else(|e| panic!("cannot write {value} to {path}: {e}"));
}

/// Runs commands of `ip` in the thread's namespace.
fn ip_batch(lines: &str) {
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cannot run ip: install iproute2");
    // An ip that fails early breaks the pipe; what it says is shown below.
    ip.stdin.take().expect("asked for above").write_all(format!("{lines}\n").as_bytes()).ok();
    let output = ip.wait_with_output().expect("ip runs");
    assert!(output.status.success(), "ip -batch: {}\n{lines}", String::from_utf8_lossy(&output.stderr));
}
