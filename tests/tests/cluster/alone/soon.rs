//! How long a new Service takes.

use std::time::{Duration, Instant};

use fairlead_lab::Proto;
use serde_json::json;

use crate::{agent::ms, fixture::SOON, upstream::world_alone};

/// From the creation of a Service and its Pod to its first answer: the median of them, on a machine that does nothing else.
const SERVED: Duration = Duration::from_millis(500);

/// e2e 104, to the end: not only the slice is there soon, the Service answers.
#[test]
fn e2e_104_a_new_service_and_its_pod_are_served_soon() {
    let world = world_alone();
    let mut took: Vec<_> = (0..20)
        .map(|number| {
            let name = format!("soon-{number}");
            let began = Instant::now();
            let vips = world.vips(&name, json!({}));
            world.run_pod(&name, "pod-a");
            world.ask_until(SOON, Proto::Udp, vips.v6, "answered", |outcome| outcome.server() == Some("pod-a"));
            began.elapsed()
        })
        .collect();
    took.sort();
    let (median, slowest) = (took[took.len() / 2], took[took.len() - 1]);
    println!("a Service and its Pod, from their creation to the first answer: p50 {}, max {}", ms(median), ms(slowest));
    assert!(median < SERVED, "the median is {}", ms(median));
}
