//! How each Service stands: done, waiting for another attempt, and what of it is not served.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::dataplane::{DataplaneError, Subject};
use crate::model::{Families, ObjectName};
use crate::plan::Unserved;

pub mod file;

/// First pause before a failed subject is tried again; it doubles with each attempt that follows a pause.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Longest pause: a Service that did not fit is served this soon after room was made.
const LAST_RETRY: Duration = Duration::from_secs(30);

/// A failure and what follows from it.
#[derive(Clone, Debug)]
struct Failure {
    message: String,
    behind: Families,
    attempts: u32,
    retry_at: Duration,
}

/// Where everything stands.
#[derive(Debug, Default)]
pub struct Board {
    done: BTreeSet<Subject>,
    failures: BTreeMap<Subject, Failure>,
    unserved: BTreeMap<Subject, Vec<Unserved>>,
    /// Subjects of which there is something new to tell.
    news: BTreeSet<Subject>,
}

/// What became of some subjects: `None` for those that are simply done or gone.
#[derive(Clone, Debug, Default)]
pub struct News(pub Vec<(Subject, Option<Entry>)>);

/// One subject that is not simply done, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `Service default/web`.
    pub subject: String,
    /// `default/web`, if it is a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Why its last change failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What of it is not served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unserved: Vec<String>,
}

impl Board {
    /// A change succeeded. Returns true if an earlier one had failed.
    pub fn done(&mut self, subject: &Subject) -> bool {
        let recovered = self.failures.remove(subject).is_some();
        self.done.insert(subject.clone());
        if recovered {
            self.news.insert(subject.clone());
        }
        recovered
    }

    /// A change failed. Returns the pause until the next attempt, and true if the reason is a new one.
    pub fn failed(&mut self, subject: &Subject, error: &DataplaneError, now: Duration) -> (Duration, bool) {
        let message = error.to_string();
        let known = self.failures.get(subject);
        let new = known.is_none_or(|failure| failure.message != message);
        let (attempts, retry_at) = match known {
            // Tried because it changed, not because its pause was over. A burst of changes that finds a map full of what
            // waits for a grace period must not wait half a minute for it.
            Some(failure) if now < failure.retry_at => (failure.attempts, failure.retry_at),
            known => {
                let attempts = known.map_or(0, |failure| failure.attempts);
                (attempts + 1, now + LAST_RETRY.min(FIRST_RETRY.saturating_mul(1 << attempts.min(10))))
            }
        };
        let pause = retry_at - now;
        let failure = Failure { message, behind: error.behind(), attempts, retry_at };
        self.failures.insert(subject.clone(), failure);
        self.done.remove(subject);
        if new {
            self.news.insert(subject.clone());
        }
        (pause, new)
    }

    /// Notes what is not served. Returns true if that is new.
    pub fn unserved(&mut self, subject: &Subject, unserved: &[Unserved]) -> bool {
        let known = self.unserved.get(subject).map_or(&[][..], Vec::as_slice);
        if known == unserved {
            return false;
        }
        if unserved.is_empty() {
            self.unserved.remove(subject);
        } else {
            self.unserved.insert(subject.clone(), unserved.to_vec());
        }
        self.news.insert(subject.clone());
        !unserved.is_empty()
    }

    /// The subject is gone.
    pub fn forget(&mut self, subject: &Subject) {
        self.done.remove(subject);
        if self.unserved.remove(subject).is_some() {
            self.news.insert(subject.clone());
        }
    }

    /// Subjects whose pause is over.
    pub fn due(&self, now: Duration) -> Vec<Subject> {
        self.failures
            .iter()
            .filter(|(_, failure)| failure.retry_at <= now)
            .map(|(subject, _)| subject.clone())
            .collect()
    }

    /// When the next pause is over.
    pub fn next_retry(&self) -> Option<Duration> {
        self.failures.values().map(|failure| failure.retry_at).min()
    }

    /// Number of subjects done, and of subjects whose last change failed.
    pub fn counts(&self) -> (usize, usize) {
        (self.done.len(), self.failures.len())
    }

    /// What changed of [`Self::entries`] since this was asked last.
    pub fn take_news(&mut self) -> News {
        News(
            std::mem::take(&mut self.news).into_iter().map(|subject| (subject.clone(), self.entry(&subject))).collect(),
        )
    }

    /// True if the Service's last change succeeded.
    pub fn is_done(&self, service: &ObjectName) -> bool {
        self.done.contains(&Subject::Service(service.clone()))
    }

    /// Number of subjects that are done but for what is not served of them.
    pub fn partly_unserved(&self) -> usize {
        self.unserved.keys().filter(|subject| self.done.contains(*subject)).count()
    }

    /// The families of which a write failed that should not fail.
    pub fn behind(&self) -> Families {
        self.failures.values().fold(Families::NONE, |families, failure| families.or(failure.behind))
    }

    /// Every subject that is not simply done, by name.
    pub fn entries(&self) -> Vec<Entry> {
        let subjects: BTreeSet<_> = self.failures.keys().chain(self.unserved.keys()).collect();
        subjects.into_iter().filter_map(|subject| self.entry(subject)).collect()
    }

    fn entry(&self, subject: &Subject) -> Option<Entry> {
        let service = match subject {
            Subject::Service(name) => Some(name.to_string()),
            Subject::Node | Subject::ServiceCidrs | Subject::SourcePorts | Subject::Leftovers => None,
        };
        let error = self.failures.get(subject).map(|failure| failure.message.clone());
        let unserved: Vec<_> = self.unserved.get(subject).into_iter().flatten().map(ToString::to_string).collect();
        let simple = error.is_none() && unserved.is_empty();
        (!simple).then(|| Entry { subject: subject.to_string(), service, error, unserved })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::{Capacities, MapName};
    use crate::model::IpFamily;

    fn full() -> DataplaneError {
        DataplaneError::full("add to", MapName::ServicesV4, &Capacities::default())
    }

    fn gone() -> DataplaneError {
        DataplaneError::failed("add to", MapName::ServicesV4, std::io::Error::other("gone"))
    }

    #[test]
    fn pauses_double_up_to_half_a_minute() {
        let (mut board, subject) = (Board::default(), Subject::Service(ObjectName::new("a", "b")));
        let mut now = Duration::ZERO;
        let pauses: Vec<_> = (0..9)
            .map(|_| {
                let (pause, _) = board.failed(&subject, &full(), now);
                now += pause;
                pause.as_millis()
            })
            .collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        assert!(board.done(&subject));
        assert_eq!(board.failed(&subject, &full(), Duration::ZERO).0, FIRST_RETRY);
    }

    #[test]
    fn a_burst_of_changes_that_fail_is_one_attempt() {
        let (mut board, subject) = (Board::default(), Subject::Service(ObjectName::new("a", "b")));
        for ms in 0..100 {
            let (pause, _) = board.failed(&subject, &full(), Duration::from_millis(ms));
            assert_eq!(pause, FIRST_RETRY - Duration::from_millis(ms));
        }
        assert_eq!(board.next_retry(), Some(FIRST_RETRY));
        assert_eq!(board.failed(&subject, &full(), FIRST_RETRY).0, FIRST_RETRY * 2, "its pause was over");
    }

    #[test]
    fn news_are_what_changed_and_add_up_to_the_entries() {
        let (mut board, subject) = (Board::default(), Subject::Service(ObjectName::new("a", "b")));
        board.done(&subject);
        assert!(board.take_news().0.is_empty(), "what is simply done is no news");
        board.failed(&subject, &full(), Duration::ZERO);
        board.failed(&subject, &full(), Duration::ZERO);
        board.unserved(&subject, &[Unserved::SharedClusterIp([10, 96, 0, 1].into(), ObjectName::new("a", "older"))]);
        let [(told, Some(entry))] = &board.take_news().0[..] else { panic!("one piece of news") };
        assert_eq!((told, std::slice::from_ref(entry)), (&subject, &board.entries()[..]));
        assert_eq!((entry.service.as_deref(), entry.error.as_deref()), (Some("a/b"), Some(&*full().to_string())));
        board.failed(&subject, &full(), Duration::ZERO);
        assert!(board.take_news().0.is_empty(), "it fails as it did");
        board.done(&subject);
        board.forget(&subject);
        assert!(matches!(&board.take_news().0[..], [(_, None)]));
    }

    #[test]
    fn a_failure_is_news_once() {
        let (mut board, subject) = (Board::default(), Subject::Node);
        assert!(board.failed(&subject, &full(), Duration::ZERO).1);
        assert!(!board.failed(&subject, &full(), Duration::ZERO).1);
        assert!(board.failed(&subject, &gone(), Duration::ZERO).1);
        assert_eq!(board.due(Duration::from_secs(60)), [subject]);
    }

    #[test]
    fn want_of_room_is_one_services_matter_and_any_other_failure_its_familys() {
        let (mut board, subject) = (Board::default(), Subject::Node);
        board.failed(&subject, &full(), Duration::ZERO);
        assert_eq!(board.behind(), Families::NONE);
        board.failed(&subject, &gone(), Duration::ZERO);
        assert_eq!(board.behind(), Families::one(IpFamily::V4));
        board.done(&subject);
        assert_eq!(board.behind(), Families::NONE);
    }
}
