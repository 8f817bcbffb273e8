//! Idle connections, and a flood of new flows beside them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    Agent, AgentOptions, Ask, Conversation, Lab, LabConfig, Load, LoadPlan, Netfilter, Proto, Report, Server,
    ServiceSpec, Shape, frame, manifest::EndpointSpec, packet::Mac, sys,
};
use serde::Serialize;

use crate::services::{PORT, TARGET};

/// The port of the endpoint that is flooded.
const SINK: u16 = TARGET + 2;
/// Packets of one system call.
const BATCH: u32 = 512;
/// Source ports of one source address.
const PORTS: u32 = 50_000;
/// A new connection must succeed within this, throughout.
const PROMPT: Duration = Duration::from_secs(1);

/// What the flood's flows are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flood {
    /// Two requests each, never answered: they stay half open.
    Unanswered,
    /// A request and its reply each: every flow is confirmed.
    Answered,
}

/// How much.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Connections that wait.
    pub idle: usize,
    /// New flows.
    pub flows: u32,
    /// New flows per second; 0: as many as go.
    pub rate: u32,
    /// What they are made of.
    pub flood: Flood,
}

/// What was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    plan: Plan,
    took: Duration,
    lost: usize,
    fresh: Report,
}

impl Seen {
    /// True if nothing was lost.
    pub fn holds(&self) -> bool {
        self.lost == 0
            && !self.fresh.samples.is_empty()
            && self.fresh.failures().is_empty()
            && self.fresh.slowest() < PROMPT
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { idle, flows, flood, .. } = self.plan;
        writeln!(
            f,
            "{flows} flows ({flood:?}) in {:.1} s, {:.0} a second",
            self.took.as_secs_f64(),
            f64::from(flows) / self.took.as_secs_f64()
        )?;
        writeln!(f, "idle connections: {} of {idle} are dead", self.lost)?;
        write!(f, "new connections meanwhile: {}", self.fresh)
    }
}

/// Runs it in a lab of its own.
pub fn run(plan: Plan) -> Result<Seen> {
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None))?;
    let agent = Agent::start(&lab, AgentOptions::default())?;
    let (service, sink) = (service(1, TARGET), service(2, SINK));
    let pods: Vec<_> = lab.pods.iter().map(|pod| EndpointSpec::here(pod.ip(false))).collect();
    agent.manifests.apply(&service, &pods)?;
    agent.manifests.apply(&sink, &pods[..1])?;
    let servers: Result<Vec<_>> = lab
        .pods
        .iter()
        .map(|pod| Server::start(&pod.ns, &pod.name, &[(Proto::Tcp, SocketAddr::new(pod.ip(false), TARGET))]))
        .collect();
    let _servers = servers?;
    // Bound and never read: the flood is neither answered nor refused by it.
    let endpoint = SocketAddr::new(lab.pods[0].ip(false), SINK);
    let _bound = lab.pods[0].ns.run(|| UdpSocket::bind(endpoint))?.context("cannot bind the sink")?;
    let vip = service.vip(false).context("the Service has an IPv4 address")?;
    let ask = Ask::new(Proto::Tcp, vip).timeout(Duration::from_secs(2));
    wait_for(&lab, &ask)?;

    let mut idle = lab.client.ns.run(|| {
        let open = |_| Conversation::open_here(&ask).map_err(|outcome| anyhow::anyhow!("{vip}: {outcome}"));
        (0..plan.idle).map(open).collect::<Result<Vec<_>>>()
    })??;
    for connection in &mut idle {
        let attempt = connection.ask();
        ensure!(attempt.outcome.answer().is_some(), "before the flood an idle connection gave: {attempt}");
    }
    let fresh = LoadPlan { workers: 1, pause: Duration::from_millis(10), ..LoadPlan::new(Proto::Tcp, vip) };
    let fresh = Load::start(&lab.client.ns, fresh)?;
    let begun = Instant::now();
    flood(&lab, sink.vip(false).context("the sink has an IPv4 address")?, endpoint, plan)?;
    let took = begun.elapsed();
    std::thread::sleep(Duration::from_secs(1));
    let fresh = fresh.stop();
    let lost =
        idle.iter_mut().filter_map(|connection| connection.ask().outcome.answer().is_none().then_some(())).count();
    Ok(Seen { plan, took, lost, fresh })
}

fn service(n: u8, target: u16) -> ServiceSpec {
    ServiceSpec::both(&format!("soak-{n}"), &[Ipv4Addr::new(10, 96, 1, n).into()], PORT, target)
}

fn wait_for(lab: &Lab, ask: &Ask) -> Result<()> {
    let begun = Instant::now();
    loop {
        let attempt = ask.once(&lab.client.ns)?;
        if attempt.outcome.answer().is_some() {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "the Service does not answer: {attempt}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends the flows, a batch of requests and then the batch of what follows them.
fn flood(lab: &Lab, vip: SocketAddr, endpoint: SocketAddr, plan: Plan) -> Result<()> {
    // The routed gateway's MAC address, as every pod of this shape has it.
    let gateway: Mac = "ee:ee:ee:ee:ee:ee".parse()?;
    let macs = (Mac([2; 6]), gateway);
    let open = |pod: &fairlead_lab::Pod| -> Result<OwnedFd> {
        pod.ns.run(|| sys::packet_socket("eth0", false))?.with_context(|| format!("a packet socket in {}", pod.name))
    };
    let (client, server) = (open(&lab.client)?, open(&lab.pods[0])?);
    let begun = Instant::now();
    for first in (0..plan.flows).step_by(BATCH as usize) {
        let sources = (first..plan.flows.min(first + BATCH)).map(source);
        let (requests, second): (Vec<_>, Vec<_>) = sources
            .map(|source| {
                let request = frame::udp(macs, source, vip, b"flood");
                let second = match plan.flood {
                    Flood::Unanswered => request.clone(),
                    Flood::Answered => frame::udp(macs, endpoint, source, b"reply"),
                };
                (request, second)
            })
            .unzip();
        sys::send_frames(client.as_fd(), &requests).context("sending requests")?;
        let by = if plan.flood == Flood::Answered { &server } else { &client };
        sys::send_frames(by.as_fd(), &second).context("sending what follows them")?;
        if plan.rate != 0 {
            let due = Duration::from_secs_f64(f64::from(first + BATCH) / f64::from(plan.rate));
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }
    Ok(())
}

/// The client of a flow: as many as asked for, none twice.
fn source(flow: u32) -> SocketAddr {
    let addr = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + flow / PORTS);
    SocketAddr::new(IpAddr::V4(addr), 10_000 + (flow % PORTS) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_million_sources_are_five_million() {
        let seen: std::collections::HashSet<_> = (0..5_000_000).step_by(997).map(source).collect();
        assert_eq!(seen.len(), 5_000_000usize.div_ceil(997));
        assert_eq!(source(4_999_999).ip(), "172.16.0.99".parse::<IpAddr>().unwrap());
    }
}
