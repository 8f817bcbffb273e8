//! What is measured, in Prometheus' own library; `docs/metrics.md` describes each metric. Names of kube-proxy's mean the
//! same as there.
//!
//! What somebody counts anyway (programs, control plane, devices) is read when it is asked for: see [`gather`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

use crate::health::{Moment, Question};
use crate::model::{Families, IpFamily};

mod api;
pub mod gather;
mod process;
pub mod server;

pub use api::ApiMetrics;

type FamilyLabel = [(&'static str, &'static str); 1];
type CodeLabel = [(&'static str, String); 1];
type Seconds = Gauge<f64, std::sync::atomic::AtomicU64>;

const fn label(family: IpFamily) -> FamilyLabel {
    [(
        "ip_family",
        match family {
            IpFamily::V4 => "IPv4",
            IpFamily::V6 => "IPv6",
        },
    )]
}

/// kube-proxy's buckets: 0.25 s, 0.5 s, every second to a minute, every 5 s to two, every 30 s to five.
fn programming() -> Histogram {
    let buckets = linear_buckets(0.25, 0.25, 2)
        .chain(linear_buckets(1.0, 1.0, 59))
        .chain(linear_buckets(60.0, 5.0, 12))
        .chain(linear_buckets(120.0, 30.0, 7));
    Histogram::new(buckets)
}

/// What the control plane measures.
#[derive(Clone, Debug)]
pub struct Syncs {
    started: SystemTime,
    programming: Family<FamilyLabel, Histogram, fn() -> Histogram>,
    duration: Histogram,
    last_queued: Family<FamilyLabel, Seconds>,
    last_done: Family<FamilyLabel, Seconds>,
}

impl Syncs {
    fn new(started: SystemTime, registry: &mut Registry) -> Self {
        let syncs = Self {
            started,
            programming: Family::new_with_constructor(programming),
            duration: Histogram::new(exponential_buckets(0.000_064, 2.0, 18)),
            last_queued: Family::default(),
            last_done: Family::default(),
        };
        // From the start, so that the first observation is an increase.
        for family in IpFamily::ALL {
            drop(syncs.programming.get_or_create(&label(family)));
        }
        registry.register(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of a Service or Pod that an EndpointSlice follows from, to the kernel's maps",
            syncs.programming.clone(),
        );
        registry.register(
            "fairlead_sync_duration_seconds",
            "Time that one sync took: all changes that had arrived, planned and written",
            syncs.duration.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When a sync was last due",
            syncs.last_queued.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When a sync last succeeded",
            syncs.last_done.clone(),
        );
        syncs
    }

    /// Changes of these families wait.
    pub fn queued(&self, families: Families, now: Moment) {
        for family in families.iter() {
            self.last_queued.get_or_create(&label(family)).set(secs(now));
        }
    }

    /// A sync has brought the families that `waited`, but for those that are `behind`, up to date.
    pub fn done(&self, waited: Families, behind: Families, began: Moment, ended: Moment) {
        if waited != Families::NONE {
            self.duration.observe(ended.since(began).as_secs_f64());
        }
        for family in waited.without(behind).iter() {
            self.last_done.get_or_create(&label(family)).set(secs(ended));
        }
    }

    /// A change is in the kernel that was `caused` then, since 1970. One from before the start says nothing about this agent.
    pub fn programmed(&self, family: IpFamily, caused: Duration) {
        let caused = SystemTime::UNIX_EPOCH + caused;
        if caused > self.started {
            // A clock ahead of this node's: as if at once.
            let took = SystemTime::now().duration_since(caused).unwrap_or(Duration::ZERO);
            self.programming.get_or_create(&label(family)).observe(took.as_secs_f64());
        }
    }
}

fn secs(moment: Moment) -> f64 {
    moment.wall().as_duration().as_secs_f64()
}

fn code(status: StatusCode) -> CodeLabel {
    [("code", status.as_str().to_owned())]
}

/// Answers of the health server, by code.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    ready: Family<CodeLabel, Counter>,
    live: Family<CodeLabel, Counter>,
}

impl Answers {
    fn new(registry: &mut Registry) -> Self {
        let answers = Self::default();
        for status in [StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE] {
            drop(answers.ready.get_or_create(&code(status)));
            drop(answers.live.get_or_create(&code(status)));
        }
        registry.register("kubeproxy_proxy_healthz", "Answers to /healthz", answers.ready.clone());
        registry.register("kubeproxy_proxy_livez", "Answers to /livez", answers.live.clone());
        answers
    }

    /// One answer was given.
    pub fn count(&self, question: Question, status: StatusCode) {
        let family = match question {
            Question::Ready => &self.ready,
            Question::Live => &self.live,
        };
        family.get_or_create(&code(status)).inc();
    }
}

/// Everything that is measured.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    gathered: Arc<gather::Gathered>,
    /// For the control plane.
    pub syncs: Syncs,
    /// For the health server.
    pub answers: Answers,
    /// For the API's lists and watches.
    pub api: ApiMetrics,
}

impl Metrics {
    /// Of an agent that starts now.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let syncs = Syncs::new(SystemTime::now(), &mut registry);
        let answers = Answers::new(&mut registry);
        let api = ApiMetrics::new(&mut registry);
        let gathered = Arc::new(gather::Gathered::default());
        registry.register_collector(Box::new(Arc::clone(&gathered)));
        registry.register_collector(Box::new(process::Process));
        Self { registry, gathered, syncs, answers, api }
    }

    /// All metrics in the OpenMetrics text format, with what was gathered last.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string fails only if a metric refuses to be written, which none does.
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "metrics could not be written");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
