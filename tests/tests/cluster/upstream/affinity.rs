//! Session affinity, at every kind of address: switched on and off, and over when its time is.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fairlead_lab::{Outcome, Proto, server::wait_until};
use serde_json::json;

use super::{SOON, Vips, World, world};
use crate::client::Client;

/// Requests in a row by which affinity is known.
const IN_A_ROW: usize = 15;
/// The shortest affinity that can be told from none on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Affinity is kept in whole seconds, and the second that is under way when it begins counts.
const SURE: Duration = Duration::from_millis(1_300);

/// Clients, where they ask, and who may answer.
type Asked<'a> = Vec<(Client<'a>, Vec<(Proto, SocketAddr)>, &'a [&'a str])>;

/// e2e 23, 25, 26, 63, 74 and 79, the ones that switch.
#[test]
fn e2e_23_25_26_63_74_79_affinity_follows_the_field_at_every_address() {
    let world = world();
    let all = ["pod-a", "pod-b", "remote-a"];
    for (policy, n) in [("Cluster", 23), ("Local", 25)] {
        let name = format!("sticky-{}", policy.to_lowercase());
        let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": policy});
        let service = world.service(&name, spec);
        let balancer = world.balance(&service, n);
        for server in all {
            world.run_pod(&name, server);
        }
        let [here, there] = ["node", "other-node"].map(|node| world.node_ports_at(&service, node));
        let local = policy == "Local";
        let outside: &[&str] = if local { &all[..2] } else { &all };
        let mut asked: Asked<'_> = vec![(world.outside()[0], [&balancer[..], &here].concat(), outside)];
        if !local {
            asked.push((world.outside()[1], [&balancer[..], &there].concat(), outside));
            for host in &world.everywhere()[..4] {
                let own = if std::ptr::eq(*host, &raw const world.lab.node) { &here } else { &there };
                asked.push((Client::from(*host), [&Vips::of(&service).all()[..], own].concat(), &all));
            }
        }
        everybody(&world, &asked);
        world.edit(&name, &json!({"sessionAffinity": "ClientIP"}));
        for (client, at, servers) in &asked {
            for &(proto, to) in at {
                one_of(*client, proto, to, servers);
            }
        }
        world.edit(&name, &json!({"sessionAffinity": "None", "sessionAffinityConfig": null}));
        everybody(&world, &asked);
    }
}

fn everybody(world: &World, asked: &Asked<'_>) {
    for (client, at, servers) in asked {
        world.answered_from(*client, at, servers);
    }
}

/// Waits until one server answers them all.
fn one_of(client: Client<'_>, proto: Proto, to: SocketAddr, servers: &[&str]) {
    let mut heard = Vec::new();
    let kept = wait_until(SOON, || {
        heard = in_a_row(client, proto, to);
        heard.windows(2).all(|pair| pair[0].server().is_some() && pair[0].server() == pair[1].server())
    });
    assert!(kept, "{client} has no server of its own at {to}/{proto}: {heard:?}");
    assert!(heard[0].server().is_some_and(|server| servers.contains(&server)), "{client} at {to}/{proto}: {heard:?}");
}

fn in_a_row(client: Client<'_>, proto: Proto, to: SocketAddr) -> Vec<Outcome> {
    let ask = client.ask(proto, to).timeout(Duration::from_secs(1));
    client.ns.run(|| (0..IN_A_ROW).map(|_| ask.here().outcome).collect()).expect("the namespace")
}

/// One client at one address: it has a server of its own, and the time is running.
struct Session<'a> {
    client: Client<'a>,
    proto: Proto,
    to: SocketAddr,
    server: String,
    asked: Instant,
    moved: bool,
}

impl Session<'_> {
    /// Asks once more. Whoever asks in time is answered by the same server.
    fn go_on(&mut self) {
        let before = self.asked;
        self.asked = Instant::now();
        let outcome = self.client.ask(self.proto, self.to).once(self.client.ns).expect("the namespace").outcome;
        // The machine may have slept since.
        let paused = before.elapsed();
        let server = outcome.server().unwrap_or_else(|| panic!("{} at {}: {outcome}", self.client, self.to));
        if server != self.server {
            let (client, to, was) = (self.client, self.to, &self.server);
            assert!(
                paused > TIMEOUT - SURE,
                "{client} at {to}/{} was with {was}, and after {paused:?} with {server}",
                self.proto
            );
            self.moved = true;
            server.clone_into(&mut self.server);
        }
    }
}

/// e2e 24; and 26, 63 and 74, the ones with a timeout.
#[test]
fn e2e_24_26_63_74_affinity_is_over_when_a_client_has_not_asked_for_its_time() {
    let world = world();
    let affinity = json!({"clientIP": {"timeoutSeconds": TIMEOUT.as_secs()}});
    let spec = json!({"type": "NodePort", "sessionAffinity": "ClientIP", "sessionAffinityConfig": affinity});
    let service = world.service("forgetful", spec);
    let vips = Vips::of(&service);
    let servers = ["pod-a", "pod-b", "pod-c", "remote-a", "remote-b"];
    for server in servers {
        world.run_pod("forgetful", server);
    }
    let asked =
        [(Client::from(&world.lab.client.host), vips.all().to_vec()), (world.outside()[0], world.node_ports(&service))];
    for (client, at) in &asked {
        for &(proto, to) in at {
            one_of(*client, proto, to, &servers);
        }
    }
    let mut sessions: Vec<_> = asked
        .iter()
        .flat_map(|(client, at)| at.iter().map(move |&(proto, to)| (*client, proto, to)))
        .map(|(client, proto, to)| {
            let outcome = client.ask(proto, to).once(client.ns).expect("the namespace").outcome;
            let server = outcome.server().unwrap_or_else(|| panic!("{client} at {to}/{proto}: {outcome}")).to_owned();
            Session { client, proto, to, server, asked: Instant::now(), moved: false }
        })
        .collect();
    // Each request begins the time anew.
    let begun = Instant::now();
    while begun.elapsed() < TIMEOUT + Duration::from_secs(1) {
        sessions.iter_mut().for_each(Session::go_on);
        std::thread::sleep(Duration::from_millis(200));
    }
    sessions.iter_mut().for_each(|session| session.moved = false);
    // Of five servers the next one is the same by chance, now and then.
    let begun = Instant::now();
    while sessions.iter().any(|session| !session.moved) {
        assert!(begun.elapsed() < SOON * 3, "affinity does not end");
        std::thread::sleep(TIMEOUT + Duration::from_millis(700));
        sessions.iter_mut().for_each(Session::go_on);
    }
}
