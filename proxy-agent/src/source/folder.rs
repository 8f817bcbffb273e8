//! A folder of manifests, followed with inotify.
//!
//! A file is read when it is complete: closed after writing, or moved into place. What an editor leaves half done, its
//! backups and its swap files change nothing.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use inotify::{EventMask, EventOwned, Inotify, WatchMask};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Closed, Source, SourceError, send};
use crate::index::{Event, Kind};
use crate::sync::Input;

pub mod files;

use files::{Files, Read};

/// Some editors move the old file away before they write the new one: so long it may be missing.
const EDITOR_PAUSE: Duration = Duration::from_millis(100);

/// A folder of manifests.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    node: String,
}

impl Folder {
    /// The folder `dir`, seen from the node of this name.
    pub fn new(dir: impl Into<PathBuf>, node: impl Into<String>) -> Self {
        Self { dir: dir.into(), node: node.into() }
    }
}

impl Source for Folder {
    fn describe(&self) -> String {
        format!("manifests in {}", self.dir.display())
    }

    fn run(self: Box<Self>, to: mpsc::Sender<Input>) -> BoxFuture<'static, Result<(), SourceError>> {
        follow(*self, to).boxed()
    }
}

async fn follow(folder: Folder, to: mpsc::Sender<Input>) -> Result<(), SourceError> {
    let Folder { dir, node } = folder;
    let failed = |op| {
        let path = dir.clone();
        move |source| SourceError::Io { op, path, source }
    };
    let inotify = Inotify::init().map_err(failed("watch"))?;
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::MOVE
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    // Watched before it is listed: what changes in between is read twice, not missed.
    inotify.watches().add(&dir, mask).map_err(failed("watch the folder"))?;
    let mut changes = inotify.into_event_stream(vec![0; 16 * 1024]).map_err(failed("watch"))?;
    let mut follower = Follower { files: Files::new(node), missing: Vec::new(), dir: dir.clone() };
    if follower.first_list(&to).await?.is_err() {
        return Ok(());
    }
    loop {
        let pause = follower.missing.first().map(|(until, _)| *until);
        let sent = tokio::select! {
            change = changes.next() => match change {
                Some(Ok(change)) => follower.change(change, &to).await?,
                Some(Err(error)) => return Err(failed("watch")(error)),
                None => return Err(SourceError::FolderGone { path: dir }),
            },
            () = tokio::time::sleep_until(pause.unwrap_or_else(Instant::now)), if pause.is_some() => {
                let (_, name) = follower.missing.remove(0);
                follower.read(&name, &to).await
            }
        };
        if sent.is_err() {
            return Ok(());
        }
    }
}

struct Follower {
    dir: PathBuf,
    files: Files,
    /// Files that were moved away, and when that is believed.
    missing: Vec<(Instant, OsString)>,
}

impl Follower {
    async fn first_list(&mut self, to: &mpsc::Sender<Input>) -> Result<Result<(), Closed>, SourceError> {
        let mut events = Vec::from(Kind::ALL.map(Event::Init));
        for name in self.list()? {
            // Nothing is known yet, so that every event brings an object.
            let read = self.update(&name);
            events.extend(read.into_iter().filter_map(|event| match event {
                Event::Apply(object) => Some(Event::InitApply(object)),
                _ => None,
            }));
        }
        events.extend(Kind::ALL.map(Event::InitDone));
        let (files, objects) = self.files.counts();
        info!(dir = %self.dir.display(), files, objects, "manifests read");
        Ok(send_all(to, events).await)
    }

    /// The manifests in the folder, by name.
    fn list(&self) -> Result<BTreeSet<OsString>, SourceError> {
        let failed = |source| SourceError::Io { op: "list", path: self.dir.clone(), source };
        let entries = std::fs::read_dir(&self.dir).map_err(failed)?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let names = names.collect::<Result<BTreeSet<_>, _>>().map_err(failed)?;
        Ok(names.into_iter().filter(|name| is_manifest(name)).collect())
    }

    async fn change(
        &mut self,
        change: EventOwned,
        to: &mpsc::Sender<Input>,
    ) -> Result<Result<(), Closed>, SourceError> {
        let EventOwned { mask, name, .. } = change;
        if mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED) {
            return Err(SourceError::FolderGone { path: self.dir.clone() });
        }
        let swapped = name.as_deref().is_some_and(|name| name.as_encoded_bytes().starts_with(b".."));
        if mask.contains(EventMask::Q_OVERFLOW) || swapped {
            // A mounted ConfigMap changes all of its files by moving one link.
            let mut names = self.list()?;
            names.extend(self.files.names().cloned());
            for name in names {
                if self.read(&name, to).await.is_err() {
                    return Ok(Err(Closed));
                }
            }
            return Ok(Ok(()));
        }
        let Some(name) = name.filter(|name| is_manifest(name)) else { return Ok(Ok(())) };
        if mask.contains(EventMask::MOVED_FROM) {
            self.missing.push((Instant::now() + EDITOR_PAUSE, name));
            return Ok(Ok(()));
        }
        // A plain file that was just made is still to be written; a link is complete.
        let path = self.dir.join(&name);
        let linked = || std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink() || meta.nlink() > 1);
        let recreated = mask.contains(EventMask::DELETE) && path.exists();
        if recreated || (mask.contains(EventMask::CREATE) && !linked()) {
            return Ok(Ok(()));
        }
        Ok(self.read(&name, to).await)
    }

    async fn read(&mut self, name: &OsStr, to: &mpsc::Sender<Input>) -> Result<(), Closed> {
        let events = self.update(name);
        send_all(to, events).await
    }

    fn update(&mut self, name: &OsStr) -> Vec<Event> {
        let outcome = self.files.read(name, self.text_of(name));
        for problem in outcome.problems {
            warn!(file = %self.dir.join(name).display(), %problem, "a manifest is not used as it stands");
        }
        outcome.events
    }

    fn text_of(&self, name: &OsStr) -> Read {
        let path = self.dir.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Read::Text(text),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::IsADirectory) => Read::Gone,
            Err(error) => Read::Unreadable(error.to_string()),
        }
    }
}

async fn send_all(to: &mpsc::Sender<Input>, events: Vec<Event>) -> Result<(), Closed> {
    for event in events {
        send(to, event).await?;
    }
    Ok(())
}

/// Hidden files, backups and swap files are not.
fn is_manifest(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let manifest = [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending));
    manifest && !name.starts_with(['.', '#'])
}

#[cfg(test)]
mod tests;
