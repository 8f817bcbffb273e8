//! What a bridge carries between others is not this node's business.

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    Ask, Capture, Proto, Shape, capture, frame,
    packet::{Mac, SYN},
    sys,
};

use crate::cell::{Cluster, Combo};

matrix! {
    pitfall_p1_10_a_bridged_frame_to_another_host_is_left_alone,
    a_first_packet_to_an_unresolved_neighbour_arrives,
}

/// A frame to a Service's address that is addressed, at layer 2, to another host on the bridge (a virtual machine,
/// another node): it reaches that host as it was sent.
fn pitfall_p1_10_a_bridged_frame_to_another_host_is_left_alone(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    if cluster.cell.shape == Shape::Routed {
        return Ok(());
    }
    let service = cluster.service("transit");
    let (client, other) = (&cluster.lab.client, &cluster.lab.pods[1]);
    service.serve(&service.pods(&[0]), &client.ns, Ask::new(proto, service.vip(v6)))?;

    let mac = |pod: &fairlead_lab::Pod| -> Result<Mac> {
        let read = pod.ns.output("ip", &["-o", "link", "show", "eth0"])?;
        let at = read.split_ascii_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        at.context("ip link shows no address")?.parse()
    };
    let macs = (mac(client)?, mac(other)?);
    let (src, dst) = (std::net::SocketAddr::new(client.ip(v6), 4321), service.vip(v6));
    let bytes = match proto {
        Proto::Tcp => frame::tcp(macs, src, dst, SYN, 1, 0),
        Proto::Udp => frame::udp(macs, src, dst, b"1\n"),
    };
    // The bridge learns where the other host is.
    crate::cell::answered(&client.ns, Ask::new(proto, std::net::SocketAddr::new(other.ip(v6), crate::cell::TARGET)))?;
    let captures = [Capture::start(&other.ns, "eth0")?, Capture::start(&cluster.lab.pods[0].ns, "eth0")?];
    let socket = client.ns.run(|| sys::packet_socket("eth0", false))??;
    sys::send_frames(std::os::fd::AsFd::as_fd(&socket), std::slice::from_ref(&bytes))?;
    let arrived = captures[0].wait_for(|packet| packet.frame == bytes);
    let [at_other, at_endpoint] = captures.map(Capture::stop);
    ensure!(arrived, "the frame did not arrive as it was sent; the other host saw:\n{}", capture::show(&at_other));
    ensure!(
        !at_endpoint.iter().any(|packet| packet.sockets().is_some_and(|(from, _)| from == src)),
        "the frame was translated to the endpoint:\n{}",
        capture::show(&at_endpoint)
    );
    Ok(())
}

/// Neighbours expire and pods are new: the first packet of a connection may find nobody resolved. On a bridge it is then
/// routed by the node, once, for want of a MAC address to write.
fn a_first_packet_to_an_unresolved_neighbour_arrives(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let (service, client, pod) = (cluster.service("cold"), &cluster.lab.client, &cluster.lab.pods[2]);
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[2]), &client.ns, ask)?;
    for _ in 0..3 {
        for ns in [&cluster.lab.node.ns, &client.ns, &pod.ns] {
            ns.output("ip", &["neigh", "flush", "all"])?;
        }
        let opened = ask.open(&client.ns)?;
        let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("without neighbours: {outcome}"))?;
        for round in 0..3 {
            let attempt = conversation.ask();
            ensure!(attempt.outcome.server() == Some("pod-c"), "without neighbours, request {round}: {attempt}");
        }
    }
    Ok(())
}
