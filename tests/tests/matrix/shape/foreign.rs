//! A policy program of somebody else's on every pod's device. It stands there before the agents come.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Ask, Lab, Netfilter, Outcome, Pod, Proto, agent::mount_bpf_fs, client::SILENCE, janitor};
use fairlead_tests::{
    foreign::Policy,
    nodes::{Nodes, TARGET},
};

pub(super) fn tcx(nodes: &Nodes) -> Result<Vec<Policy>> {
    attach(nodes, |policy, lab, pod| Ok(policy.attach_tcx(&lab.node.ns, &pod.node_device)?))
}

pub(super) fn clsact(nodes: &Nodes) -> Result<Vec<Policy>> {
    mount_bpf_fs()?;
    attach(nodes, |policy, lab, pod| {
        let pin = Path::new(janitor::BPF_FS).join(format!("{}-{}-{}", lab.id, lab.number, pod.name));
        policy.attach_clsact(&lab.node.ns, &pod.node_device, &pin)
    })
}

fn attach(nodes: &Nodes, by: impl Fn(&mut Policy, &Lab, &Pod) -> Result<()>) -> Result<Vec<Policy>> {
    let mut policies = Vec::new();
    for lab in &nodes.labs {
        for pod in lab.all_pods() {
            let mut policy = Policy::load(TARGET).context("a policy program")?;
            by(&mut policy, lab, pod).with_context(|| format!("a policy on {}", pod.node_device))?;
            policies.push(policy);
        }
        if lab.config.netfilter != Netfilter::None {
            // A pod's packets to itself pass the stack here, whose own redirects quote a connection that it has not confirmed
            // yet. Nobody gets one: that is looked at by captures.
            let rule = ["insert", "rule", "inet", "lab", "output", "icmpv6", "type", "nd-redirect", "accept"];
            lab.node.ns.output("nft", &rule)?;
        }
        // It is in force: without it this port would refuse.
        let unasked = Ask::new(Proto::Udp, (lab.client.v4, 9).into()).timeout(SILENCE);
        let attempt = unasked.once(&lab.node.ns)?;
        ensure!(attempt.outcome == Outcome::Timeout, "the policy of {} let a stranger in: {attempt}", lab.client.name);
    }
    Ok(policies)
}
