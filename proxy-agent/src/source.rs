//! Where Services, EndpointSlices and the own Node come from. Sources are interchangeable: each sends its full list once, then what
//! changes, and ends only if it cannot go on.

use std::path::PathBuf;

use futures::future::BoxFuture;
use tokio::sync::mpsc;

use crate::sync::Input;

pub mod folder;

/// A source of objects.
pub trait Source: Send {
    /// What it reads, for people.
    fn describe(&self) -> String;

    /// Sends events until nobody listens any more, or until it cannot go on.
    fn run(self: Box<Self>, to: mpsc::Sender<Input>) -> BoxFuture<'static, Result<(), SourceError>>;
}

/// A source that cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file or folder.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The folder of manifests went away; what was served stays as it is.
    #[error("the folder {} is gone; put it back and start again", path.display())]
    FolderGone {
        /// The folder.
        path: PathBuf,
    },
    /// The API server's address or credentials.
    #[error("cannot use {what}: {source}")]
    Kube {
        /// The kubeconfig or service account.
        what: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Nobody listens any more: the agent is ending.
pub(crate) struct Closed;

/// Sends one event.
pub(crate) async fn send(to: &mpsc::Sender<Input>, event: crate::index::Event) -> Result<(), Closed> {
    to.send(Input::Event(event)).await.map_err(|_| Closed)
}
