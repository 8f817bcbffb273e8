//! Events written to the Kubernetes API.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;

use super::client::Server;
use crate::events::{About, Notice, Severity};

/// Pause before the second attempt; it doubles with each.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Attempts, as many as Kubernetes' own recorder makes.
const ATTEMPTS: u32 = 12;
/// Longest pause.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Writes what is told until nobody tells any more. An Event that cannot be written is no failure of the proxy.
pub(super) async fn publish(server: Arc<Server>, node: String, mut notices: mpsc::Receiver<Notice>) {
    let reporter = Reporter { controller: "fairlead".to_owned(), instance: Some(node.clone()) };
    let (client, mut reading) = server.client();
    let mut recorder = Recorder::new(client, reporter.clone());
    while let Some(notice) = notices.recv().await {
        let (event, reference) = (event(&notice), reference(&notice.about, &node));
        let mut pause = FIRST_RETRY;
        let (client, now) = server.client();
        if now != reading {
            // What the recorder knows of earlier Events goes with it: they begin a new series.
            (recorder, reading) = (Recorder::new(client, reporter.clone()), now);
        }
        for attempt in 1..=ATTEMPTS {
            let Err(error) = recorder.publish(&event, &reference).await else { break };
            // The server has judged it: another attempt would be judged the same.
            let judged =
                matches!(&error, kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 429);
            if judged || attempt == ATTEMPTS {
                tracing::warn!(reason = notice.reason, %error, "an Event could not be written");
                break;
            }
            tokio::time::sleep(pause).await;
            pause = LAST_RETRY.min(pause * 2);
        }
    }
}

fn event(notice: &Notice) -> Event {
    Event {
        type_: match notice.severity {
            Severity::Normal => EventType::Normal,
            Severity::Warning => EventType::Warning,
        },
        reason: notice.reason.to_owned(),
        // The API takes 1 KiB.
        note: Some(notice.note.chars().take(1000).collect()),
        action: notice.action.to_owned(),
        secondary: None,
    }
}

fn reference(about: &About, node: &str) -> ObjectReference {
    match about {
        About::Node => ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            // Not the object's own: `kubectl describe node` looks for Events under the name, as kubelet and kube-proxy write them.
            uid: Some(node.to_owned()),
            ..ObjectReference::default()
        },
        About::Service(service) => ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(service.namespace().to_owned()),
            name: Some(service.name().to_owned()),
            ..ObjectReference::default()
        },
    }
}
