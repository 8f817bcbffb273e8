//! The task around [`Sync`]: channel, clock and grace periods.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::{Dataplane, DataplaneError, Event, Figures, Sync};
use crate::dataplane::MapName;
use crate::devices::NodeAddresses;
use crate::health::node_ports::HealthChecks;
use crate::health::{Health, Moment};
use crate::metrics::Syncs;
use crate::model::Families;
use crate::plan::node_ports::NodePorts;
use crate::status::News;

/// What the task is told.
#[derive(Debug)]
pub enum Input {
    /// By a source.
    Event(Event),
    /// By the sweep of flows: every address that a live flow uses, both sides of its rewrite.
    LiveAddresses(Vec<IpAddr>),
    /// By somebody who wants numbers.
    Figures(oneshot::Sender<Figures>),
}

/// Who is told how things go.
pub struct Listeners {
    /// Of what becomes of everything that is not simply done: for the first time when every Service of the first full
    /// list was seen to.
    pub news: mpsc::UnboundedSender<News>,
    /// Of what load balancers may be told.
    pub checks: watch::Sender<HealthChecks>,
    /// Of the node's addresses, with what the kernel knows of them.
    pub addresses: watch::Sender<NodeAddresses>,
    /// Of the networks of the own Node's pods, once it is known.
    pub pod_cidrs: watch::Sender<Option<Vec<IpNet>>>,
    /// Of the networks around ClusterIPs, once they are known.
    pub service_networks: watch::Sender<Option<Vec<IpNet>>>,
    /// Of what waits and what is done.
    pub health: Arc<Health>,
    /// Of durations.
    pub syncs: Syncs,
}

/// How long retires that failed wait for another attempt when nothing else happens.
const RETIRE_RETRY: Duration = Duration::from_secs(1);

/// Runs until every sender of `inputs` is gone.
pub async fn run<D: Dataplane>(
    dataplane: D,
    node_ports: NodePorts,
    mut inputs: mpsc::Receiver<Input>,
    to: Listeners,
) -> Result<(), DataplaneError> {
    let epoch = Instant::now();
    let mut sync = Sync::new(dataplane, Duration::ZERO)?.with_node_ports(node_ports);
    let mut grace: Option<JoinHandle<Result<(), DataplaneError>>> = None;
    let (mut first, mut late) = (true, Families::NONE);
    // From here on both families are judged.
    to.health.updated(sync.families(), Moment::now());
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
        let began = Moment::now();
        let waited = sync.waiting();
        to.health.queued(waited, began);
        to.syncs.queued(waited, began);
        sync.step(epoch.elapsed());
        late = told(&mut sync, &to, waited.or(late), began);
        let news = sync.take_news();
        if !news.0.is_empty() || (sync.first_done && first) {
            first = false;
            // Whoever shows it may end before the control plane does.
            _ = to.news.send(news);
        }
        if grace.is_none() {
            grace = sync.begin_grace().map(tokio::task::spawn_blocking);
        }
    }
}

/// Tells what a step has done for the families that waited, and says which still do.
fn told<D: Dataplane>(sync: &mut Sync<D>, to: &Listeners, waited: Families, began: Moment) -> Families {
    let (now, behind) = (Moment::now(), sync.behind());
    // What failed is tried again: the clock runs on until it is done.
    to.health.queued(behind, began);
    to.health.updated(waited.without(behind), now);
    to.syncs.done(waited, behind, began, now);
    for (family, caused) in sync.take_programmed() {
        to.syncs.programmed(family, caused);
    }
    if let Some(checks) = sync.take_checks() {
        to.checks.send_replace(checks);
    }
    if let Some(addresses) = sync.take_addresses() {
        to.addresses.send_replace(addresses);
    }
    if let Some(networks) = sync.take_service_networks() {
        to.service_networks.send_replace(Some(networks));
    }
    if let Some(node) = sync.node() {
        to.health.node(node.leaving);
        to.pod_cidrs.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&node.pod_cidrs);
            if changed {
                *known = Some(node.pod_cidrs.clone());
            }
            changed
        });
    }
    behind
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
            // Whoever asked may have lost patience.
            Input::Figures(to) => drop(to.send(self.figures())),
        }
    }
}
