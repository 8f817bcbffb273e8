//! Where everything that outlives the agent is pinned: `<pin path>/v<ABI version>/{maps,programs,links}`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxy_common::ABI_VERSION;

use super::sys;
use crate::config::Invalid;

/// The place where systems mount the BPF file system; mounted here if it is missing, and nowhere else.
const BPFFS: &str = "/sys/fs/bpf";

/// The directory of pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinRoot {
    root: PathBuf,
}

/// A pin directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Not on a BPF file system.
    #[error("{path} is on no BPF file system; mount one there (mount -t bpf bpf {path}) or choose another --pin-path")]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// A call failed.
    #[error("cannot {op} {path}: {source}{}", hint(source))]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another agent works here.
    #[error("an agent is running on {path}; stop it first, or choose another --pin-path")]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// Nothing is pinned.
    #[error("nothing is pinned under {path}: no agent has run with this --pin-path, or `fairlead cleanup` was run")]
    Nothing {
        /// The directory.
        path: PathBuf,
    },
}

/// The right to change what is pinned; ends with the process that holds it.
#[derive(Debug)]
pub struct PinLock {
    _dir: std::fs::File,
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied { "; run as root" } else { "" }
}

fn io(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError + use<> {
    let path = path.to_owned();
    move |source| PinError::Io { op, path, source }
}

impl PinRoot {
    /// A pin directory.
    ///
    /// # Errors
    /// A path that is not absolute: programs outlive the working directory.
    pub fn new(root: PathBuf) -> Result<Self, Invalid> {
        if root.is_absolute() {
            Ok(Self { root })
        } else {
            Err(Invalid::new("pin-path", root.display(), "not an absolute path"))
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The directory of this version's layouts. Another version's pins are never opened, only noticed.
    pub fn versioned(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    /// The maps of another version's agent that are pinned under the same directory, and that version.
    pub fn other_version(&self) -> Result<Option<(PathBuf, u32)>, PinError> {
        let unreadable = |source| PinError::Io { op: "read", path: self.root.clone(), source };
        for name in names(&self.root).map_err(unreadable)? {
            let Some(version) = name.strip_prefix('v').and_then(|number| number.parse().ok()) else { continue };
            let maps = self.root.join(&name).join("maps");
            if version != ABI_VERSION && names(&maps).map_err(unreadable)?.iter().any(|map| map == "CONFIG") {
                return Ok(Some((maps, version)));
            }
        }
        Ok(None)
    }

    /// Directory of maps.
    pub fn maps(&self) -> PathBuf {
        self.versioned().join("maps")
    }

    /// Directory of programs.
    pub fn programs(&self) -> PathBuf {
        self.versioned().join("programs")
    }

    /// Directory of links.
    pub fn links(&self) -> PathBuf {
        self.versioned().join("links")
    }

    /// A map's pin.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Whether pins can lie here: the BPF file system that is there, or the one that would be mounted.
    pub fn place(&self) -> Result<&'static str, PinError> {
        let there = self.nearest_existing();
        let on_bpffs = |path: &Path| {
            sys::is_bpffs(path).map_err(|source| PinError::Io { op: "look at", path: path.to_owned(), source })
        };
        if on_bpffs(&there)? {
            return Ok("a BPF file system is mounted");
        }
        let usual = Path::new(BPFFS);
        if self.root.starts_with(usual) && !on_bpffs(usual)? {
            return Ok("a BPF file system is to be mounted (`run` does)");
        }
        Err(PinError::NotBpffs { path: there })
    }

    /// Mounts the BPF file system at its usual place if it is missing. Returns true if it was.
    pub fn mount(&self) -> Result<bool, PinError> {
        self.place()?;
        let there = self.nearest_existing();
        if sys::is_bpffs(&there).map_err(io("look at", &there))? {
            return Ok(false);
        }
        let usual = Path::new(BPFFS);
        sys::mount_bpffs(usual).map_err(io("mount a BPF file system at", usual))?;
        tracing::info!(path = BPFFS, "mounted the BPF file system");
        Ok(true)
    }

    /// Makes the directories, and mounts the BPF file system at its usual place if it is missing.
    pub fn prepare(&self) -> Result<(), PinError> {
        self.mount()?;
        for dir in [self.maps(), self.programs(), self.links()] {
            std::fs::create_dir_all(&dir).map_err(io("make", &dir))?;
        }
        Ok(())
    }

    /// Takes the right to change the pins, or says that another process has it. Makes the directories.
    pub fn lock(&self) -> Result<PinLock, PinError> {
        self.prepare()?;
        self.lock_existing()
    }

    /// The same for a directory that exists. A process that is just ending is waited for.
    pub fn lock_existing(&self) -> Result<PinLock, PinError> {
        const PAUSE: Duration = Duration::from_millis(50);
        const PAUSES: u32 = 40;
        for _ in 0..PAUSES {
            match self.try_lock() {
                Err(PinError::Busy { .. }) => std::thread::sleep(PAUSE),
                result => return result,
            }
        }
        self.try_lock()
    }

    /// The same without waiting.
    pub fn try_lock(&self) -> Result<PinLock, PinError> {
        let failed = |source| PinError::Io { op: "lock", path: self.root.clone(), source };
        let dir = std::fs::File::open(&self.root).map_err(failed)?;
        match dir.try_lock() {
            Ok(()) => Ok(PinLock { _dir: dir }),
            Err(std::fs::TryLockError::WouldBlock) => Err(PinError::Busy { path: self.root.clone() }),
            Err(std::fs::TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    /// True if an agent works here. Takes no right away: one that is just starting tries again.
    pub fn agent_runs(&self) -> Result<bool, PinError> {
        let failed = |source| PinError::Io { op: "lock", path: self.root.clone(), source };
        let dir = std::fs::File::open(&self.root).map_err(failed)?;
        match dir.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(std::fs::TryLockError::WouldBlock) => Ok(true),
            Err(std::fs::TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    fn nearest_existing(&self) -> PathBuf {
        let mut path = self.root.as_path();
        while !path.exists() {
            match path.parent() {
                Some(parent) => path = parent,
                None => break,
            }
        }
        path.to_owned()
    }

    /// Checks that maps are pinned and that this user may read them.
    pub fn require(&self) -> Result<(), PinError> {
        let path = self.map("CONFIG");
        match std::fs::symlink_metadata(&path) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(PinError::Nothing { path: self.versioned() }),
            Err(source) => Err(PinError::Io { op: "read", path, source }),
        }
    }
}

/// Names in a directory of pins, in order; empty if there is no such directory.
pub fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names: Vec<String> =
        entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned())).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_lie_below_their_version() {
        let pins = PinRoot::new("/sys/fs/bpf/x".into()).unwrap();
        assert_eq!(pins.map("PORTS"), Path::new("/sys/fs/bpf/x").join(format!("v{ABI_VERSION}/maps/PORTS")));
    }

    #[test]
    fn a_place_on_another_file_system_is_refused_with_the_remedy() {
        let pins = PinRoot::new("/proc/nowhere/x".into()).unwrap();
        let error = pins.prepare().unwrap_err().to_string();
        assert!(error.contains("/proc is on no BPF file system") && error.contains("mount -t bpf"), "{error}");
    }

    #[test]
    fn only_one_at_a_time_changes_the_pins() {
        let dir = tempfile::tempdir().unwrap();
        let pins = PinRoot::new(dir.path().to_owned()).unwrap();
        assert!(!pins.agent_runs().unwrap());
        let lock = pins.try_lock().unwrap();
        assert!(pins.agent_runs().unwrap());
        assert!(matches!(pins.try_lock(), Err(PinError::Busy { .. })));
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(lock);
        });
        pins.lock_existing().unwrap();
    }

    #[test]
    fn another_versions_maps_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let pins = PinRoot::new(dir.path().to_owned()).unwrap();
        for empty in [pins.maps(), dir.path().join("v0/maps"), dir.path().join("vault/maps")] {
            std::fs::create_dir_all(empty).unwrap();
        }
        for map in [pins.map("CONFIG"), dir.path().join("vault/maps/CONFIG")] {
            std::fs::write(map, "").unwrap();
        }
        assert_eq!(pins.other_version().unwrap(), None);
        std::fs::write(dir.path().join("v0/maps/CONFIG"), "").unwrap();
        assert_eq!(pins.other_version().unwrap(), Some((dir.path().join("v0/maps"), 0)));
    }

    #[test]
    fn nothing_pinned_is_said_in_one_sentence() {
        let pins = PinRoot::new("/tmp/fairlead-no-such-dir".into()).unwrap();
        let error = pins.require().unwrap_err().to_string();
        assert!(error.starts_with("nothing is pinned under /tmp/fairlead-no-such-dir/v"), "{error}");
    }
}
