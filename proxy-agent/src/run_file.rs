//! Files in which an agent leaves word below `/run/fairlead`, for commands that are run beside it and for its successor.
//!
//! They lie there, because a BPF file system holds no text. An agent that ends or crashes leaves them behind: what they say is
//! then as true as the maps are that were left with them, and [`PinRoot::agent_runs`] tells the two apart.

use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::dataplane::pin::PinRoot;

/// Where files of running services belong.
const RUN_DIR: &str = "/run/fairlead";

/// A file that holds a `T` as JSON.
#[derive(Clone, Debug)]
pub struct RunFile<T> {
    path: PathBuf,
    holds: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> RunFile<T> {
    /// The file of this name of the agent with these pins: its directory follows from their place, which no two agents share.
    pub fn of(pins: &PinRoot, name: &str) -> Self {
        let parts = pins.path().components().filter(|part| matches!(part, Component::Normal(_)));
        Self::at(Path::new(RUN_DIR).join(parts.collect::<PathBuf>()).join(name))
    }

    /// The file at this path.
    pub const fn at(path: PathBuf) -> Self {
        Self { path, holds: PhantomData }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says, and since when; `None` if it is not there.
    pub fn read(&self) -> io::Result<Option<(T, SystemTime)>> {
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let written = std::fs::metadata(&self.path)?.modified()?;
        Ok(Some((serde_json::from_slice(&text)?, written)))
    }

    /// Replaces it at once: whoever reads it sees the old or the new text, and a crash in between leaves the old.
    pub fn write(&self, said: &T) -> io::Result<()> {
        let new = self.path.with_extension("new");
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(&new, serde_json::to_vec(said)?)?;
        std::fs::rename(&new, &self.path)
    }

    /// Removes it, and the directories that held nothing else. False if it was not there.
    pub fn remove(&self) -> io::Result<bool> {
        let removed = match std::fs::remove_file(&self.path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        // Left by a crash between writing and renaming.
        _ = std::fs::remove_file(self.path.with_extension("new"));
        let dirs = self.path.ancestors().skip(1).take_while(|dir| dir.starts_with(RUN_DIR));
        // The first that holds something else ends it.
        _ = dirs.map(std::fs::remove_dir).take_while(Result::is_ok).count();
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_pin_paths_never_share_a_file() {
        let of = |pins: &str| RunFile::<u8>::of(&PinRoot::new(pins.into()).unwrap(), "x.json").path;
        assert_eq!(of("/sys/fs/bpf/fairlead"), Path::new("/run/fairlead/sys/fs/bpf/fairlead/x.json"));
        assert_eq!(of("/../x"), Path::new("/run/fairlead/x/x.json"), "and none lies elsewhere");
        assert_ne!(of("/a-b"), of("/a/b"));
    }

    #[test]
    fn what_is_gone_or_no_json_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = RunFile::at(dir.path().join("below/x.json"));
        assert!(file.read().unwrap().is_none());
        assert!(!file.remove().unwrap());
        file.write(&7u8).unwrap();
        assert_eq!(file.read().unwrap().unwrap().0, 7);
        std::fs::write(file.path(), "{").unwrap();
        file.read().unwrap_err();
        assert!(file.remove().unwrap() && file.read().unwrap().is_none());
    }
}
