//! Endpoints that go: UDP moves or is refused at once, established TCP is left to finish.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{Ask, Attempt, Conversation, Outcome, Proto};

use crate::cell::{Cluster, Combo, PATIENCE};

matrix! {
    rule_105_a_udp_socket_moves_when_its_endpoint_goes,
    rule_105_a_udp_socket_is_refused_when_the_last_endpoint_goes,
    rule_65_an_established_connection_outlives_endpoint_service_and_agent,
    services_work_without_the_agent_and_the_next_one_catches_up,
}

/// "At once", at the best of some changes: a write of the file, its event, one change of the maps. The others may have
/// waited for the processor.
const AT_ONCE: Duration = Duration::from_millis(250);
/// Changes of which one must be at once.
const CHANGES: usize = 4;

fn open(ask: Ask, cluster: &Cluster) -> Result<Conversation> {
    ask.open(&cluster.lab.client.ns)?.map_err(|outcome| anyhow::anyhow!("{}/{}: {outcome}", ask.to, ask.proto))
}

/// Asks every millisecond until the outcome is as wanted; what comes before must be an answer of `before`.
fn moves(conversation: &mut Conversation, before: &str, wanted: impl Fn(&Outcome) -> bool) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let attempt = conversation.ask();
        if wanted(&attempt.outcome) {
            return Ok(start.elapsed());
        }
        if attempt.outcome.server() != Some(before) {
            bail!("{attempt}, {:?} after the change", start.elapsed());
        }
        if start.elapsed() > PATIENCE {
            bail!("{before} still answers {:?} after it went", start.elapsed());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn rule_105_a_udp_socket_moves_when_its_endpoint_goes(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    if proto == Proto::Tcp {
        return Ok(());
    }
    let service = cluster.service("udp-moves");
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0, 1]), &cluster.lab.client.ns, ask)?;
    let mut conversation = open(ask, cluster)?;
    let mut own = conversation.ask().outcome.server().context("the first request")?.to_owned();
    let mut fastest = Duration::MAX;
    for _ in 0..CHANGES {
        let (left, other) = if own == "pod-a" { (1, "pod-b") } else { (0, "pod-a") };
        let again = conversation.ask();
        ensure!(again.outcome.server() == Some(&*own), "the flow changed its endpoint without need: {again}");
        service.endpoints(&service.pods(&[left]))?;
        fastest = fastest.min(moves(&mut conversation, &own, |outcome| outcome.server() == Some(other))?);
        service.endpoints(&service.pods(&[0, 1]))?;
        // The returned endpoint must be served again before it can be the one that remains.
        let back = |attempt: &Attempt| attempt.outcome.server() == Some(&*own);
        crate::cell::eventually("the returned endpoint", &cluster.lab.client.ns, ask, back)?;
        other.clone_into(&mut own);
    }
    ensure!(fastest < AT_ONCE, "the fastest of {CHANGES} moves took {fastest:?}");
    Ok(())
}

/// Real kube-proxy lets such a flow go on to the dead Pod; a refusal is what tells a client to look elsewhere.
fn rule_105_a_udp_socket_is_refused_when_the_last_endpoint_goes(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    if proto == Proto::Tcp {
        return Ok(());
    }
    let service = cluster.service("udp-last");
    let ask = Ask::new(proto, service.vip(v6));
    let mut fastest = Duration::MAX;
    for _ in 0..CHANGES {
        service.serve(&service.pods(&[0]), &cluster.lab.client.ns, ask)?;
        let mut conversation = open(ask, cluster)?;
        ensure!(conversation.ask().outcome.server() == Some("pod-a"), "the first request");
        service.endpoints(&[])?;
        fastest = fastest.min(moves(&mut conversation, "pod-a", |outcome| *outcome == Outcome::Refused)?);
    }
    ensure!(fastest < AT_ONCE, "the fastest of {CHANGES} refusals took {fastest:?}");
    Ok(())
}

/// Established TCP is left to finish, whatever becomes of its Service.
fn rule_65_an_established_connection_outlives_endpoint_service_and_agent(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    if proto == Proto::Udp {
        return Ok(());
    }
    let service = cluster.service("established");
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0, 1]), &cluster.lab.client.ns, ask)?;
    let mut connections = (0..8).map(|_| open(ask, cluster)).collect::<Result<Vec<_>>>()?;
    let owners: Vec<_> = connections.iter_mut().map(|own| own.ask().outcome.server().map(str::to_owned)).collect();
    ensure!(owners.iter().all(Option::is_some), "first requests: {owners:?}");
    let mut still = |when: &str| -> Result<()> {
        for (connection, owner) in connections.iter_mut().zip(&owners) {
            let attempt = connection.ask();
            ensure!(attempt.outcome.server() == owner.as_deref(), "{when}: {owner:?}'s connection: {attempt}");
        }
        Ok(())
    };
    service.endpoints(&service.pods(&[2]))?;
    crate::cell::eventually("the new endpoint", &cluster.lab.client.ns, ask, |a| a.outcome.server() == Some("pod-c"))?;
    still("after their endpoints went")?;
    service.delete()?;
    crate::cell::eventually("no answer", &cluster.lab.client.ns, ask, |a| a.outcome.answer().is_none())?;
    still("after the Service went")?;
    let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
    agent.stop()?;
    still("without an agent")?;
    agent.restart(&cluster.lab)?;
    still("after the agent's restart")
}

/// What is in the kernel serves without anyone; a crash loses nothing, and changes of the meantime are found.
fn services_work_without_the_agent_and_the_next_one_catches_up(cluster: &Cluster, combo: Combo) -> Result<()> {
    let Combo { v6, proto } = combo;
    if proto == Proto::Udp {
        return Ok(());
    }
    let (changed, deleted, client) = (cluster.service("changed"), cluster.service("deleted"), &cluster.lab.client.ns);
    let (to_changed, to_deleted) = (Ask::new(proto, changed.vip(v6)), Ask::new(proto, deleted.vip(v6)));
    changed.serve(&changed.pods(&[0]), client, to_changed)?;
    deleted.serve(&deleted.pods(&[0]), client, to_deleted)?;
    let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
    agent.kill();
    for ask in [to_changed, to_deleted] {
        ensure!(crate::cell::answered(client, ask)?.server == "pod-a", "without an agent");
    }
    changed.endpoints(&changed.pods(&[1]))?;
    deleted.delete()?;
    let created = cluster.service("created");
    cluster.manifests.apply(&created.spec, &created.pods(&[2]))?;
    agent.restart(&cluster.lab)?;
    // No waiting: the agent says that it is in step only when it is.
    let server = |ask: Ask| crate::cell::answered(client, ask).map(|answer| answer.server);
    ensure!(server(to_changed)? == "pod-b", "an endpoint changed in the meantime was not seen");
    ensure!(server(Ask::new(proto, created.vip(v6)))? == "pod-c", "a Service of the meantime was not seen");
    let gone = to_deleted.timeout(Duration::from_millis(100)).once(client)?;
    ensure!(gone.outcome.answer().is_none(), "a Service that was deleted in the meantime still answers: {gone}");
    Ok(())
}
