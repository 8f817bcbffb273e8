//! Other people's programs on the same devices: they keep running, and they are there when we have gone.

use std::{ffi::CString, sync::PoisonError, time::Duration};

use fairlead_lab::{AgentOptions, Ask, Capture, Outcome, Proto, server::wait_until, topology::Host};
pub(crate) use fairlead_tests::foreign::pin;
use fairlead_tests::{
    foreign::{self, Policy, TCX, attach},
    not_run,
};

use crate::cell::{Cell, Cluster, PATIENCE, TARGET, answered, eventually};

const NEXT: i32 = -1;
const DROP: i32 = 2;

/// What a program of two instructions is called that returns a verdict.
pub(crate) const NAME: &str = "foreign_verdict";

/// Loads it.
pub(crate) fn program(verdict: i32) -> std::io::Result<std::os::fd::OwnedFd> {
    foreign::load(&CString::new(NAME)?, &[foreign::mov(0, verdict), foreign::EXIT])
}

pub(crate) fn has_tcx() -> bool {
    proxy_agent::dataplane::probe::features().expect("programs can be loaded").tcx
}

#[test]
fn a_foreign_tcx_program_keeps_its_say_beside_ours() {
    if !has_tcx() {
        not_run::because("this kernel has no tcx, for others or for us");
        return;
    }
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let (service, client) = (cluster.service("tcx"), &cluster.lab.client);
    let ask = Ask::new(Proto::Udp, service.vip(false)).timeout(Duration::from_millis(100));
    service.serve(&service.pods(&[0]), &client.ns, ask).unwrap();
    let (next, drop_all) = (program(NEXT).unwrap(), program(DROP).unwrap());
    for hook in TCX {
        let _beside = attach(&cluster.lab.node.ns, &client.node_device, &next, hook).unwrap();
        answered(&client.ns, ask.timeout(PATIENCE)).unwrap();
        let dropping = attach(&cluster.lab.node.ns, &client.node_device, &drop_all, hook).unwrap();
        let attempt = ask.once(&client.ns).unwrap();
        assert_eq!(attempt.outcome, Outcome::Timeout, "hook {hook}: the foreign verdict was not heard");
        // A restart and a clean-up take away what is ours, not what is theirs.
        let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
        agent.stop().unwrap();
        agent.restart(&cluster.lab).unwrap();
        assert_eq!(ask.once(&client.ns).unwrap().outcome, Outcome::Timeout, "hook {hook}, after a restart");
        drop(dropping);
        drop(agent);
        eventually("an answer without the foreign program", &client.ns, ask, |a| a.outcome.answer().is_some()).unwrap();
    }
}

#[test]
fn a_foreign_clsact_filter_keeps_its_say_and_outlives_us() {
    let cluster = Cluster::own(Cell::named("bridge_conntrack"), AgentOptions::default());
    let (service, client) = (cluster.service("clsact"), &cluster.lab.client);
    let (node, device) = (&cluster.lab.node.ns, &*client.node_device);
    let ask = Ask::new(Proto::Udp, service.vip(false)).timeout(Duration::from_millis(100));
    service.serve(&service.pods(&[0]), &client.ns, ask).unwrap();
    // The qdisc may be there already: the agent's, or the kernel's own.
    node.output("tc", &["qdisc", "add", "dev", device, "clsact"]).ok();
    let pinned = fairlead_lab::janitor::BPF_FS.to_owned() + "/" + &cluster.lab.id + "-foreign";
    pin(&program(DROP).unwrap(), pinned.as_ref()).unwrap();
    let add = |hook: &str| {
        let place = ["filter", "add", "dev", device, hook, "prio", "77", "protocol", "all"];
        node.output("tc", &[&place[..], &["bpf", "direct-action", "object-pinned", &pinned]].concat())
    };
    for hook in ["ingress", "egress"] {
        add(hook).unwrap();
        assert_eq!(ask.once(&client.ns).unwrap().outcome, Outcome::Timeout, "{hook}: the foreign filter was passed by");
        {
            let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
            agent.stop().unwrap();
            agent.restart(&cluster.lab).unwrap();
            agent.stop().unwrap();
            agent.fairlead(&["cleanup"]).unwrap();
            let listed = node.output("tc", &["filter", "show", "dev", device, hook]).unwrap();
            assert!(listed.contains("pref 77"), "{hook}: clean-up took the foreign filter away:\n{listed}");
            agent.restart(&cluster.lab).unwrap();
        }
        assert_eq!(ask.once(&client.ns).unwrap().outcome, Outcome::Timeout, "{hook}, after a restart");
        node.output("tc", &["filter", "del", "dev", device, hook, "prio", "77"]).unwrap();
        eventually("an answer without the foreign filter", &client.ns, ask, |a| a.outcome.answer().is_some()).unwrap();
    }
    std::fs::remove_file(pinned).unwrap();
}

/// What a pod sends to itself is turned round at its device, unless somebody there has to see it.
#[test]
fn a_policy_that_comes_and_goes_sees_what_a_pod_sends_to_itself() {
    if !has_tcx() {
        not_run::because("the policy is attached by tcx, which this kernel does not have");
        return;
    }
    let cluster = Cluster::own(Cell::named("routed_conntrack"), AgentOptions::default());
    let (service, pod) = (cluster.service("itself"), &cluster.lab.pods[0]);
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    service.serve(&service.pods(&[0]), &pod.ns, ask).unwrap();
    // Whoever routes the packet takes one from its TTL.
    let comes_with = |ttl| wait_until(PATIENCE, || ttl_of_request(pod, ask) == Some(ttl));
    assert!(comes_with(64), "the pod's request did not come straight back");
    let mut policy = Policy::load(TARGET).unwrap();
    policy.attach_tcx(&cluster.lab.node.ns, &pod.node_device).unwrap();
    assert!(comes_with(63), "the policy did not let the pod reach itself");
    answered(&pod.ns, ask).unwrap();
    drop(policy);
    assert!(comes_with(64), "the pod's request takes the stack with nobody there to see it");
}

/// The TTL with which a pod's request comes back to it, if it is answered.
fn ttl_of_request(pod: &Host, ask: Ask) -> Option<u8> {
    let capture = Capture::start(&pod.ns, "eth0").unwrap();
    let attempt = ask.timeout(Duration::from_millis(300)).once(&pod.ns).unwrap();
    let packets = capture.stop();
    attempt.outcome.answer()?;
    let arrived = |packet: &&fairlead_lab::packet::Packet| {
        !packet.outgoing && packet.sockets().is_some_and(|(_, dst)| dst.port() == TARGET)
    };
    packets.iter().find(arrived).map(|packet| packet.ttl)
}
