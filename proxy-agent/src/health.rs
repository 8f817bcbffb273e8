//! Is the proxy keeping up, and may this node get traffic? kube-proxy's rules 115–120: pure, and asked by [`server`] and
//! by [`node_ports`].

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use crate::model::{Families, IpFamily};

pub mod node_ports;
pub mod server;

/// A change that has waited this long means that the proxy does not keep up: twice kube-proxy's sync period.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A point in time: how long ago it was, and what a clock on the wall showed.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    at: Instant,
    wall: Timestamp,
}

impl Moment {
    /// The present.
    pub fn now() -> Self {
        Self { at: Instant::now(), wall: Timestamp::now() }
    }

    /// Time from an earlier one to this.
    pub fn since(&self, earlier: Self) -> Duration {
        self.at.saturating_duration_since(earlier.at)
    }

    /// On the wall.
    pub const fn wall(&self) -> Timestamp {
        self.wall
    }
}

#[derive(Debug, Default)]
struct Family {
    /// Of the oldest change that waits.
    queued: Option<Moment>,
    /// Of the last sync; without one the family is not judged.
    updated: Option<Moment>,
}

#[derive(Debug, Default)]
struct State {
    v4: Family,
    v6: Family,
    /// Whether the node is about to go; `None`: not known (yet).
    leaving: Option<bool>,
}

impl State {
    const fn family(&mut self, family: IpFamily) -> &mut Family {
        match family {
            IpFamily::V4 => &mut self.v4,
            IpFamily::V6 => &mut self.v6,
        }
    }
}

/// What the control plane tells and the servers ask.
#[derive(Debug, Default)]
pub struct Health(Mutex<State>);

impl Health {
    /// Changes of these families wait. The clock runs from the first of them.
    pub fn queued(&self, families: Families, now: Moment) {
        let mut state = self.state();
        for family in families.iter() {
            let queued = &mut state.family(family).queued;
            if mutant!("rule-116") {
                *queued = None;
            }
            queued.get_or_insert(now);
        }
    }

    /// These families are up to date.
    pub fn updated(&self, families: Families, now: Moment) {
        let mut state = self.state();
        for family in families.iter() {
            *state.family(family) = Family { queued: None, updated: Some(now) };
        }
    }

    /// The node's own object is known, and says whether the node is about to go. That the object is gone is not told: the
    /// last word stays (rule 118).
    pub fn node(&self, leaving: bool) {
        self.state().leaving = Some(leaving);
    }

    /// How things stand. `Verdict::healthy` leaves the node aside.
    pub fn judge(&self, now: Moment) -> Verdict {
        let state = self.state();
        let late = |family: &Family| family.queued.is_some_and(|queued| now.since(queued) >= TIMEOUT);
        let status = |family: &Family| {
            family.updated.map(|updated| FamilyStatus { last_updated: updated.wall, healthy: !late(family) })
        };
        let status = Status { v4: status(&state.v4), v6: status(&state.v6) };
        if mutant!("rule-116-starting") && status.v4.is_none() {
            return Verdict { healthy: false, eligible: false, status, now: now.wall };
        }
        if mutant!("rule-116-families") {
            let healthy = status.v4.is_none_or(|family| family.healthy);
            return Verdict { healthy, eligible: true, status, now: now.wall };
        }
        Verdict {
            healthy: [&status.v4, &status.v6].into_iter().flatten().all(|family| family.healthy),
            eligible: state.leaving == Some(false),
            status,
            now: now.wall,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment: it is whole even after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One family in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyStatus {
    last_updated: Timestamp,
    healthy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Status {
    #[serde(rename = "IPv4", skip_serializing_if = "Option::is_none")]
    v4: Option<FamilyStatus>,
    #[serde(rename = "IPv6", skip_serializing_if = "Option::is_none")]
    v6: Option<FamilyStatus>,
}

/// How things stand at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// No family is late.
    pub healthy: bool,
    /// The node is known, and not about to go.
    pub eligible: bool,
    status: Status,
    now: Timestamp,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// `/healthz`: may load balancers send this node traffic?
    Ready,
    /// `/livez`: does the proxy work?
    Live,
}

/// The body of the answer (rule 119).
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
}

impl Verdict {
    /// The answer: yes or no, and the body.
    pub fn answer(&self, question: Question) -> (bool, String) {
        let yes = self.healthy && (question == Question::Live || self.eligible || mutant!("rule-117"));
        let families = [self.status.v4, self.status.v6];
        let last = families.into_iter().flatten().map(|family| family.last_updated).max();
        let body = Body {
            // A healthy proxy always was up to date just now; so old clients read it.
            last_updated: if yes && !mutant!("rule-119") { self.now } else { last.unwrap_or(NEVER) },
            current_time: self.now,
            node_eligible: (question == Question::Ready).then_some(self.eligible),
            healthy: self.healthy,
            status: families.iter().any(Option::is_some).then_some(self.status),
        };
        (yes, serde_json::to_string(&body).expect("plain fields become JSON"))
    }
}

/// Go's zero time, year 1.
const NEVER: Timestamp = Timestamp::constant(-62_135_596_800, 0);

#[cfg(test)]
mod tests;
