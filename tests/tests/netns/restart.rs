//! The programs are exchanged under full traffic: each start of an agent loads them anew and switches them in. An agent
//! that does not fit what is pinned leaves it alone.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{LazyLock, PoisonError},
    time::{Duration, Instant},
};

use fairlead_lab::{
    Agent, AgentOptions, Ask, Capture, Load, LoadPlan, Proto, agent::READY_LINE, capture, server::wait_until,
};
use proxy_common::ABI_VERSION;

use crate::cell::{Cell, Cluster, PATIENCE, answered};

/// Exchanges of one run.
const EXCHANGES: usize = 5;

/// Names it where it was built before: other kernels are no place to compile on.
const OTHER_BUILD_VARIABLE: &str = "FAIRLEAD_OTHER_BUILD";

/// An object of the same sources by other settings of the compiler: other instructions, the same maps.
static OTHER_BUILD: LazyLock<PathBuf> = LazyLock::new(|| {
    if let Some(built) = std::env::var_os(OTHER_BUILD_VARIABLE) {
        return built.into();
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace");
    let target_dir = &Path::new(env!("CARGO_TARGET_TMPDIR")).join("other-build");
    let options =
        proxy_ebpf_build::Options { workspace, target_dir, features: &[], opt_level: Some("2"), subcommand: "build" };
    proxy_ebpf_build::build(&options).unwrap_or_else(|error| panic!("cannot build the other object: {error}")).object
});

/// What an agent is started with to load another build than its own.
fn other_build() -> Vec<OsString> {
    vec!["--ebpf-object".into(), OTHER_BUILD.as_os_str().to_owned()]
}

/// Restarts the agent under traffic, with these arguments by turns.
fn exchange(cell: &str, v6: bool, builds: &[Vec<OsString>]) {
    let cluster = Cluster::own(Cell::named(cell), AgentOptions::default());
    let (service, client) = (cluster.service("exchange"), &cluster.lab.client);
    let to = service.vip(v6);
    service.serve(&service.pods(&[0, 1, 2]), &client.ns, Ask::new(Proto::Tcp, to)).unwrap();
    let seen = Capture::start(&client.ns, "eth0").unwrap();
    let plan = |proto, fresh| {
        let (workers, pause) = (2, Duration::from_micros(500));
        LoadPlan { fresh, workers, pause, ..LoadPlan::new(proto, to) }
    };
    let resent = cluster.lab.segments_resent().unwrap();
    let plans = [(Proto::Tcp, true), (Proto::Tcp, false), (Proto::Udp, true), (Proto::Udp, false)];
    let loads = plans.map(|(proto, fresh)| Load::start(&client.ns, plan(proto, fresh)).unwrap());
    let (before, began, mut exchanged) = (cluster.outcomes(), Instant::now(), Vec::new());
    let mut tags = vec![tags_of(&cluster)];
    let reports = cluster
        .without_leak(|| {
            for args in builds.iter().cycle().take(EXCHANGES) {
                std::thread::sleep(Duration::from_millis(200));
                let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
                let stopped = began.elapsed();
                agent.stop()?;
                agent.options.args.clone_from(args);
                agent.restart(&cluster.lab)?;
                drop(agent);
                exchanged.push((stopped, began.elapsed()));
                tags.push(tags_of(&cluster));
            }
            anyhow::ensure!(wait_until(PATIENCE, || loads.iter().all(|load| load.done() > 100)), "hardly any traffic");
            std::thread::sleep(Duration::from_millis(200));
            Ok(loads.map(Load::stop))
        })
        .unwrap();
    // Only the Service is asked: whatever comes from an endpoint's own address went untranslated.
    let untranslated: Vec<_> = seen
        .stop()
        .into_iter()
        .filter(|packet| !packet.outgoing && packet.sockets().is_some_and(|(from, _)| from != to))
        .collect();
    assert!(untranslated.is_empty(), "[{cell}] untranslated replies:\n{}", capture::show(untranslated.iter().take(20)));
    for ((proto, fresh), report) in plans.into_iter().zip(&reports) {
        let shown = format!("[{cell} v6={v6} {proto} fresh={fresh}] {EXCHANGES} exchanges: {report}");
        println!("{shown}");
        let lost: Vec<_> = report.failures().iter().map(|sample| sample.start - began).collect();
        assert!(
            lost.is_empty(),
            "{shown}\nlost were those begun at {lost:?}; exchanges: {exchanged:?}; outcomes: {}\n{}",
            cluster.outcomes_since(&before),
            cluster.agent_log_tail()
        );
    }
    assert_eq!(cluster.lab.segments_resent().unwrap() - resent, 0, "[{cell}] packets were lost and sent again");
    let changed = tags.windows(2).filter(|pair| pair[0] != pair[1]).count();
    let expected = if builds.len() > 1 { EXCHANGES } else { 0 };
    assert_eq!(changed, expected, "[{cell}] exchanges for other programs; tags by turns: {tags:?}");
    println!("[{cell}] {changed} exchanges for other programs; tags: {:?}", &tags[..2]);
}

/// The node's addresses stay in the maps, and a first start says that it is done when its devices are served.
#[test]
fn node_ports_are_served_while_an_agent_starts() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let (service, ext) = (cluster.node_port_service("restarted"), &cluster.lab.ext);
    {
        let agent = cluster.agent.lock().expect("no other case uses this cluster");
        let said = agent.log_text();
        let at = |what: &str| said.rfind(what).unwrap_or_else(|| panic!("{what} is not said:\n{said}"));
        assert!(at("device served") < at(READY_LINE), "the first Services do not wait for the devices:\n{said}");
    }
    let to = service.node_port(false);
    service.serve(&service.pods(&[0, 1]), &ext.ns, Ask::new(Proto::Tcp, to)).expect("a NodePort");
    let plan = LoadPlan { workers: 2, pause: Duration::from_micros(500), ..LoadPlan::new(Proto::Tcp, to) };
    let load = Load::start(&ext.ns, plan).expect("a load");
    for _ in 0..EXCHANGES {
        let mut agent = cluster.agent.lock().expect("no other case uses this cluster");
        agent.stop().expect("it ends");
        agent.restart(&cluster.lab).expect("it starts again");
        drop(agent);
        assert!(load.turn_over(), "a request hangs");
    }
    let report = load.stop();
    println!("{EXCHANGES} restarts: {report}");
    assert!(report.failures().is_empty(), "{report}\n{}", cluster.agent_log_tail());
}

/// Tags of the programs that packets meet, by slot.
fn tags_of(cluster: &Cluster) -> BTreeMap<u32, String> {
    cluster.agent.lock().unwrap_or_else(PoisonError::into_inner).program_tags().unwrap()
}

#[test]
fn programs_are_exchanged_under_traffic_over_routed_veths() {
    exchange("routed_conntrack", false, &[vec![]]);
}

#[test]
fn pitfall_p1_12_programs_are_exchanged_for_a_new_build_and_back_under_traffic_over_routed_veths() {
    exchange("routed_invalid_drop", true, &[other_build(), vec![]]);
}

#[test]
fn pitfall_p1_12_programs_are_exchanged_for_a_new_build_and_back_under_traffic_over_a_bridge() {
    exchange("bridge_invalid_drop", true, &[other_build(), vec![]]);
}

#[test]
fn pitfall_p1_12_programs_are_exchanged_for_a_new_build_and_back_under_traffic_over_a_filtered_bridge() {
    exchange("bridge_nf_conntrack", false, &[other_build(), vec![]]);
}

/// An agent that is refused: what it says, while everything goes on.
fn refused(cluster: &Cluster, agent: &mut Agent, args: &[&str]) -> String {
    agent.options.args = args.iter().map(OsString::from).collect();
    let error = agent.restart(&cluster.lab).expect_err("an agent that does not fit has started");
    agent.options.args.clear();
    format!("{error:#}")
}

#[test]
fn an_agent_with_other_layouts_is_refused_and_what_is_attached_goes_on() {
    let cluster = Cluster::own(Cell::named("routed_conntrack"), AgentOptions::default());
    let (service, client) = (cluster.service("layouts"), &cluster.lab.client);
    let to = service.vip(false);
    service.serve(&service.pods(&[0, 1]), &client.ns, Ask::new(Proto::Tcp, to)).unwrap();
    let loads = Proto::ALL.map(|proto| {
        let plan = LoadPlan { workers: 1, pause: Duration::from_millis(2), ..LoadPlan::new(proto, to) };
        Load::start(&client.ns, plan).unwrap()
    });
    let tags = tags_of(&cluster);
    let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
    agent.stop().unwrap();

    // A map of another size stands for one of another layout: its shape differs.
    let said = refused(&cluster, &mut agent, &["--max-flows", "4096"]);
    assert!(said.contains("the pinned map FLOWS_V4 has a number of entries of"), "{said}");
    assert!(said.contains("fairlead cleanup --pin-path"), "{said}");

    // The pins of another version: those of this one are, once they bear its number.
    let [own, older] = [ABI_VERSION, ABI_VERSION - 1].map(|version| agent.pin_path.join(format!("v{version}")));
    std::fs::rename(&own, &older).unwrap();
    let said = refused(&cluster, &mut agent, &[]);
    let versions = format!("have layout version {}, this agent has version {ABI_VERSION}", ABI_VERSION - 1);
    assert!(said.contains(&versions), "{said}");
    assert!(said.contains("fairlead cleanup --pin-path"), "{said}");
    for dir in ["maps", "programs", "links"] {
        std::fs::remove_dir(own.join(dir)).expect("a refused agent pins nothing");
    }
    std::fs::remove_dir(&own).unwrap();
    std::fs::rename(&older, &own).unwrap();

    assert!(wait_until(PATIENCE, || loads.iter().all(|load| load.done() > 50)), "hardly anything was asked");
    for load in loads {
        let report = load.stop();
        assert!(report.failures().is_empty(), "beside refused agents: {report}");
    }
    drop(agent);
    assert_eq!(tags_of(&cluster), tags, "a refused agent has exchanged programs");
    let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
    agent.restart(&cluster.lab).unwrap();
    answered(&client.ns, Ask::new(Proto::Tcp, to)).unwrap();
}
