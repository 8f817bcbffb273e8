//! The file in which a running agent says what it does not serve, for commands that are run beside it.
//!
//! It lies in `/run`, because a BPF file system holds no text. An agent that ends or crashes leaves it behind: what it
//! says is then as true as the maps are that were left with it, and [`PinRoot::agent_runs`] tells the two apart.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Entry, News};
use crate::dataplane::Subject;
use crate::dataplane::pin::PinRoot;

/// Where files of running services belong.
const RUN_DIR: &str = "/run/fairlead";
/// Least pause between two writes: a burst of changes becomes one.
const PAUSE: Duration = Duration::from_millis(200);

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Every Service that the sources listed at the start has been seen to. Until then the rest says nothing.
    pub synced: bool,
    /// Everything that is not simply served.
    pub entries: Vec<Entry>,
}

/// The directory of what the agent with these pins says. It follows from the place of the pins, which no two agents share.
pub fn directory(pins: &PinRoot) -> PathBuf {
    directory_below(Path::new(RUN_DIR), pins)
}

fn directory_below(dir: &Path, pins: &PinRoot) -> PathBuf {
    let names = pins.path().components().filter(|part| matches!(part, Component::Normal(_)));
    dir.join(names.collect::<PathBuf>())
}

/// The file of the agent with these pins.
#[derive(Clone, Debug)]
pub struct StatusFile {
    path: PathBuf,
}

impl StatusFile {
    /// It lies in [`directory`].
    pub fn of(pins: &PinRoot) -> Self {
        Self::below(Path::new(RUN_DIR), pins)
    }

    fn below(dir: &Path, pins: &PinRoot) -> Self {
        Self { path: directory_below(dir, pins).join("status.json") }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says, and since when; `None` if it is not there.
    pub fn read(&self) -> io::Result<Option<(Said, SystemTime)>> {
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let written = std::fs::metadata(&self.path)?.modified()?;
        Ok(Some((serde_json::from_slice(&text)?, written)))
    }

    /// Replaces it at once: whoever reads it sees the old or the new text, and a crash in between leaves the old.
    pub fn write(&self, said: &Said) -> io::Result<()> {
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

/// Keeps the file in step with the news until there are no more. The file of an earlier agent is replaced first.
///
/// One that cannot be written is reported and stops nothing.
pub async fn follow(file: StatusFile, mut news: mpsc::UnboundedReceiver<News>) {
    let (mut entries, mut said, mut failed): (BTreeMap<Subject, Entry>, _, _) = (BTreeMap::new(), None, None);
    let mut synced = false;
    let mut next = Said::default();
    loop {
        if said.as_ref() != Some(&next) {
            let error = file.write(&next).err().map(|error| error.to_string());
            if let Some(error) = error.as_ref().filter(|_| error != failed) {
                warn!(file = %file.path.display(), %error, "what is not served cannot be shown by `fairlead services`");
            }
            said = error.is_none().then_some(next);
            failed = error;
        }
        let Some(first) = news.recv().await else { return };
        tokio::time::sleep(PAUSE).await;
        let mut more = Some(first);
        while let Some(News(changes)) = more {
            // Others have something to tell before every Service was seen to.
            synced |= changes.is_empty() || changes.iter().any(|(subject, _)| *subject != Subject::SourcePorts);
            for (subject, entry) in changes {
                match entry {
                    Some(entry) => entries.insert(subject, entry),
                    None => entries.remove(&subject),
                };
            }
            more = news.try_recv().ok();
        }
        next = Said { synced, entries: entries.values().cloned().collect() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;

    fn file(dir: &Path) -> StatusFile {
        StatusFile::below(dir, &PinRoot::new("/sys/fs/bpf/x".into()).unwrap())
    }

    fn entry(name: &str) -> (Subject, Option<Entry>) {
        let subject = Subject::Service(ObjectName::new("shop", name));
        let entry = Entry {
            subject: subject.to_string(),
            service: Some(format!("shop/{name}")),
            error: None,
            unserved: vec!["part".into()],
        };
        (subject, Some(entry))
    }

    #[test]
    fn two_pin_paths_never_share_a_file() {
        let of = |pins: &str| StatusFile::of(&PinRoot::new(pins.into()).unwrap()).path;
        assert_eq!(of("/sys/fs/bpf/fairlead"), Path::new("/run/fairlead/sys/fs/bpf/fairlead/status.json"));
        assert_eq!(of("/../x"), Path::new("/run/fairlead/x/status.json"), "and none lies elsewhere");
        assert_ne!(of("/a-b"), of("/a/b"));
    }

    #[tokio::test]
    async fn it_replaces_what_a_dead_agent_said_and_follows_the_news() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        file.write(&Said { synced: true, entries: vec![entry("old").1.unwrap()] }).unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        let task = tokio::spawn(follow(file.clone(), receiver));
        tokio::time::sleep(PAUSE).await;
        assert_eq!(file.read().unwrap().unwrap().0, Said::default());

        let (_, ports) = entry("ports");
        sender.send(News(vec![(Subject::SourcePorts, ports)])).unwrap();
        tokio::time::sleep(2 * PAUSE).await;
        let said = file.read().unwrap().unwrap().0;
        assert_eq!((said.synced, said.entries.len()), (false, 1), "the control plane has said nothing yet");
        sender.send(News(vec![(Subject::SourcePorts, None)])).unwrap();

        sender.send(News(vec![entry("a"), entry("b")])).unwrap();
        sender.send(News(vec![(entry("a").0, None)])).unwrap();
        drop(sender);
        task.await.unwrap();
        let said = file.read().unwrap().unwrap().0;
        assert_eq!(said, Said { synced: true, entries: vec![entry("b").1.unwrap()] });
    }

    #[test]
    fn what_is_gone_or_no_json_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        assert!(file.read().unwrap().is_none());
        assert!(!file.remove().unwrap());
        file.write(&Said::default()).unwrap();
        std::fs::write(file.path(), "{").unwrap();
        file.read().unwrap_err();
        assert!(file.remove().unwrap() && file.read().unwrap().is_none());
    }
}
