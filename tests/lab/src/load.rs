//! Load: clients that ask without a pause and keep every result.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    client::{Ask, Attempt, Conversation, Outcome, PATIENCE},
    netns::Namespace,
    server::wait_until,
    wire::Proto,
};

/// What to ask for.
#[derive(Clone, Copy, Debug)]
pub struct LoadPlan {
    /// Transport.
    pub proto: Proto,
    /// The server, or the Service.
    pub to: SocketAddr,
    /// Clients that ask side by side.
    pub workers: u8,
    /// Pause of each client between two requests.
    pub pause: Duration,
    /// A new connection (TCP) or socket (UDP) for each request; else one per worker, reopened after a failure.
    pub fresh: bool,
    /// Patience, as in [`Ask`].
    pub timeout: Duration,
    /// The clients' address, where the namespace has several.
    pub from: Option<IpAddr>,
}

impl LoadPlan {
    /// Four workers with a fresh connection each time, without a pause.
    pub fn new(proto: Proto, to: SocketAddr) -> Self {
        Self { proto, to, workers: 4, pause: Duration::ZERO, fresh: true, timeout: PATIENCE, from: None }
    }
}

/// One request of a load.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it began.
    pub start: Instant,
    /// How it ended.
    pub attempt: Attempt,
}

impl Sample {
    /// When it ended.
    pub fn end(&self) -> Instant {
        self.start + self.attempt.elapsed
    }
}

/// Running clients.
#[derive(Debug)]
pub struct Load {
    samples: Arc<Mutex<Vec<Sample>>>,
    done: Arc<AtomicU64>,
    /// Requests begun by each client.
    begun: Vec<Arc<AtomicU64>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts the clients inside the namespace.
    pub fn start(ns: &Namespace, plan: LoadPlan) -> Result<Self> {
        let mut load = Self {
            samples: Arc::default(),
            done: Arc::default(),
            begun: (0..plan.workers).map(|_| Arc::default()).collect(),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for worker in 0..plan.workers {
            let (ns, samples, done, stop) =
                (ns.clone(), Arc::clone(&load.samples), Arc::clone(&load.done), Arc::clone(&load.stop));
            let begun = Arc::clone(&load.begun[usize::from(worker)]);
            let thread = std::thread::Builder::new()
                .name(format!("load-{worker}"))
                .spawn(move || {
                    if let Err(error) = ns.enter() {
                        eprintln!("load worker {worker}: {error:#}");
                        return;
                    }
                    let own = ask_until(&plan, &stop, &begun, &done);
                    samples.lock().unwrap_or_else(PoisonError::into_inner).extend(own);
                })
                .context("cannot start a load thread")?;
            load.threads.push(thread);
        }
        Ok(load)
    }

    /// Requests that have ended so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until every request that has begun by now has ended. False if that took longer than [`PATIENCE`].
    pub fn turn_over(&self) -> bool {
        let begun = |client: &Arc<AtomicU64>| client.load(Ordering::Relaxed);
        let before: Vec<u64> = self.begun.iter().map(begun).collect();
        wait_until(PATIENCE, || self.begun.iter().map(begun).zip(&before).all(|(now, before)| now > *before))
    }

    /// Stops the clients; every result, in the order of their beginning.
    pub fn stop(mut self) -> Report {
        self.end();
        let mut samples = std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner));
        samples.sort_by_key(|sample| sample.start);
        Report { samples }
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of the worker has been printed, and its samples are missing from the report's count.
            thread.join().ok();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

fn ask_until(plan: &LoadPlan, stop: &AtomicBool, begun: &AtomicU64, done: &AtomicU64) -> Vec<Sample> {
    let ask = Ask::new(plan.proto, plan.to).timeout(plan.timeout);
    let ask = plan.from.map_or(ask, |from| ask.from(SocketAddr::new(from, 0)));
    let mut kept: Option<Conversation> = None;
    let mut samples = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        begun.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        let outcome = match kept.take().map_or_else(|| Conversation::open_here(&ask), Ok) {
            Ok(mut conversation) => {
                let outcome = conversation.ask().outcome;
                if plan.fresh {
                    conversation.abort();
                } else if outcome.answer().is_some() {
                    kept = Some(conversation);
                }
                outcome
            }
            Err(outcome) => outcome,
        };
        samples.push(Sample { start, attempt: Attempt { outcome, elapsed: start.elapsed() } });
        done.fetch_add(1, Ordering::Relaxed);
        if !plan.pause.is_zero() {
            std::thread::sleep(plan.pause);
        }
    }
    samples
}

/// Every result of a load.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order of their beginning.
    pub samples: Vec<Sample>,
}

impl Report {
    /// Answers by server.
    pub fn by_server(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for server in self.samples.iter().filter_map(|sample| sample.attempt.outcome.server()) {
            *counts.entry(server.to_owned()).or_default() += 1;
        }
        counts
    }

    /// Requests that were not answered.
    pub fn failures(&self) -> Vec<&Sample> {
        self.samples.iter().filter(|sample| sample.attempt.outcome.answer().is_none()).collect()
    }

    /// The same but for those whose answer took a segment sent again: a packet may have been late, not lost.
    pub fn unanswered(&self) -> Vec<&Sample> {
        self.samples.iter().filter(|sample| sample.attempt.outcome.answer_at_last().is_none()).collect()
    }

    /// The slowest answer.
    pub fn slowest(&self) -> Duration {
        self.samples.iter().map(|sample| sample.attempt.elapsed).max().unwrap_or_default()
    }

    /// When the last request began that this server answered, or was the last to begin at all.
    pub fn last_start_at(&self, server: &str) -> Option<Instant> {
        self.samples.iter().rev().find(|sample| sample.attempt.outcome.server() == Some(server)).map(|s| s.start)
    }

    /// The first answer by this server among the requests that began after `since`.
    pub fn first_answer_by(&self, server: &str, since: Instant) -> Option<Instant> {
        self.samples
            .iter()
            .filter(|sample| sample.start >= since && sample.attempt.outcome.server() == Some(server))
            .map(Sample::end)
            .min()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failures = self.failures();
        write!(f, "{} requests, {} failed", self.samples.len(), failures.len())?;
        for (server, count) in self.by_server() {
            write!(f, ", {count} by {server}")?;
        }
        let mut kinds = BTreeMap::<String, usize>::new();
        for sample in failures {
            *kinds.entry(sample.attempt.outcome.to_string()).or_default() += 1;
        }
        for (kind, count) in kinds {
            write!(f, "; {count} × {kind}")?;
        }
        write!(f, "; slowest {:.1} ms", self.slowest().as_secs_f64() * 1e3)
    }
}

/// Outcomes as text, one a line with its number, for failure messages.
pub fn tally<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> String {
    let mut counts = BTreeMap::<String, usize>::new();
    for outcome in outcomes {
        let shown = match outcome {
            Outcome::Answered(answer) => format!("answered by {}", answer.server),
            other => other.to_string(),
        };
        *counts.entry(shown).or_default() += 1;
    }
    counts.iter().map(|(outcome, count)| format!("{count} × {outcome}")).collect::<Vec<_>>().join(", ")
}
