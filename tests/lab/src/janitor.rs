//! Clean-up that does not depend on how the process ends.
//!
//! A small shell waits on a pipe that only this process holds open. When the process is gone (finished, panicked,
//! Ctrl-C, killed) the pipe closes, and the shell removes what carries the process' labs' names. What even that missed
//! (a power cut of the shell) is removed by the next process that makes a lab.

use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::netns;

/// Every namespace, pin and directory of a lab begins with this, the process id and a dash.
pub const PREFIX: &str = "fairlead-lab-";
/// Where the kernel's pins live.
pub const BPF_FS: &str = "/sys/fs/bpf";
/// Where manifests and logs of labs live.
pub const TMP: &str = "/tmp";

/// Removes everything whose name begins with `$1`. Processes inside such a namespace were started by the lab.
const SCRIPT: &str = r#"
[ -n "$1" ] || exit 1
for ns in /run/netns/"$1"*; do
    [ -e "$ns" ] || continue
    for pid in $(ip netns pids "${ns##*/}" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
done
for ns in /run/netns/"$1"*; do
    [ -e "$ns" ] && ip netns del "${ns##*/}" 2>/dev/null
done
rm -rf /sys/fs/bpf/"$1"* /tmp/"$1"* /run/fairlead/sys/fs/bpf/"$1"*
true
"#;

/// The pipe whose end tells the shell that we are gone.
static PIPE: Mutex<Option<ChildStdin>> = Mutex::new(None);

/// The prefix of this process' labs.
pub fn own_prefix() -> String {
    format!("{PREFIX}{}-", std::process::id())
}

/// Starts the waiting shell, once per process, and removes what dead processes left.
pub fn arm() -> Result<()> {
    let mut pipe = PIPE.lock().unwrap_or_else(PoisonError::into_inner);
    if pipe.is_some() {
        return Ok(());
    }
    sweep_dead()?;
    let mut command = Command::new("sh");
    command.args(["-c", &format!("read -r _\n{SCRIPT}"), "sh", &own_prefix()]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: setsid(2) is async-signal-safe. A session of its own, so that a Ctrl-C on the terminal does not end it.
    unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
    let mut child = command.spawn().context("cannot start the clean-up shell: is sh installed?")?;
    *pipe = child.stdin.take();
    Ok(())
}

/// Processes that belong to labs of this process and are running.
static CHILDREN: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Starts a process of a lab, one that [`end`] ends.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    let child = command.spawn()?;
    children.push(child.id());
    Ok(child)
}

/// The caller ends this process itself from here on.
pub fn release(pid: u32) {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).retain(|child| *child != pid);
}

/// The last act of a process that was told to stop: ends the processes of its labs, lets none begin any more, and
/// removes what carries the prefix. A process that is only just starting is in no namespace yet, so that looking
/// there is not enough.
pub fn end(prefix: &str) -> Result<()> {
    let children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    for pid in children.iter().filter_map(|&pid| i32::try_from(pid).ok()) {
        // It may have ended by itself.
        kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
    }
    std::mem::forget(children);
    remove(prefix)
}

/// Removes everything whose name begins with `prefix`, processes inside its namespaces first.
pub fn remove(prefix: &str) -> Result<()> {
    netns::run(Command::new("sh").args(["-c", SCRIPT, "sh", prefix])).map(drop)
}

/// Removes the labs of processes that are gone.
pub fn sweep_dead() -> Result<()> {
    let mut dead = Vec::new();
    for dir in [netns::RUN_DIR, BPF_FS, TMP] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if let Some(pid) = owner(&entry.file_name().to_string_lossy())
                && !Path::new(&format!("/proc/{pid}")).exists()
                && !dead.contains(&pid)
            {
                dead.push(pid);
            }
        }
    }
    dead.iter().try_for_each(|pid| remove(&format!("{PREFIX}{pid}-")))
}

/// The process whose lab a name belongs to.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_owner() {
        assert_eq!(owner("fairlead-lab-12-0-node"), Some(12));
        assert_eq!(owner("fairlead-lab-demo-node"), None, "kept labs belong to nobody");
        assert_eq!(owner("cni-12-0"), None);
    }
}
