//! Half-open floods: established connections keep their flows, and new ones get through.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fairlead_lab::{AgentOptions, Ask, Conversation, Load, LoadPlan, Proto, frame, packet::Mac, sys};

use crate::cell::{Cell, Cluster, TARGET};

/// Connections that wait.
const IDLE: usize = 1_000;
/// New flows of the default run; more than any half-open table holds. `FAIRLEAD_FLOOD_FLOWS` sets another number.
const FLOWS: u32 = 400_000;

/// Flows of two packets each, one way: a source of their own, no answer ever.
fn flood(cluster: &Cluster, vip: SocketAddr, flows: u32) -> anyhow::Result<Duration> {
    let client = &cluster.lab.client;
    // The routed gateway's MAC address, as every pod of this shape has it.
    let gateway: Mac = "ee:ee:ee:ee:ee:ee".parse()?;
    let socket = client.ns.run(|| sys::packet_socket("eth0", false))?.context("a packet socket in the client")?;
    let begun = Instant::now();
    let mut batch = Vec::with_capacity(1024);
    for flow in 0..flows {
        let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + flow / 50_000);
        let source = SocketAddr::new(IpAddr::V4(source), 10_000 + (flow % 50_000) as u16);
        let packet = frame::udp((Mac([2; 6]), gateway), source, vip, b"flood");
        batch.extend([packet.clone(), packet]);
        if batch.len() >= 1024 {
            sys::send_frames(socket.as_fd(), &batch).context("sending the flood")?;
            batch.clear();
        }
    }
    sys::send_frames(socket.as_fd(), &batch).context("sending the flood")?;
    Ok(begun.elapsed())
}

#[test]
fn pitfall_p1_8_idle_connections_survive_a_flood_of_two_packet_flows() {
    let flows = match std::env::var("FAIRLEAD_FLOOD_FLOWS") {
        Ok(text) => text.parse().expect("FAIRLEAD_FLOOD_FLOWS is a number"),
        Err(_) => FLOWS,
    };
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let (service, client) = (cluster.service("idle"), &cluster.lab.client);
    let ask = Ask::new(Proto::Tcp, service.vip(false));
    service.serve(&service.pods(&[0, 1, 2]), &client.ns, ask).unwrap();

    // A bound socket that nobody reads: the flood is neither answered nor refused.
    let sink = cluster.service("sink");
    let mut spec = sink.spec.clone();
    spec.ports.iter_mut().for_each(|port| port.target = TARGET + 2);
    let _silent = cluster.lab.pods[2].ns.run(|| UdpSocket::bind(("0.0.0.0", TARGET + 2))).unwrap().unwrap();
    cluster.manifests.apply(&spec, &sink.pods(&[2])).unwrap();

    let mut idle: Vec<Conversation> =
        client.ns.run(|| (0..IDLE).map(|_| Conversation::open_here(&ask).unwrap()).collect()).unwrap();
    for connection in &mut idle {
        assert!(connection.ask().outcome.answer().is_some(), "before the flood");
    }
    let plan =
        LoadPlan { workers: 1, pause: Duration::from_millis(10), ..LoadPlan::new(Proto::Tcp, service.vip(false)) };
    let fresh = Load::start(&client.ns, plan).unwrap();
    let took = flood(&cluster, spec.vip(false).unwrap(), flows).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let fresh = fresh.stop();
    println!("{flows} flows of two packets in {took:?}; meanwhile: {fresh}");
    assert!(fresh.failures().is_empty() && !fresh.samples.is_empty(), "new connections during the flood: {fresh}");
    let lost: Vec<_> =
        idle.iter_mut().map(Conversation::ask).filter(|attempt| attempt.outcome.answer().is_none()).collect();
    assert!(
        lost.is_empty(),
        "{} of {IDLE} idle connections are dead after the flood, the first: {}",
        lost.len(),
        lost[0]
    );
}
