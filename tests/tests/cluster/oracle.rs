//! Real kube-proxy: as the tests start it, and as the oracle. On the same objects the same first packets have the same fate.

use std::{net::SocketAddr, time::Duration};

use fairlead_lab::{Ask, Lab, LabConfig, Netfilter, Outcome, Server, Shape, manifest::NODE_NAME, server::wait_until};
use fairlead_tests::controlplane::{ControlPlane, ControllerManager, KubeProxy};

use crate::{
    fixture::{SOON, TARGET, Turn, Vips, create_node},
    objects,
    plane::Alone,
    pods::PodSpec,
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
    let _turn = Turn::beside();
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None)).unwrap();
    let alone = Alone::new();
    let plane = ControlPlane::start(&alone.0).unwrap();
    let api = plane.api().unwrap();
    create_node(&api, &lab);
    let _controllers = ControllerManager::start(&plane).unwrap();
    let _proxy = KubeProxy::start(&plane, &lab.node.ns, NODE_NAME, &[]).unwrap();

    let pod = lab.pod("pod-a").unwrap();
    let addresses = [pod.ip(false), pod.ip(true)];
    let _server = Server::both(&pod.ns, &pod.name, &addresses.map(|ip| SocketAddr::new(ip, TARGET))).unwrap();
    let mut service = objects::service("web");
    service.spec.as_mut().unwrap().selector = Some([("app".to_owned(), "web".to_owned())].into());
    let vips = Vips::of(&api.create(&service).unwrap());
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
    let object = PodSpec::new("a", "web", &addresses);
    object.run(&api);
    until("answered by pod-a", &|outcome| outcome.server() == Some("pod-a"));
    // Nothing of ours runs there: the answer came by kube-proxy's rules.
    let rules = lab.node.ns.output("nft", &["list", "table", "ip", "kube-proxy"]).unwrap();
    assert!(rules.contains(&vips.v4.ip().to_string()), "{rules}");
    object.terminate(&api);
    object.remove(&api);
    until("refused", &refused);
}
