//! The [file](RunFile) in which a running agent says what it does not serve.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Entry, News};
use crate::dataplane::Subject;
use crate::dataplane::pin::PinRoot;
use crate::run_file::RunFile;

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

/// The file of the agent with these pins.
pub fn of(pins: &PinRoot) -> RunFile<Said> {
    RunFile::of(pins, "status.json")
}

/// Keeps the file in step with the news until there are no more. The file of an earlier agent is replaced first.
///
/// One that cannot be written is reported and stops nothing.
pub async fn follow(file: RunFile<Said>, mut news: mpsc::UnboundedReceiver<News>) {
    let (mut entries, mut said, mut failed): (BTreeMap<Subject, Entry>, _, _) = (BTreeMap::new(), None, None);
    let mut synced = false;
    let mut next = Said::default();
    loop {
        if said.as_ref() != Some(&next) {
            let error = file.write(&next).err().map(|error| error.to_string());
            if let Some(error) = error.as_ref().filter(|_| error != failed) {
                warn!(file = %file.path().display(), %error, "what is not served cannot be shown by `fairlead services`");
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

    #[tokio::test]
    async fn it_replaces_what_a_dead_agent_said_and_follows_the_news() {
        let dir = tempfile::tempdir().unwrap();
        let file = RunFile::at(dir.path().join("status.json"));
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
}
