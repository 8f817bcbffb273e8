//! Real kube-proxy: as the tests start it, and as the oracle. On the same objects the same first packets have the same fate.

use std::{net::SocketAddr, time::Duration};

use fairlead_lab::{Ask, Lab, LabConfig, Netfilter, Outcome, Server, Shape, manifest::NODE_NAME, server::wait_until};
use fairlead_tests::controlplane::KubeProxy;
use serde_json::json;

use crate::{
    fixture::{SOON, TARGET},
    pods::PodSpec,
    upstream::world,
};

mod compare;
mod differences;
mod generate;
mod post;
mod probe;
mod rounds;
mod sight;
mod slices;
mod targets;
mod world;
mod write;

#[test]
fn kube_proxy_serves_the_pods_that_the_controllers_find() {
    // The API server and the controllers are those of the shared cluster; the node is another one of the same name.
    let world = world();
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None)).unwrap();
    let _proxy = KubeProxy::start(&world.plane, &lab.node.ns, NODE_NAME, &[]).unwrap();

    let pod = lab.pod("pod-a").unwrap();
    let addresses = [pod.ip(false), pod.ip(true)];
    let _server = Server::both(&pod.ns, &pod.name, &addresses.map(|ip| SocketAddr::new(ip, TARGET))).unwrap();
    let vips = world.vips("proxied", json!({}));
    let until = |wanted: &str, is_wanted: &dyn Fn(&Outcome) -> bool| {
        for (proto, to) in vips.all() {
            let mut last = None;
            let reached = wait_until(SOON, || {
                // kube-proxy refuses by ICMP. One that comes while connect(2) still holds the socket does not end it; the
                // one for the next SYN, a second later, does.
                let ask = Ask::new(proto, to).timeout(Duration::from_secs(3));
                let outcome = ask.once(&lab.client.ns).unwrap().outcome;
                is_wanted(last.insert(outcome))
            });
            assert!(reached, "{to}/{proto} is not {wanted}: {last:?}");
        }
    };
    let refused = |outcome: &Outcome| match outcome {
        Outcome::Resent(last) => **last == Outcome::Refused,
        other => *other == Outcome::Refused,
    };
    until("refused", &refused);
    let object = PodSpec::new("proxied-a", "proxied", &addresses);
    object.run(&world.api);
    until("answered by pod-a", &|outcome| outcome.server() == Some("pod-a"));
    // Nothing of ours runs there: the answer came by kube-proxy's rules.
    let rules = lab.node.ns.output("nft", &["list", "table", "ip", "kube-proxy"]).unwrap();
    assert!(rules.contains(&vips.v4.ip().to_string()), "{rules}");
    object.terminate(&world.api);
    object.remove(&world.api);
    until("refused", &refused);
}
