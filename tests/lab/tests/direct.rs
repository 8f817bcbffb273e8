//! The lab by itself: direct traffic works in every shape, and what is observed is what is there.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fairlead_lab::{
    Ask, Capture, Lab, LabConfig, Netfilter, Outcome, Proto, Server, Shape, client::PATIENCE, conntrack, janitor,
    netns, probe,
};

const SHAPES: [Shape; 3] = [Shape::Routed, Shape::Bridge { br_netfilter: false }, Shape::Bridge { br_netfilter: true }];
const NETFILTERS: [Netfilter; 3] = [Netfilter::None, Netfilter::Conntrack, Netfilter::InvalidDrop];

#[test]
fn every_host_reaches_every_host_in_every_shape() {
    for shape in SHAPES {
        for netfilter in NETFILTERS {
            let begun = Instant::now();
            let lab = Lab::new(LabConfig::new(shape, netfilter)).unwrap();
            println!("{shape:?} {netfilter:?}: up after {:?}", begun.elapsed());
            for v6 in [false, true] {
                let at = |ip| SocketAddr::new(ip, 8080);
                let pod = &lab.pods[0];
                let remote = Lab::remote_pods(v6)[0];
                let _servers = [
                    Server::both(&pod.ns, "pod-a", &[at(pod.ip(v6))]).unwrap(),
                    Server::both(&lab.ext.ns, "remote", &[at(remote)]).unwrap(),
                ];
                for proto in Proto::ALL {
                    let cell = format!("{shape:?} {netfilter:?} {proto} v6={v6}");
                    let expect = |from: &netns::Namespace, ask: Ask, server: &str, peer: Option<std::net::IpAddr>| {
                        let attempt = ask.once(from).unwrap();
                        let answer = attempt.outcome.answer();
                        let answer = answer.unwrap_or_else(|| panic!("{cell}: {} → {server}: {attempt}", from.name()));
                        assert_eq!(answer.server, server, "{cell}");
                        if let Some(peer) = peer {
                            assert_eq!(answer.peer.ip(), peer, "{cell}: source seen by {server}");
                        }
                    };
                    let to_pod = Ask::new(proto, at(pod.ip(v6)));
                    expect(&lab.client.ns, to_pod, "pod-a", Some(lab.client.ip(v6)));
                    expect(&lab.pods[1].ns, to_pod, "pod-a", Some(lab.pods[1].ip(v6)));
                    expect(&lab.node.ns, to_pod, "pod-a", None);
                    let outside = Lab::external_clients(v6)[0];
                    expect(&lab.ext.ns, to_pod.from(SocketAddr::new(outside, 0)), "pod-a", Some(outside));
                    expect(&lab.client.ns, Ask::new(proto, at(remote)), "remote", Some(lab.client.ip(v6)));
                    expect(&lab.node.ns, Ask::new(proto, at(remote)), "remote", Some(lab.node.ip(v6)));
                    let closed = Ask::new(proto, SocketAddr::new(pod.ip(v6), 9)).once(&lab.client.ns).unwrap();
                    assert_eq!(closed.outcome, Outcome::Refused, "{cell}: closed port");
                }
            }
            assert_eq!(lab.invalid_packets().unwrap(), 0, "{shape:?} {netfilter:?}");
        }
    }
}

#[test]
fn conntrack_and_capture_show_a_direct_connection() {
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::Conntrack)).unwrap();
    let server = SocketAddr::new(lab.pods[0].ip(false), 8080);
    let _server = Server::both(&lab.pods[0].ns, "pod-a", &[server]).unwrap();
    let capture = Capture::start(&lab.pods[0].ns, "eth0").unwrap();
    let ask = Ask::new(Proto::Tcp, server).port(4000);
    let mut conversation = ask.open(&lab.client.ns).unwrap().unwrap();
    assert_eq!(conversation.ask().outcome.server(), Some("pod-a"));
    assert_eq!(conversation.ask().outcome.server(), Some("pod-a"));

    let entries = conntrack::list(&lab.node.ns).unwrap();
    assert_eq!(entries.len(), 1, "{entries:?}");
    let client = SocketAddr::new(lab.client.ip(false), 4000);
    assert_eq!((entries[0].original.src, entries[0].original.dst), (client, server));
    assert_eq!((&*entries[0].state, entries[0].assured), ("ESTABLISHED", true));
    assert_eq!(conntrack::invalid(&lab.node.ns).unwrap(), 0);

    let packets = capture.stop();
    let first = packets.iter().find(|packet| packet.concerns(server)).unwrap();
    assert_eq!(first.sockets(), Some((client, server)), "{first}");
    assert_eq!(first.ttl, 63, "one router between them");
    assert!(!first.outgoing && packets.iter().any(|packet| packet.outgoing && packet.concerns(server)));
}

#[test]
fn a_silent_server_is_a_timeout_and_a_dead_one_a_refusal() {
    let lab = Lab::new(LabConfig::new(Shape::Bridge { br_netfilter: false }, Netfilter::None)).unwrap();
    let server = SocketAddr::new(lab.pods[0].ip(true), 8080);
    let running = Server::both(&lab.pods[0].ns, "pod-a", &[server]).unwrap();
    let found = probe::until_answer(&lab.client.ns, server, true, PATIENCE, |name| name == "pod-a").unwrap();
    assert!(found.at >= found.asked);
    let mut conversation = Ask::new(Proto::Tcp, server).open(&lab.client.ns).unwrap().unwrap();
    assert_eq!(conversation.ask().outcome.server(), Some("pod-a"));
    drop(running);
    assert!(matches!(conversation.ask().outcome, Outcome::Reset), "the server's death ends its connections");
    for proto in Proto::ALL {
        assert_eq!(Ask::new(proto, server).once(&lab.client.ns).unwrap().outcome, Outcome::Refused);
    }
    lab.pods[0]
        .ns
        .nft("table inet silent { chain in { type filter hook input priority 0; policy drop; }\n}\n")
        .unwrap();
    for proto in Proto::ALL {
        let ask = Ask::new(proto, server).timeout(Duration::from_millis(100));
        assert_eq!(ask.once(&lab.client.ns).unwrap().outcome, Outcome::Timeout);
    }
}

#[test]
fn a_lab_leaves_nothing_behind() {
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None)).unwrap();
    let (id, dir) = (lab.id.clone(), lab.dir());
    assert!(dir.exists());
    drop(lab);
    let left = |dir: &str| {
        std::fs::read_dir(dir)
            .unwrap()
            .flatten()
            .any(|e| e.file_name().to_string_lossy().starts_with(&format!("{id}-")))
    };
    assert!(!left(netns::RUN_DIR) && !left(janitor::TMP));
}
