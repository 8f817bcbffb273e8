//! Endpoints that go: UDP moves or is refused at once, established TCP is left to finish.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{Ask, Conversation, Outcome, Proto};

use crate::cell::{Cluster, Combo, PATIENCE};

matrix! {
    a_udp_socket_moves_when_its_endpoint_goes,
    a_udp_socket_is_refused_when_the_last_endpoint_goes,
    an_established_connection_outlives_endpoint_service_and_agent,
}

/// "At once": a write of the file, its event, one change of the maps, on a loaded machine.
const AT_ONCE: Duration = Duration::from_millis(250);

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

fn a_udp_socket_moves_when_its_endpoint_goes(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    if proto == Proto::Tcp {
        return Ok(());
    }
    let service = cluster.service("udp-moves");
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0, 1]), &cluster.lab.client.ns, ask)?;
    let mut conversation = open(ask, cluster)?;
    let mut own = conversation.ask().outcome.server().context("the first request")?.to_owned();
    for _ in 0..4 {
        let (left, other) = if own == "pod-a" { (1, "pod-b") } else { (0, "pod-a") };
        let again = conversation.ask();
        ensure!(again.outcome.server() == Some(&*own), "the flow changed its endpoint without need: {again}");
        service.endpoints(&service.pods(&[left]))?;
        let took = moves(&mut conversation, &own, |outcome| outcome.server() == Some(other))?;
        ensure!(took < AT_ONCE, "moved from {own} to {other} after {took:?}");
        other.clone_into(&mut own);
        service.endpoints(&service.pods(&[0, 1]))?;
        // The returned endpoint must be served again before it can be the one that remains.
        std::thread::sleep(AT_ONCE);
    }
    Ok(())
}

/// Real kube-proxy lets such a flow go on to the dead Pod; a refusal is what tells a client to look elsewhere.
fn a_udp_socket_is_refused_when_the_last_endpoint_goes(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    if proto == Proto::Tcp {
        return Ok(());
    }
    let service = cluster.service("udp-last");
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &cluster.lab.client.ns, ask)?;
    let mut conversation = open(ask, cluster)?;
    ensure!(conversation.ask().outcome.server() == Some("pod-a"), "the first request");
    service.endpoints(&[])?;
    let took = moves(&mut conversation, "pod-a", |outcome| *outcome == Outcome::Refused)?;
    ensure!(took < AT_ONCE, "refused after {took:?}");
    Ok(())
}

/// kube-proxy rule 65: established TCP is left to finish, whatever becomes of its Service.
fn an_established_connection_outlives_endpoint_service_and_agent(
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
