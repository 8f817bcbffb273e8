//! What is told to the cluster as an Event: the few things that kube-proxy tells, under its reasons.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::model::ObjectName;

/// Events that may wait for the API server. More of them would say nothing new.
const WAITING: usize = 64;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the Event type of that name")]
pub enum Severity {
    Normal,
    Warning,
}

/// What it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// This node.
    Node,
    /// A Service.
    Service(ObjectName),
}

/// One Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What it is about.
    pub about: About,
    /// How bad it is.
    pub severity: Severity,
    /// Why, in one word: what people filter by.
    pub reason: &'static str,
    /// What was done or tried.
    pub action: &'static str,
    /// For people.
    pub note: String,
}

/// Where Events are told. Never waits.
#[derive(Clone, Debug)]
pub struct Events(Option<mpsc::Sender<Notice>>);

impl Events {
    /// With somebody who listens.
    pub fn new() -> (Self, mpsc::Receiver<Notice>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(Some(sender)), receiver)
    }

    /// Where there is no cluster to tell.
    pub const fn nobody() -> Self {
        Self(None)
    }

    /// Gives what was told last a moment to be written, before the process ends.
    pub async fn finish(&self, moment: Duration) {
        if self.0.is_some() {
            tokio::time::sleep(moment).await;
        }
    }

    /// Tells, if there is room.
    pub fn tell(&self, notice: Notice) {
        if let Some(sender) = &self.0
            && let Err(error) = sender.try_send(notice)
        {
            tracing::debug!(%error, "an Event is not told");
        }
    }
}
