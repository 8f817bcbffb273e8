//! The task around [`Sync`]: channel, clock and grace periods.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Dataplane, DataplaneError, Event, Sync};
use crate::dataplane::MapName;
use crate::plan::node_ports::NodePorts;
use crate::status::News;

/// What the task is told.
#[derive(Debug)]
pub enum Input {
    /// By a source.
    Event(Event),
    /// By the sweep of flows: every address that a live flow uses, both sides of its rewrite.
    LiveAddresses(Vec<IpAddr>),
}

/// How long retires that failed wait for another attempt when nothing else happens.
const RETIRE_RETRY: Duration = Duration::from_secs(1);

/// Runs until every sender of `inputs` is gone. `status` is told what becomes of everything that is not simply done: for
/// the first time when every Service of the first full list was seen to.
pub async fn run<D: Dataplane>(
    dataplane: D,
    node_ports: NodePorts,
    mut inputs: mpsc::Receiver<Input>,
    status: mpsc::UnboundedSender<News>,
) -> Result<(), DataplaneError> {
    let epoch = Instant::now();
    let mut sync = Sync::new(dataplane, Duration::ZERO)?.with_node_ports(node_ports);
    let mut grace: Option<JoinHandle<Result<(), DataplaneError>>> = None;
    let mut told = false;
    loop {
        let wake = sync.next_wake().map(|at| at.saturating_sub(epoch.elapsed()));
        tokio::select! {
            input = inputs.recv() => match input {
                Some(input) => sync.input(input),
                None => return Ok(()),
            },
            result = ended(&mut grace) => {
                grace = None;
                sync.grace_over(result);
            }
            () = tokio::time::sleep(wake.unwrap_or(RETIRE_RETRY)), if wake.is_some() || sync.has_retires() => {}
        }
        // Whatever has arrived meanwhile goes into the same step.
        while let Ok(input) = inputs.try_recv() {
            sync.input(input);
        }
        sync.step(epoch.elapsed());
        let news = sync.take_news();
        if !news.0.is_empty() || (sync.first_done && !told) {
            told = true;
            // Whoever shows it may end before the control plane does.
            _ = status.send(news);
        }
        if grace.is_none() {
            grace = sync.begin_grace().map(tokio::task::spawn_blocking);
        }
    }
}

/// The result of the grace period under way; never, if there is none.
async fn ended(grace: &mut Option<JoinHandle<Result<(), DataplaneError>>>) -> Result<(), DataplaneError> {
    match grace {
        Some(task) => {
            let panicked = |error| DataplaneError::failed("wait for the readers of", MapName::Ports, error);
            task.await.unwrap_or_else(|error| Err(panicked(error)))
        }
        None => std::future::pending().await,
    }
}

impl<D: Dataplane> Sync<D> {
    /// Takes an input in.
    pub fn input(&mut self, input: Input) {
        match input {
            Input::Event(event) => self.take(event),
            Input::LiveAddresses(live) => self.sweep_filter(live.into_iter()),
        }
    }
}
