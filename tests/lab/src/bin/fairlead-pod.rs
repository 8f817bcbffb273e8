//! Runs one program as a kubelet's container runtime would, on a machine without one: `fairlead-pod ROOT [OPTION…] -- PROGRAM…`.
//!
//! The program sees ROOT, read-only, with its own /proc and /sys; of the host only what is mounted by name; and it has
//! the capabilities that are named, and no way to more. The network namespace is the caller's.

use std::{
    ffi::{CStr, CString},
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{chdir, chroot, execve},
};

/// A path of the host that the program sees.
struct Mount {
    from: PathBuf,
    to: PathBuf,
    read_only: bool,
}

struct Options {
    root: PathBuf,
    mounts: Vec<Mount>,
    env: Vec<CString>,
    /// Bits of the capabilities; `None` for all.
    capabilities: Option<u64>,
    program: Vec<CString>,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("fairlead-pod: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let root = args.next().context("no root is given")?.into();
    let mut options = Options { root, mounts: Vec::new(), env: Vec::new(), capabilities: Some(0), program: Vec::new() };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "--mount" | "--mount-ro" => {
                let value = value()?;
                let (from, to) = value.split_once(':').with_context(|| format!("{value} is not FROM:TO"))?;
                options.mounts.push(Mount { from: from.into(), to: to.into(), read_only: arg == "--mount-ro" });
            }
            "--env" => options.env.push(CString::new(value()?)?),
            "--cap" => {
                let bit = 1 << capability(&value()?)?;
                options.capabilities = options.capabilities.map(|all| all | bit);
            }
            "--privileged" => options.capabilities = None,
            "--" => {
                options.program = args.by_ref().map(CString::new).collect::<Result<_, _>>()?;
                break;
            }
            _ => bail!("unknown option {arg}"),
        }
    }
    if options.program.is_empty() { bail!("no program is given") } else { Ok(options) }
}

/// Numbers of linux/capability.h, by the names that Kubernetes uses.
fn capability(name: &str) -> Result<u32> {
    Ok(match name {
        "NET_ADMIN" => 12,
        "SYS_ADMIN" => 21,
        "SYS_RESOURCE" => 24,
        "PERFMON" => 38,
        "BPF" => 39,
        _ => bail!("the number of capability {name} is not known here"),
    })
}

fn run(options: &Options) -> Result<std::convert::Infallible> {
    let root = options.root.canonicalize().with_context(|| format!("no root {}", options.root.display()))?;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    bind("none", Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE, None)?;
    // A place of its own, so that it can become read-only.
    bind(&root, &root, MsFlags::MS_BIND, None)?;
    let own = [("proc", "proc", MsFlags::empty()), ("sys", "sysfs", MsFlags::MS_RDONLY)];
    for (dir, kind, flags) in own {
        let at = place(&root, Path::new(dir), true)?;
        bind(kind, &at, flags, Some(kind))?;
    }
    for Mount { from, to, read_only } in &options.mounts {
        let at = place(&root, to, from.is_dir())?;
        bind(from, &at, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
        if *read_only {
            bind("none", &at, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, None)?;
        }
    }
    bind("none", &root, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, None)?;
    chdir(&root).and_then(|()| chroot(".")).with_context(|| format!("cannot change the root to {}", root.display()))?;
    if let Some(capabilities) = options.capabilities {
        limit(capabilities)?;
    }
    let program: &CStr = &options.program[0];
    execve(program, &options.program, &options.env).with_context(|| format!("cannot run {program:?}"))
}

/// Makes the place for a mount; inside of another one (of /sys) it is there already.
fn place(root: &Path, inside: &Path, is_dir: bool) -> Result<PathBuf> {
    let at = root.join(inside.strip_prefix("/").unwrap_or(inside));
    if at.exists() {
        return Ok(at);
    }
    let made = if is_dir {
        fs::create_dir_all(&at)
    } else {
        at.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&at, ""))
    };
    made.with_context(|| format!("cannot make {}", at.display()))?;
    Ok(at)
}

fn bind(from: impl AsRef<Path>, at: &Path, flags: MsFlags, kind: Option<&str>) -> Result<()> {
    let from = from.as_ref();
    mount(Some(from), at, kind, flags, None::<&str>)
        .with_context(|| format!("cannot mount {} at {} ({flags:?})", from.display(), at.display()))
}

/// Gives up every capability but these, for good.
fn limit(keep: u64) -> Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    const LAST: u32 = 63;
    for capability in (0..=LAST).filter(|capability| keep >> capability & 1 == 0) {
        // SAFETY: takes numbers only. One that the kernel does not know is none to give up.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    }
    let half = |bits: u32| Half { effective: bits, permitted: bits, inheritable: 0 };
    let halves = [half(keep as u32), half((keep >> 32) as u32)];
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: both structures are what capset(2) describes, and live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("cannot give up capabilities");
    }
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot give up new privileges");
    }
    Ok(())
}
