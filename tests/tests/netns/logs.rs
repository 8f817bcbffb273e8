//! What the agent logs: JSON on request, and what it found in one event at its start.

use fairlead_lab::AgentOptions;
use serde_json::Value;

use crate::cell::{Cell, Cluster};

#[test]
fn with_json_every_line_is_an_object_and_one_says_what_was_found() {
    let args = ["--log-format", "json", "--log", "debug"].map(Into::into).to_vec();
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions { args, ..AgentOptions::default() });
    cluster.agent.lock().unwrap().stop().unwrap();
    let log = cluster.agent.lock().unwrap().log_text();
    let events: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}")))
        .collect();
    for event in &events {
        let texts = ["timestamp", "level", "target", "message"].map(|field| event[field].as_str());
        assert!(texts.iter().all(Option::is_some), "{event}");
    }
    let [start] = &events.iter().filter(|event| event["message"] == "serving this node").collect::<Vec<_>>()[..] else {
        panic!("one event says what was found:\n{log}")
    };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(start["kernel"], kernel.trim());
    assert_eq!((&start["mode"], &start["node"]), (&"tc".into(), &fairlead_lab::manifest::NODE_NAME.into()));
    for field in ["tcx", "fib_source", "ipv6", "kube_proxy"] {
        assert!(start[field].is_boolean(), "{field}: {start}");
    }
    let attach = if start["tcx"] == true { "tcx" } else { "clsact" };
    assert_eq!(start["attach"], attach);
    assert!(start["cgroup_root"].is_string() && start["version"].is_string(), "{start}");
    assert!(start["source"].as_str().is_some_and(|source| source.starts_with("manifests in /")), "{start}");
    let mut devices: Vec<_> = start["devices"].as_str().unwrap().split(' ').map(str::to_owned).collect();
    let pods = cluster.lab.all_pods().map(|pod| format!("{}=pod", pod.node_device));
    let mut wanted: Vec<_> = pods.chain(["eth0=uplink".to_owned(), "lo=loopback".to_owned()]).collect();
    devices.sort();
    wanted.sort();
    assert_eq!(devices, wanted);
    let last = events.last().unwrap();
    assert_eq!((&last["level"], &last["signal"]), (&"INFO".into(), &"SIGTERM".into()), "{last}");
}
