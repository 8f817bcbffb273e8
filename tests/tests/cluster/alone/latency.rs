//! From a write to the API to its effect on traffic.

use std::{
    env,
    time::{Duration, Instant},
};

use fairlead_lab::schedule::{self, Preferred};

use super::Quiet;
use crate::{
    agent::ms,
    fixture::{Cluster, SOON},
    objects,
    plane::is_status,
    prober::Prober,
};

/// How long the agent may take until it has seen everything that was there before.
const MANY: Duration = Duration::from_secs(30);
/// Changes of a series.
const CHANGES: usize = 100;
/// Series of which one must keep the bounds: an agent that is slow is slow in each, a machine now and then.
const SERIES: usize = 5;
/// Bounds of the median and of the slowest change.
const MEDIAN: Duration = Duration::from_millis(5);
const SLOWEST: Duration = Duration::from_millis(50);
/// A pause of the machine, or between two questions of the prober, that spoils a measurement; it is taken again.
const STALL: Duration = Duration::from_millis(8);
/// How long that may go on.
const TRIED: Duration = Duration::from_secs(300);
/// Shared machines of continuous integration give a process its turn late; there the bounds are this many times wider.
const CI_FACTOR: u32 = 4;

#[test]
fn a_hundred_changes_in_a_row_take_effect_within_milliseconds() {
    let _first = Preferred::new();
    a_hundred_changes(&Quiet::wait(), "one-of-few");
}

/// The same, beside whatever else there is in the cluster.
pub(super) fn a_hundred_changes(cluster: &Cluster, service: &str) {
    let vips = cluster.create_service(service);
    cluster.create_slices(service, &["pod-a"]);
    cluster.served_by(&vips, "pod-a", MANY);
    let prober = Prober::start(&cluster.lab.client.ns, vips.v4);
    prober.first_answer("pod-a", Instant::now(), SOON).expect("nobody answers the prober");

    let factor = if env::var("CI").is_ok_and(|value| value == "true") { CI_FACTOR } else { 1 };
    println!("bounds (x {factor}): median {}, slowest {}", ms(MEDIAN * factor), ms(SLOWEST * factor));
    let (mut series, mut change) = (Vec::new(), 0);
    for _ in 0..SERIES {
        let summary = measure(cluster, service, &prober, &mut change);
        if summary.median <= MEDIAN * factor && summary.slowest <= SLOWEST * factor {
            return;
        }
        series.push(summary.to_string());
    }
    panic!("the median or the slowest was over its bound in each series:\n{}", series.join("\n"));
}

/// One series, from the answers to the writes. `change` counts through all series: odd ones lead to pod-b.
fn measure(cluster: &Cluster, service: &str, prober: &Prober, change: &mut usize) -> Summary {
    let slices = ["pod-a", "pod-b"].map(|pod| objects::slice(service, false, &cluster.addresses(&[pod], false)));
    let (mut since_request, mut since_answer, mut spoilt) = (Vec::new(), Vec::new(), 0);
    let began = Instant::now();
    while since_request.len() < CHANGES {
        *change += 1;
        assert!(began.elapsed() < TRIED, "the machine is too busy to measure: it paused in {spoilt} changes");
        let (old, new) = if change.is_multiple_of(2) { ("pod-b", "pod-a") } else { ("pod-a", "pod-b") };
        let requested = Instant::now();
        cluster.api.replace(&slices[*change % 2]).unwrap();
        let written = Instant::now();
        let effect = prober.first_answer(new, requested, SOON).unwrap_or_else(|| {
            panic!(
                "change {change}: {new} did not answer within {SOON:?}; the agent's log:\n{}",
                cluster.agent.log_tail()
            )
        });
        // A prober, or a machine, that was not given the processor has measured nothing.
        let pause = prober.longest_pause(requested, effect.at).max(schedule::longest_pause(requested, effect.at));
        if pause < STALL {
            since_request.push(effect.at - requested);
            // The watch may be faster than the answer to the write.
            since_answer.push(effect.at.saturating_duration_since(written));
        } else {
            spoilt += 1;
        }

        // A few questions more: once the new endpoint has answered, the old one gets no new flow.
        std::thread::sleep(Duration::from_millis(10));
        let late: Vec<_> =
            prober.heard().into_iter().filter(|heard| heard.asked > effect.asked && heard.server == old).collect();
        assert!(late.is_empty(), "change {change}: {old} still answered {} later questions", late.len());
    }
    let of_answer = Summary::of(since_answer);
    println!("{CHANGES} changes, from the request of the write to the first answer:  {}", Summary::of(since_request));
    println!("{CHANGES} changes, from the answer to the write to the first answer:  {of_answer}");
    println!("measured again because the machine paused: {spoilt}");
    of_answer
}

/// Creates until it is created: a server that is short of time ends connections without an answer, and may have
/// created all the same.
pub(super) async fn insist<K>(create: impl AsyncFn() -> kube::Result<K>) {
    for attempt in 1.. {
        match create().await {
            Ok(_) => return,
            Err(error) if is_status(&error, 409) => return,
            Err(error) => assert!(attempt < 10, "not created by {attempt} attempts: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

struct Summary {
    median: Duration,
    p99: Duration,
    slowest: Duration,
}

impl Summary {
    fn of(mut durations: Vec<Duration>) -> Self {
        durations.sort();
        let at = |percent: usize| durations[(durations.len() * percent).div_ceil(100) - 1];
        Self { median: at(50), p99: at(99), slowest: at(100) }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p50 {}, p99 {}, max {}", ms(self.median), ms(self.p99), ms(self.slowest))
    }
}

#[test]
fn the_summary_of_a_hundred_durations_is_by_rank() {
    let summary = Summary::of((1..=100).map(Duration::from_millis).collect());
    assert_eq!(summary.to_string(), "p50 50.00 ms, p99 99.00 ms, max 100.00 ms");
}
