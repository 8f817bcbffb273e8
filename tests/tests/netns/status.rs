//! What `fairlead services` says of Services that are not served, or not wholly: of a running agent, of one that died,
//! and after it.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use fairlead_lab::{Agent, AgentOptions, Ask, Proto, server::wait_until};
use fairlead_tests::listed;

use crate::cell::{Cell, Cluster, PATIENCE};

const UNSERVED: &str = "older Service";

#[test]
fn what_is_not_served_is_shown_beside_the_maps() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let file = status_file(&cluster);
    if let Err(error) = shown(&cluster) {
        panic!("{error:#}\n{}", cluster.agent_log_tail());
    }
    assert!(file.exists());
    drop(cluster);
    assert!(!file.exists(), "cleanup left {}", file.display());
}

/// The rest is the maps' and the kernel's to say.
#[test]
fn devices_are_shown_beside_a_damaged_file() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let mut agent = cluster.agent.lock().expect("no other case uses this cluster");
    agent.stop().expect("it ends");
    let file = status_file_of(&agent).with_file_name("devices.json");
    std::fs::write(&file, "[{").expect("it is damaged");
    let binary = fairlead_lab::agent::find_binary().expect("the agent");
    let shown = cluster.lab.node.ns.command(binary).arg("devices").arg("--pin-path").arg(&agent.pin_path).output();
    let shown = shown.expect("it runs");
    let [table, note] = [shown.stdout, shown.stderr].map(|text| String::from_utf8(text).expect("text"));
    assert!(shown.status.success() && table.contains(&cluster.lab.client.node_device), "{table}{note}");
    assert_eq!(note.lines().count(), 1, "{note}");
    assert!(note.contains("why devices are served is not known") && note.contains("devices.json"), "{note}");

    // One that cannot be written is tried again.
    std::fs::remove_file(&file).expect("it is there");
    std::fs::create_dir(&file).expect("its place is taken");
    agent.restart(&cluster.lab).expect("it starts again");
    let said = || agent.log_text().matches("cannot be shown by `fairlead devices`").count();
    assert!(wait_until(PATIENCE, || said() == 1), "{}", agent.log_text());
    std::fs::remove_dir(&file).expect("its place is free");
    assert!(wait_until(PATIENCE, || file.is_file()), "{}", agent.log_text());
    assert_eq!(said(), 1, "{}", agent.log_text());
}

fn status_file(cluster: &Cluster) -> PathBuf {
    status_file_of(&cluster.agent.lock().expect("no other case uses this cluster"))
}

fn status_file_of(agent: &Agent) -> PathBuf {
    let pins = agent.pin_path.strip_prefix("/").expect("pins have an absolute path");
    Path::new("/run/fairlead").join(pins).join("status.json")
}

fn shown(cluster: &Cluster) -> Result<()> {
    let first = cluster.service("np");
    let ask = Ask::new(Proto::Tcp, first.vip(false));
    first.serve(&first.pods(&[0]), &cluster.lab.client.ns, ask)?;
    // The second asks for the addresses that the first has, and has a NodePort of its own.
    let mut service = cluster.node_port_service("np");
    service.spec.cluster_ips.clone_from(&first.spec.cluster_ips);
    let name = format!("default/{}", service.spec.name);
    cluster.manifests.apply(&service.spec, &service.pods(&[0]))?;
    let mut agent = cluster.agent.lock().expect("no other case uses this cluster");
    let line = |text: &str| text.lines().any(|line| line.starts_with(&name) && line.contains(UNSERVED));
    until("a line for the second Service", &agent, &["services"], line)?;
    // A script finds it in a row of the same kind.
    let rows = listed::rows(&agent, "services")?;
    let of = |row: &&serde_json::Value| row["service"] == service.spec.name.as_str();
    let (unserved, served): (Vec<_>, Vec<_>) = rows.iter().filter(of).partition(|row| row["not_served"].is_string());
    // Its NodePort is served for two families and two protocols; two ClusterIPs and their ports are not its own.
    ensure!(served.len() == 4 && unserved.len() == 6, "{rows:#?}");
    ensure!(unserved.iter().all(|row| row["not_served"].as_str().is_some_and(|what| what.contains(UNSERVED))));

    // What it said outlives a crash, as the maps do, and the next agent says it anew.
    agent.kill();
    ensure!(line(&agent.fairlead(&["services"])?), "gone with the agent");
    agent.restart(&cluster.lab)?;
    until("the same after a restart", &agent, &["services"], line)?;
    service.delete()?;
    until("nothing once the Service is gone", &agent, &["services"], |text| !text.contains(UNSERVED))
}

fn until(what: &str, agent: &Agent, args: &[&str], wanted: impl Fn(&str) -> bool) -> Result<()> {
    let mut text = Ok(String::new());
    let seen = wait_until(PATIENCE, || {
        text = agent.fairlead(args);
        text.as_ref().is_ok_and(|text| wanted(text))
    });
    let text = text?;
    ensure!(seen, "{what}: not within {PATIENCE:?}; `fairlead {}` says:\n{text}", args.join(" "));
    Ok(())
}
