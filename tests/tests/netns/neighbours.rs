//! Where ours stands among other people's programs: first at ingress, last at egress. Who comes in between is told.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, LinkOrder};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{SchedClassifier, TcAttachType};
use fairlead_lab::{AgentOptions, Ask, Load, LoadPlan, Proto, janitor, netns, server::wait_until};
use fairlead_tests::{listed, not_run};
use proxy_common::ABI_VERSION;
use serde_json::Value;

use crate::cell::{Cell, Cluster, PATIENCE, eventually};
use crate::foreign::{NAME, has_tcx, pin, program};

/// `TCX_NEXT`.
const NEXT: i32 = -1;
/// Nobody answers for so long where nothing translates.
const SHORT: Duration = Duration::from_millis(100);

/// A foreign program at the very place that is ours. Its link goes with what is returned.
fn in_our_place(cluster: &Cluster, device: &str, hook: TcAttachType) -> FdLink {
    let path = format!("{}/{}-neighbour", janitor::BPF_FS, cluster.lab.id);
    pin(&program(NEXT).expect("a program"), path.as_ref()).expect("it is pinned");
    let mut program = SchedClassifier::from_pin(&path).expect("it is there");
    fs::remove_file(path).expect("it was pinned");
    let order = if hook == TcAttachType::Ingress { LinkOrder::first() } else { LinkOrder::last() };
    let attach = || {
        let id = program.attach_with_options(device, hook, TcAttachOptions::TcxOrder(order)).expect("it is attached");
        program.take_link(id).expect("the link").try_into().expect("a link of tcx")
    };
    cluster.lab.node.ns.run(attach).expect("the namespace is there")
}

/// What `fairlead devices` says of a device.
fn row(cluster: &Cluster, device: &str) -> Value {
    let agent = cluster.agent.lock().expect("no other case uses this cluster");
    listed::device(&agent, device).expect("a list").expect("the device is listed")
}

/// Ours and others, in the order in which they run.
fn order(row: &Value, hook: &str) -> Vec<bool> {
    row[hook].as_array().into_iter().flatten().map(|program| program["own"] == true).collect()
}

#[test]
fn pitfall_p1_9_ours_is_put_back_where_somebody_came_in_between() {
    if !has_tcx() {
        not_run::because("this kernel has no tcx: filters have priorities, and keep them");
        return;
    }
    let cluster = Cluster::own(Cell::named("routed_conntrack"), AgentOptions::default());
    let (service, client) = (cluster.service("between"), &cluster.lab.client);
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    service.serve(&service.pods(&[0]), &client.ns, ask).expect("a Service");
    let plan = LoadPlan { workers: 1, pause: Duration::from_micros(500), ..LoadPlan::new(Proto::Tcp, ask.to) };
    let load = Load::start(&client.ns, plan).expect("a load");
    let device = &*client.node_device;
    let foreign = [TcAttachType::Ingress, TcAttachType::Egress].map(|hook| in_our_place(&cluster, device, hook));
    let restored = || {
        let row = row(&cluster, device);
        order(&row, "at_ingress") == [true, false] && order(&row, "at_egress") == [false, true]
    };
    assert!(wait_until(PATIENCE, restored), "{:#}\n{}", row(&cluster, device), cluster.agent_log_tail());
    assert_eq!(row(&cluster, device)["conflicts"], Value::Array(Vec::new()));
    assert!(load.turn_over(), "a request hangs");
    let report = load.stop();
    // For microseconds a packet may meet ours twice; its sender repeats it.
    assert!(report.unanswered().is_empty() && report.failures().len() <= 2, "while ours moved: {report}");
    drop(foreign);
    assert_eq!(order(&row(&cluster, device), "at_ingress"), [true], "a foreign program outlives its link");
}

/// Somebody detaches ours and says nothing of it.
fn detached(attach: &str, detach: impl FnOnce(&Cluster, &str)) {
    let args = vec![format!("--attach={attach}").into()];
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions { args, ..AgentOptions::default() });
    let (service, client) = (cluster.service("detached"), &cluster.lab.client);
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    service.serve(&service.pods(&[0]), &client.ns, ask).expect("a Service");
    let device = &*client.node_device;
    let begun = Instant::now();
    detach(&cluster, device);
    let log = || cluster.agent.lock().expect("no other case uses this cluster").log_text();
    let told = |line: &str| line.contains("somebody has detached it") && line.contains(device);
    assert!(wait_until(PATIENCE, || log().lines().any(told)), "{}", log());
    println!("{attach}: found {:?} later", begun.elapsed());
    eventually("an answer", &client.ns, ask.timeout(SHORT), |a| a.outcome.answer().is_some()).expect("ours again");
    let row = row(&cluster, device);
    assert_eq!([order(&row, "at_ingress"), order(&row, "at_egress")], [[true], [true]], "{row:#}");
}

#[test]
fn a_detached_link_is_attached_again() {
    if !has_tcx() {
        not_run::because("this kernel has no tcx");
        return;
    }
    detached("tcx", |cluster, device| {
        let ingress = row(cluster, device)["at_ingress"][0]["link"].to_string();
        netns::run(Command::new("bpftool").args(["link", "detach", "id", &ingress])).expect("it is detached");
    });
}

#[test]
fn a_filter_that_somebody_deletes_is_attached_again() {
    detached("clsact", |cluster, device| {
        cluster.lab.node.ns.output("tc", &["filter", "del", "dev", device, "ingress"]).expect("it is deleted");
    });
}

#[test]
fn filters_that_go_with_their_qdisc_are_attached_again() {
    detached("clsact", |cluster, device| {
        cluster.lab.node.ns.output("tc", &["qdisc", "del", "dev", device, "clsact"]).expect("it is deleted");
    });
}

/// It is no race: after the third time ours comes back at the next look, and the metric says that somebody insists.
#[test]
fn who_detaches_ours_again_and_again_is_reported() {
    let args = vec!["--attach=clsact".into(), "--metrics-bind-address=127.0.0.1:10249".into()];
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions { args, ..AgentOptions::default() });
    let (device, node) = (&*cluster.lab.client.node_device, &cluster.lab.node.ns);
    for time in 1..=4 {
        node.output("tc", &["filter", "del", "dev", device, "ingress"]).expect("it is deleted");
        let back = || order(&row(&cluster, device), "at_ingress") == [true];
        assert!(wait_until(PATIENCE, back), "the {time}. time: {}", cluster.agent_log_tail());
    }
    let log = cluster.agent.lock().expect("no other case uses this cluster").log_text();
    assert_eq!(log.matches("somebody has detached it").count(), 3, "{log}");
    assert_eq!(log.matches("again and again").count(), 1, "{log}");
    let metrics = fairlead_lab::http::get(node, ([127, 0, 0, 1], 10_249).into(), "/metrics").expect("metrics");
    assert!(metrics.body.contains("fairlead_device_conflicts 1"), "{}", metrics.body);
}

/// The place of the new link's pin is taken: ours stays where it is, and is moved once that is possible. An attempt is costly,
/// so they become rare, whatever else changes meanwhile. A pin that was left there is in nobody's way.
#[test]
fn ours_goes_on_where_it_cannot_be_put_back() {
    if !has_tcx() {
        not_run::because("this kernel has no tcx");
        return;
    }
    let cluster = Cluster::own(
        Cell::named("routed_plain"),
        AgentOptions { args: vec!["--log=info,proxy_agent::devices=debug".into()], ..AgentOptions::default() },
    );
    let (service, client) = (cluster.service("stays"), &cluster.lab.client);
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    service.serve(&service.pods(&[0]), &client.ns, ask).expect("a Service");
    let plan = LoadPlan { workers: 1, pause: Duration::from_millis(1), ..LoadPlan::new(Proto::Tcp, ask.to) };
    let load = Load::start(&client.ns, plan).expect("a load");
    let device = &*client.node_device;
    let links =
        cluster.agent.lock().expect("no other case uses this cluster").pin_path.join(format!("v{ABI_VERSION}/links"));
    let ours = format!("-{}-ingress", row(&cluster, device)["ifindex"]);
    let names = || {
        fs::read_dir(&links)
            .expect("pins")
            .map(|entry| entry.expect("a pin").file_name().into_string().expect("a name"))
    };
    let place = names().find(|name| name.ends_with(&ours)).expect("our link");
    let taken = links.join(place.clone() + "-moved");
    fs::create_dir(&taken).expect("its place is taken");
    let begun = Instant::now();
    let foreign = in_our_place(&cluster, device, TcAttachType::Ingress);
    let log = || cluster.agent.lock().expect("no other case uses this cluster").log_text();
    assert!(wait_until(PATIENCE, || log().contains("foreign programs stay in the way")), "{}", log());
    assert_eq!(order(&row(&cluster, device), "at_ingress"), [false, true]);
    for number in 0..8 {
        let [other, far] = ["other", "far"].map(|name| format!("{name}{number}"));
        let args = ["link", "add", &other, "type", "veth", "peer", "name", &far];
        cluster.lab.node.ns.output("ip", &args).expect("another device");
        assert!(wait_until(PATIENCE, || log().lines().any(|line| line.contains(&other))), "{}", log());
    }
    let attempts = log().matches("stay in the way").count() + log().matches("not put back").count();
    let most = 1 + begun.elapsed().as_secs() / 5;
    assert!(attempts as u64 <= most, "{attempts} attempts, not {most}: {}", log());
    fs::remove_dir(&taken).expect("its place is free");
    let restored = || order(&row(&cluster, device), "at_ingress") == [true, false];
    assert!(wait_until(PATIENCE, restored), "{:#}\n{}", row(&cluster, device), log());
    assert_eq!(log().matches("foreign programs stay in the way").count(), 1, "{}", log());
    assert_eq!(names().filter(|name| name.contains(&ours)).count(), 1, "a link stays beside ours");
    drop(foreign);
    fs::hard_link(links.join(&place), &taken).expect("a pin that is left over");
    let _foreign = in_our_place(&cluster, device, TcAttachType::Ingress);
    assert!(wait_until(PATIENCE, restored), "{:#}\n{}", row(&cluster, device), log());
    assert!(!taken.exists(), "what was left over stays");
    let report = load.stop();
    assert!(report.unanswered().is_empty() && report.failures().len() <= 2, "while ours moved: {report}");
}

/// Filters of clsact run behind every program of tcx: there ours cannot be the first.
#[test]
fn a_program_that_stays_in_front_of_ours_is_reported_by_name() {
    if !has_tcx() {
        not_run::because("this kernel has no tcx: nothing runs before clsact");
        return;
    }
    let args = vec!["--attach=clsact".into(), "--metrics-bind-address=127.0.0.1:10249".into()];
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions { args, ..AgentOptions::default() });
    let device = &*cluster.lab.client.node_device;
    assert_eq!(row(&cluster, device)["conflicts"], Value::Array(Vec::new()));
    let _foreign = in_our_place(&cluster, device, TcAttachType::Ingress);
    let row = row(&cluster, device);
    let id = row["at_ingress"][0]["id"].as_u64().expect("an id");
    let [conflict] = &row["conflicts"].as_array().expect("a list")[..] else { panic!("{row:#}") };
    let wanted = format!("before ingress: {NAME} (program {id}, tcx link ");
    assert!(conflict.as_str().is_some_and(|text| text.starts_with(&wanted)), "{conflict}, not {wanted}");
    let agent = cluster.agent.lock().expect("no other case uses this cluster");
    let told = || {
        let metrics = fairlead_lab::http::get(&cluster.lab.node.ns, ([127, 0, 0, 1], 10_249).into(), "/metrics");
        metrics.is_ok_and(|answer| answer.body.contains("fairlead_device_conflicts 1"))
            && agent.log_text().contains("conflict: foreign programs stand before")
    };
    assert!(wait_until(PATIENCE, told), "{}", agent.log_text());
    let said = agent.fairlead(&["check"]).expect("it can run here");
    let line = said.lines().find(|line| line.contains(device) && line.contains(&format!("program {id}")));
    assert!(line.is_some_and(|line| line.starts_with("note") && line.contains("conflict")), "{said}");
    let wide = agent.fairlead(&["devices", "-o", "wide"]).expect("a table");
    let line = wide.lines().find(|line| line.starts_with(device)).expect("the device");
    assert!(line.contains(&format!("{NAME}#{id}/link")) && line.contains("[ingress_stub]#"), "{wide}");
    assert!(line.contains("no network of its own"), "{wide}");
}
