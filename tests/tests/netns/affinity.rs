//! Session affinity with real sockets: a client keeps its endpoint over connections, addresses and restarts, `fairlead
//! affinity` shows it, and what nobody would follow any more is removed.

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Agent, AgentOptions, Ask, Proto, server::wait_until};
use fairlead_tests::listed;
use serde_json::Value;

use crate::cell::{Cell, Cluster, PATIENCE, answered};

/// Connections that must all reach one endpoint. Two endpoints and no affinity pass by chance once in 500 million times.
const CONNECTIONS: usize = 30;

fn rows(agent: &Agent, service: &str) -> Result<Vec<Value>> {
    Ok(listed::rows(agent, "affinity")?.into_iter().filter(|row| row["service"] == service).collect())
}

/// Who answers, of all these connections.
fn servers(cluster: &Cluster, ask: Ask) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for _ in 0..CONNECTIONS {
        let server = answered(&cluster.lab.client.ns, ask)?.server;
        if !found.contains(&server) {
            found.push(server);
        }
    }
    Ok(found)
}

fn with_affinity(yaml: &str, secs: u32) -> String {
    let affinity = format!(
        "spec:\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {secs}}}}}\n"
    );
    yaml.replacen("spec:\n", &affinity, 1)
}

#[test]
fn rules_78_to_84_a_client_keeps_its_endpoint_until_its_time_is_over() {
    let args = vec!["--sweep-interval=1s".into()];
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions { args, ..AgentOptions::default() });
    if let Err(error) = kept(&cluster) {
        panic!("{error:#}\n{}", cluster.agent_log_tail());
    }
}

fn kept(cluster: &Cluster) -> Result<()> {
    let service = cluster.service("sticky");
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    service.serve(&service.pods(&[0, 1]), &cluster.lab.client.ns, ask)?;
    ensure!(servers(cluster, ask)?.len() == 2, "without affinity every endpoint is used");
    let mut agent = cluster.agent.lock().expect("no other case uses this cluster");
    let name = service.spec.name.as_str();

    let put = |secs| cluster.manifests.write(name, &with_affinity(&service.spec.yaml(), secs));
    put(60)?;
    let told = wait_until(PATIENCE, || {
        agent.fairlead(&["services", "-o", "json"]).is_ok_and(|t| t.contains("\"affinity_secs\": 60"))
    });
    ensure!(told, "`fairlead services` does not tell of the timeout");
    let [server]: [String; 1] = servers(cluster, ask)?.try_into().map_err(|found| anyhow::anyhow!("{found:?}"))?;
    let [row]: [Value; 1] = rows(&agent, name)?.try_into().map_err(|rows| anyhow::anyhow!("{rows:?}"))?;
    let endpoint = cluster.lab.pods.iter().find(|pod| pod.name == server).context("the pod that answered")?.ip(false);
    ensure!(row["endpoint"].as_str().is_some_and(|text| text.starts_with(&endpoint.to_string())), "{row}");
    ensure!(
        (&row["port_name"], &row["timeout_secs"], &row["holds"]) == (&"tcp".into(), &60.into(), &true.into()),
        "{row}"
    );

    // Rule 82: a restart forgets nobody.
    agent.kill();
    ensure!(servers(cluster, ask)? == [server.clone()], "while no agent runs");
    agent.restart(&cluster.lab)?;
    ensure!(servers(cluster, ask)? == [server], "with the next agent");

    // Rule 79: when its time is over, the entry goes.
    put(2)?;
    let gone = wait_until(PATIENCE, || rows(&agent, name).is_ok_and(|rows| rows.is_empty()));
    ensure!(gone, "{:?}", rows(&agent, name));
    // Rule 84: nor does it outlive the wish for affinity, or the Service.
    put(60)?;
    let kept = wait_until(PATIENCE, || servers(cluster, ask).is_ok_and(|found| found.len() == 1));
    ensure!(kept && rows(&agent, name)?.len() == 1, "affinity again: {:?}", rows(&agent, name));
    cluster.manifests.write(name, &service.spec.yaml())?;
    let all = wait_until(PATIENCE, || servers(cluster, ask).is_ok_and(|found| found.len() == 2));
    ensure!(all, "without affinity every endpoint is used again");
    let table = || cluster_table(&agent);
    ensure!(wait_until(PATIENCE, || table().is_ok_and(|count| count == 0)), "{:?} entries are left", table());
    Ok(())
}

/// Entries of `AFFINITY_V4`, of whatever port.
fn cluster_table(agent: &Agent) -> Result<usize> {
    use aya::maps::{HashMap, Map, MapData};
    use proxy_common::V4;
    use proxy_common::abi::{Affinity, AffinityKey};

    let data = MapData::from_pin(agent.pin("AFFINITY_V4").context("no AFFINITY_V4 among the pins")?)?;
    let map: HashMap<_, AffinityKey<V4>, Affinity> = HashMap::try_from(Map::LruHashMap(data))?;
    Ok(map.keys().count())
}
