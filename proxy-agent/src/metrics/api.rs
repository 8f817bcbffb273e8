//! What the lists and watches of the API count.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::index::Kind;

/// Lists and failures, by kind.
#[derive(Clone, Debug, Default)]
pub struct ApiMetrics {
    lists: Family<[(&'static str, &'static str); 1], Counter>,
    errors: Family<[(&'static str, String); 2], Counter>,
}

impl ApiMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for kind in Kind::ALL {
            // From the start, so that the first one is an increase.
            drop(metrics.lists.get_or_create(&[("kind", kind.as_str())]));
            drop(metrics.errors.get_or_create(&labels(kind, "unreachable")));
        }
        registry.register("fairlead_api_lists", "Full lists that the API server gave", metrics.lists.clone());
        registry.register(
            "fairlead_api_errors",
            "Lists and watches that failed, by status or by what went wrong",
            metrics.errors.clone(),
        );
        metrics
    }

    /// A full list is complete.
    pub fn listed(&self, kind: Kind) {
        self.lists.get_or_create(&[("kind", kind.as_str())]).inc();
    }

    /// A list or a watch failed.
    pub fn failed(&self, kind: Kind, reason: &str) {
        self.errors.get_or_create(&labels(kind, reason)).inc();
    }
}

fn labels(kind: Kind, reason: &str) -> [(&'static str, String); 2] {
    [("kind", kind.as_str().to_owned()), ("reason", reason.to_owned())]
}
