//! What load balancers and the kubelet ask: the proxy's own health, and that of each Service.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    AgentOptions, Ask, Lab, LabConfig, Namespace, Netfilter, Proto, ServiceSpec, Shape,
    agent::{find_binary, mount_bpf_fs},
    http::{self, Answer},
    manifest::EndpointSpec,
};

use crate::cell::{Cell, Cluster, PATIENCE};

const PORT: u16 = 31_777;

fn cluster(args: &[&str]) -> Cluster {
    let args = args.iter().map(Into::into).collect();
    Cluster::own(Cell::named("routed_conntrack"), AgentOptions { args, ..AgentOptions::default() })
}

/// A Service behind a load balancer that keeps clients on the node, with a health check.
fn balanced(spec: &ServiceSpec, port: u16) -> String {
    let health = format!("  healthCheckNodePort: {port}\n  ports:\n");
    spec.yaml().replace("type: NodePort", "type: LoadBalancer").replace("  ports:\n", &health)
}

fn asked(ns: &Namespace, to: SocketAddr, mut wanted: impl FnMut(&io::Result<Answer>) -> bool) -> Result<Duration> {
    let began = Instant::now();
    loop {
        let answer = http::ask(ns, to, "GET", "/")?;
        if wanted(&answer) {
            return Ok(began.elapsed());
        }
        // A bind that failed is tried again after five seconds.
        ensure!(began.elapsed() < PATIENCE + Duration::from_secs(5), "{to}: the last answer was {answer:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn refused(answer: &io::Result<Answer>) -> bool {
    answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[test]
fn rules_115_to_119_the_proxys_own_health_at_every_address() {
    let cluster = cluster(&[]);
    let (node, ext) = (&cluster.lab.node, &cluster.lab.ext);
    let places: [(&Namespace, IpAddr); 4] = [
        (&node.ns, Ipv4Addr::LOCALHOST.into()),
        (&node.ns, Ipv6Addr::LOCALHOST.into()),
        (&ext.ns, node.v4.into()),
        (&ext.ns, node.v6.into()),
    ];
    for (ns, ip) in places {
        let at = SocketAddr::new(ip, 10_256);
        for (path, eligible) in [("/healthz", true), ("/livez", false)] {
            let answer = http::get(ns, at, path).unwrap();
            assert_eq!(answer.status, 200, "{at}{path}: {answer:?}");
            assert_eq!(answer.header("content-type"), Some("application/json"));
            assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
            let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
            let families = body["status"].as_object().unwrap();
            assert!(families.keys().eq(["IPv4", "IPv6"]) && families.values().all(|f| f["healthy"] == true), "{body}");
            assert_eq!(body.get("nodeEligible").is_some(), eligible, "{body}");
            assert!(body["lastUpdated"] == body["currentTime"] && body["healthy"] == true, "{body}");
        }
        assert_eq!(http::ask(ns, at, "POST", "/healthz").unwrap().unwrap().status, 200, "methods are not looked at");
        assert_eq!(http::get(ns, at, "/metrics").unwrap().status, 404);
    }
    // Metrics are for the node itself.
    assert!(refused(&http::ask(&ext.ns, SocketAddr::new(node.v4.into(), 10_249), "GET", "/metrics").unwrap()));
    assert_eq!(http::get(&node.ns, "127.0.0.1:10249".parse().unwrap(), "/proxyMode").unwrap().body, "ebpf");
}

#[test]
fn rules_122_to_129_a_load_balancer_hears_of_the_endpoints_on_the_node() {
    let cluster = cluster(&[]);
    check(&cluster).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.agent_log_tail()));
}

fn check(cluster: &Cluster) -> Result<()> {
    let (node, ext) = (&cluster.lab.node, &cluster.lab.ext);
    let service = cluster.node_port_service("balanced");
    let (name, spec) = (&service.spec.name, &service.spec);
    let places = [false, true].map(|v6| SocketAddr::new(node.ip(v6), PORT));
    service.serve(&service.pods(&[0, 1]), &cluster.lab.client.ns, Ask::new(Proto::Tcp, service.vip(false)))?;
    for at in places {
        ensure!(refused(&http::ask(&ext.ns, at, "GET", "/")?), "{at} answers without a health check");
    }
    cluster.manifests.write(name, &balanced(spec, PORT))?;
    for at in places {
        asked(&ext.ns, at, |answer| answer.as_ref().is_ok_and(|answer| answer.status == 200))?;
        let answer = http::ask(&ext.ns, at, "PUT", "/any/path")?.context("it has answered")?;
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
             \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}}"
        );
        ensure!((answer.status, &answer.body) == (200, &body), "{answer:?}");
        ensure!(answer.header("x-load-balancing-endpoint-weight") == Some("2"), "{answer:?}");
    }
    // Primary addresses only, as by --nodeport-addresses.
    ensure!(refused(&http::ask(&node.ns, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT), "GET", "/")?));

    let weight = |wanted: &'static str, status: u16| {
        move |answer: &io::Result<Answer>| {
            let Ok(answer) = answer else { return false };
            answer.status == status && answer.header("x-load-balancing-endpoint-weight") == Some(wanted)
        }
    };
    let elsewhere = [service.remotes(), service.pods(&[0])].concat();
    let gone: Vec<_> = service.pods(&[0]).into_iter().map(|e| EndpointSpec { ready: false, ..e }).collect();
    for at in places {
        service.endpoints(&elsewhere)?;
        asked(&ext.ns, at, weight("1", 200))?;
        service.endpoints(&service.remotes())?;
        asked(&ext.ns, at, weight("0", 503))?;
        service.endpoints(&gone)?;
        asked(&ext.ns, at, weight("0", 503))?;
        service.endpoints(&[])?;
        asked(&ext.ns, at, weight("0", 503))?;
        service.endpoints(&service.pods(&[0, 1, 2]))?;
        asked(&ext.ns, at, weight("3", 200))?;
    }
    // Rule 127: another port, another policy, no Service.
    cluster.manifests.write(name, &balanced(spec, PORT + 1))?;
    for at in places {
        asked(&ext.ns, SocketAddr::new(at.ip(), PORT + 1), weight("3", 200))?;
        asked(&ext.ns, at, refused)?;
    }
    cluster.manifests.write(name, &balanced(spec, PORT + 1).replace("Policy: Local", "Policy: Cluster"))?;
    asked(&ext.ns, SocketAddr::new(node.v4.into(), PORT + 1), refused)?;
    cluster.manifests.write(name, &balanced(spec, PORT))?;
    asked(&ext.ns, places[1], weight("3", 200))?;
    service.delete()?;
    for at in places {
        asked(&ext.ns, at, refused)?;
    }
    Ok(())
}

#[test]
fn rule_128_a_port_that_is_taken_is_listened_on_when_it_is_free() {
    let cluster = cluster(&["--nodeport-addresses", "192.0.2.0/24"]);
    let (node, ext) = (&cluster.lab.node, &cluster.lab.ext);
    let taken = node.ns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
    let service = cluster.node_port_service("taken");
    cluster.manifests.apply(&service.spec, &service.pods(&[0])).unwrap();
    cluster.manifests.write(&service.spec.name, &balanced(&service.spec, PORT)).unwrap();
    let log = || cluster.agent.lock().unwrap().log_text();
    let said = fairlead_lab::server::wait_until(PATIENCE, || log().contains("cannot answer health checks"));
    assert!(said, "{}", log());
    // No network of the list is of IPv6: all of its addresses take NodePorts. None of IPv4's does.
    let at = SocketAddr::new(node.v6.into(), PORT);
    drop(taken);
    asked(&ext.ns, at, |answer| answer.as_ref().is_ok_and(|answer| answer.status == 200)).unwrap();
    assert!(refused(&http::ask(&ext.ns, SocketAddr::new(node.v4.into(), PORT), "GET", "/").unwrap()));
    let errors = log().matches("cannot answer health checks").count();
    assert_eq!(errors, 1, "told once: {}", log());
}

/// Without the flag it goes on and tries again; with it, nothing is touched.
#[test]
fn rules_121_and_131_a_port_that_is_taken_ends_the_agent_where_that_is_asked_for() {
    let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::None)).unwrap();
    mount_bpf_fs().unwrap();
    let manifests = lab.dir().join("none");
    std::fs::create_dir_all(&manifests).unwrap();
    for (port, what) in [(10_256, "healthz"), (10_249, "metrics")] {
        let taken = lab.node.ns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).unwrap().unwrap();
        let mut command = lab.node.ns.command(find_binary().unwrap());
        command.arg("run").arg("--manifests").arg(&manifests).arg("--pin-path").arg(lab.pin_path());
        command.args([&format!("--{what}-bind-address=127.0.0.1"), "--bind-address-hard-fail"]);
        let began = Instant::now();
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(&format!("--bind-address-hard-fail: cannot listen at 127.0.0.1:{port}")), "{text}");
        assert!(began.elapsed() < PATIENCE, "{text}");
        assert!(!lab.pin_path().read_dir().is_ok_and(|dir| dir.count() > 0), "the kernel was touched: {text}");
        drop(taken);
    }
}
