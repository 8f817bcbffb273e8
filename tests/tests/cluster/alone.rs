//! Cases that measure: one at a time, before all others, and with nothing else to do for the machine.
//!
//! But for [`soon`], which needs controllers, they share a cluster that has none.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fixture::{Cluster, Turn, kept};

mod latency;
mod soon;
mod thousands;

/// Made when first needed.
static QUIET: Mutex<Option<Cluster>> = Mutex::new(None);

/// Removes the cluster of these cases.
pub(crate) fn forget() {
    *QUIET.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// The cluster, for as long as a case has its turn. One in which a case failed is not lent again.
struct Quiet {
    cluster: MutexGuard<'static, Option<Cluster>>,
    _turn: Turn,
}

impl std::ops::Deref for Quiet {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.cluster.as_ref().expect("it was made before it was lent")
    }
}

impl Quiet {
    fn wait() -> Self {
        let turn = Turn::alone();
        let mut cluster = QUIET.lock().unwrap_or_else(|poisoned| {
            QUIET.clear_poison();
            let mut cluster = poisoned.into_inner();
            *cluster = None;
            cluster
        });
        cluster.get_or_insert_with(|| kept(Cluster::without_turn));
        Self { cluster, _turn: turn }
    }
}
