//! `deploy/` against the real API server: strict validation, RBAC, and the DaemonSet's pod run as it is written, from
//! the image, with its own ServiceAccount's token and no more rights.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::Child,
    time::Duration,
};

use fairlead_lab::{
    Ask, Lab, LabConfig, Load, LoadPlan, Netfilter, Proto, Server, Shape,
    agent::{READY_LINE, find_binary, mount_bpf_fs},
    http, janitor,
    manifest::NODE_NAME,
    netns,
    server::wait_until,
};
use fairlead_tests::{
    controlplane::{Api, ControlPlane, SERVER},
    deploy::{self, Account, Kubelet},
    foreign, image, not_run,
};
use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{Node, Pod, PodSpec, Service, ServiceAccount},
    events::v1::Event,
};
use kube::{
    api::{DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_agent::dataplane::{load::OBJECT, sys};
use serde_json::{Value, json};

use crate::{
    fixture::{SOON, TARGET, Turn, Vips, create_node},
    objects,
};

/// An attempt to connect to an address that nobody serves takes half a minute.
const PATIENCE: Duration = Duration::from_secs(90);
/// The most that the image may have, and that the agent may take with so many Services.
const LARGEST_IMAGE: u64 = 25_000_000;
const MOST_RESIDENT: u64 = 25_000_000;
const SERVICES: u32 = 100;
const NAMESPACE: &str = "kube-system";
const NAME: &str = "fairlead";

/// Sends an object as `kubectl apply --server-side --validate=strict` does.
fn apply(api: &Api, object: &Value, dry_run: bool) {
    let object = object.clone();
    let shown = format!("{} {}", object["kind"], object["metadata"]["name"]);
    let applied = api.call(async move |client| {
        let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let (group, version) = match text("apiVersion").split_once('/') {
            Some((group, version)) => (group.to_owned(), version.to_owned()),
            None => (String::new(), text("apiVersion")),
        };
        let resource = ApiResource::from_gvk(&GroupVersionKind { group, version, kind: text("kind") });
        let api: kube::Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => kube::Api::namespaced_with(client, namespace, &resource),
            None => kube::Api::all_with(client, &resource),
        };
        let params = PatchParams { dry_run, ..PatchParams::apply("test").validation_strict() };
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        api.patch(name, &params, &Patch::Apply(&object)).await
    });
    applied.unwrap_or_else(|error| panic!("{shown}: {error}"));
}

/// A cluster in which the manifests of a folder are applied.
struct Cluster {
    pod: PodSpec,
    kubelet: Kubelet,
    log: PathBuf,
    child: Option<Child>,
    api: Api,
    plane: ControlPlane,
    role: Value,
    _servers: Vec<Server>,
    lab: Lab,
}

impl Cluster {
    fn new(folder: &str) -> Self {
        let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::Conntrack)).unwrap();
        let serve = |pod: &fairlead_lab::Pod| {
            Server::both(&pod.ns, &pod.name, &[false, true].map(|v6| SocketAddr::new(pod.ip(v6), TARGET))).unwrap()
        };
        let servers = lab.pods.iter().map(serve).collect();
        let plane = ControlPlane::start_audited(&lab.node.ns).unwrap();
        let api = plane.api().unwrap();
        create_node(&api, &lab);
        let mut manifests = deploy::render(folder).unwrap();
        for object in &mut manifests {
            // The one value that the base asks for.
            if object["kind"] == "ConfigMap" {
                assert_eq!(object["data"], json!({"api-server": ""}));
                object["data"]["api-server"] = json!(format!("https://{SERVER}"));
            }
            apply(&api, object, true);
            apply(&api, object, false);
        }
        let pod = deploy::pod_of(&manifests).unwrap();
        create_pod_dry(&api, &pod);
        mount_bpf_fs().unwrap();
        let bpf = lab.pin_path();
        fs::create_dir_all(&bpf).unwrap();
        let kubernetes = api.get::<Service>("default", "kubernetes").unwrap().spec.unwrap().cluster_ip.unwrap();
        let kubelet = Kubelet {
            node: NODE_NAME.to_owned(),
            netns: lab.node.ns.clone(),
            dir: lab.dir().join("pod"),
            bpf,
            account: account(&api, &plane),
            config_maps: config_maps(&manifests),
            kubernetes: (kubernetes, 443),
        };
        let role = manifests.iter().find(|object| object["kind"] == "ClusterRole").unwrap().clone();
        let log = lab.dir().join("pod.log");
        Self { pod, kubelet, log, child: None, api, plane, role, _servers: servers, lab }
    }

    /// Runs the init containers to their end and starts the agent.
    fn start(&mut self) {
        for container in self.pod.init_containers.iter().flatten() {
            netns::run(&mut self.kubelet.container(&self.pod, &container.name).unwrap()).unwrap();
        }
        let log = File::create(&self.log).unwrap();
        let mut command = self.kubelet.container(&self.pod, NAME).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(janitor::spawn(&mut command).unwrap());
    }

    /// Ends the agent as the kubelet does.
    fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        janitor::release(child.id());
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).ok();
        if !wait_until(Duration::from_secs(5), || !matches!(child.try_wait(), Ok(None))) {
            child.kill().ok();
            child.wait().ok();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn wait(&self, what: &str, done: impl FnMut() -> bool) {
        assert!(wait_until(PATIENCE, done), "{what}: not within {PATIENCE:?}; the log:\n{}", self.log());
    }

    /// Puts somebody's program before all others at ingress of the client's device: its id, and what holds it there.
    fn in_front(&self) -> (u32, OwnedFd) {
        let program = foreign::load(c"stays_in_front", &[foreign::mov(0, -1), foreign::EXIT]).unwrap();
        let ifindex = self.client_device();
        let link = self.lab.node.ns.run(|| sys::attach_tcx(program.as_fd(), ifindex, false)).unwrap().unwrap();
        let id = sys::tcx_link(link.as_fd()).unwrap().unwrap().program_id;
        (id, link)
    }

    fn client_device(&self) -> u32 {
        let device = &*self.lab.client.node_device;
        self.lab.node.ns.run(|| nix::net::if_::if_nametoindex(device)).unwrap().unwrap()
    }

    /// The tag of the program that runs first at ingress of the client's device.
    fn stub(&self) -> String {
        let node = &self.lab.node.ns;
        let ifindex = self.client_device();
        let at_ingress = node.run(|| sys::tcx_programs(ifindex, false)).unwrap().unwrap();
        let id = at_ingress.unwrap()[0].0;
        let program = node.output("bpftool", &["-j", "prog", "show", "id", &id.to_string()]).unwrap();
        let program: Value = serde_json::from_str(&program).unwrap();
        program["tag"].as_str().unwrap().to_owned()
    }

    fn events(&self, reason: &'static str) -> Vec<Event> {
        let all = self.api.call(async |client| kube::Api::<Event>::all(client).list(&ListParams::default()).await);
        all.unwrap().items.into_iter().filter(|event| event.reason.as_deref() == Some(reason)).collect()
    }

    fn status(&self, path: &str) -> u16 {
        http::get(&self.lab.node.ns, SocketAddr::from(([127, 0, 0, 1], 10_256)), path).unwrap().status
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
        let mut cleanup = self.lab.node.ns.command(find_binary().unwrap());
        if let Err(error) = netns::run(cleanup.arg("cleanup").arg("--pin-path").arg(self.kubelet.bpf.join("fairlead")))
        {
            eprintln!("{error:#}");
        }
    }
}

/// The template as the pod that a DaemonSet's controller would make of it: admission and defaults judge pods only.
fn create_pod_dry(api: &Api, pod: &PodSpec) {
    let spec = PodSpec { node_name: Some(NODE_NAME.to_owned()), ..pod.clone() };
    let metadata = serde_json::from_value(json!({"name": "dry", "namespace": NAMESPACE})).unwrap();
    let pod = Pod { metadata, spec: Some(spec), status: None };
    let created = api.call(async move |client| {
        let params = PostParams { dry_run: true, ..PostParams::default() };
        kube::Api::<Pod>::namespaced(client, NAMESPACE).create(&params, &pod).await
    });
    assert_eq!(created.unwrap().spec.unwrap().priority, Some(2_000_001_000), "system-node-critical");
}

fn account(api: &Api, plane: &ControlPlane) -> Account {
    let token = api.call(async |client| {
        let request = TokenRequest::default();
        kube::Api::<ServiceAccount>::namespaced(client, NAMESPACE)
            .create_token_request(NAME, &PostParams::default(), &request)
            .await
    });
    let ca = fs::read_to_string(plane.dir().join("certs/apiserver.crt")).unwrap();
    Account { token: token.unwrap().status.unwrap().token, ca, namespace: NAMESPACE.to_owned() }
}

/// Those that were applied, and the one that kubeadm makes for kube-proxy.
fn config_maps(manifests: &[Value]) -> BTreeMap<String, BTreeMap<String, String>> {
    let maps = manifests.iter().filter(|object| object["kind"] == "ConfigMap").map(|map| {
        let name = map["metadata"]["name"].as_str().unwrap().to_owned();
        (name, serde_json::from_value(map["data"].clone()).unwrap())
    });
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    certificate-authority: \
         /var/run/secrets/kubernetes.io/serviceaccount/ca.crt\n    server: https://{SERVER}\n  name: default\ncontexts:\n\
         - context:\n    cluster: default\n    namespace: default\n    user: default\n  name: default\n\
         current-context: default\nusers:\n- name: default\n  user:\n    tokenFile: \
         /var/run/secrets/kubernetes.io/serviceaccount/token\n"
    );
    let kube_proxy = BTreeMap::from([("kubeconfig.conf".to_owned(), kubeconfig)]);
    maps.chain([("kube-proxy".to_owned(), kube_proxy)]).collect()
}

/// Verb, group and resource of everything that a role allows.
fn allowed(role: &Value) -> BTreeSet<[String; 3]> {
    let list = |value: &Value| serde_json::from_value::<Vec<String>>(value.clone()).unwrap();
    let mut allowed = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for verb in list(&rule["verbs"]) {
            for group in list(&rule["apiGroups"]) {
                for resource in list(&rule["resources"]) {
                    allowed.insert([verb.clone(), group.clone(), resource]);
                }
            }
        }
    }
    allowed
}

/// The pod as it is written serves, and asks for exactly what its role allows.
fn serves_with_its_own_rights(folder: &str) {
    let _turn = Turn::beside();
    let mut cluster = Cluster::new(folder);
    // Somebody has the port of a health check.
    let port = 31_700;
    let taken = cluster.lab.node.ns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).unwrap().unwrap();
    let balanced = |name: &str| -> Service {
        let mut service = objects::service(name);
        let spec = service.spec.as_mut().unwrap();
        spec.type_ = Some("LoadBalancer".to_owned());
        spec.external_traffic_policy = Some("Local".to_owned());
        spec.health_check_node_port = Some(port.into());
        service
    };
    cluster.start();
    cluster.wait("the first sync", || cluster.log().contains(READY_LINE));
    let vips = Vips::of(&cluster.api.create(&objects::service("web")).unwrap());
    for v6 in [false, true] {
        cluster.api.create(&objects::slice("web", v6, &[cluster.lab.pods[0].ip(v6)])).unwrap();
    }
    for (proto, to) in [(Proto::Tcp, vips.v4), (Proto::Udp, vips.v6)] {
        let ask = Ask::new(proto, to).timeout(Duration::from_millis(200));
        let answered = || ask.once(&cluster.lab.client.ns).unwrap().outcome.answer().is_some();
        assert!(wait_until(SOON, answered), "{to}/{proto} is not answered; the log:\n{}", cluster.log());
    }
    // Probes.
    assert_eq!((cluster.status("/livez"), cluster.status("/healthz")), (200, 200));
    let taint = json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}});
    let tainted = cluster.api.call(async move |client| {
        kube::Api::<Node>::all(client).patch(NODE_NAME, &PatchParams::default(), &Patch::Merge(&taint)).await
    });
    tainted.unwrap();
    cluster.wait("rule 118: the tainted node is not eligible", || cluster.status("/healthz") == 503);
    assert_eq!(cluster.status("/livez"), 200);

    // Events: one at the node, one at a Service; the second time it is patched into a series.
    cluster.wait("an Event at the node", || !cluster.events("Starting").is_empty());
    let about = cluster.events("Starting").remove(0).regarding.unwrap();
    assert_eq!((about.kind.as_deref(), about.name.as_deref()), (Some("Node"), Some(NODE_NAME)));
    for times in [1, 2] {
        cluster.api.create(&balanced("balanced")).unwrap();
        cluster.wait("rule 128: an Event at the Service", || {
            let events = cluster.events("FailedToStartServiceHealthcheck");
            events.iter().any(|event| event.series.as_ref().map_or(1, |series| series.count) >= times)
        });
        cluster.api.delete::<Service>("default", "balanced").unwrap();
        // Its socket is not wanted any more before it is wanted again.
        std::thread::sleep(Duration::from_millis(500));
    }
    let event = cluster.events("FailedToStartServiceHealthcheck").remove(0);
    assert_eq!((event.type_.as_deref(), event.action.as_deref()), (Some("Warning"), Some("Listen")));
    let note = event.note.unwrap();
    assert!(
        note.starts_with(&format!("node {NODE_NAME} failed to start healthcheck \"default/balanced\" on port")),
        "{note}"
    );
    drop(taken);

    let asked = cluster.plane.audit(&format!("system:serviceaccount:{NAMESPACE}:{NAME}")).unwrap();
    let refused: Vec<_> = asked.iter().filter(|asked| asked.code == 403).collect();
    assert!(refused.is_empty(), "the role does not suffice: {refused:?}");
    let asked: BTreeSet<_> = asked.into_iter().map(|asked| [asked.verb, asked.group, asked.resource]).collect();
    assert_eq!(asked, allowed(&cluster.role), "what was asked for, and what the role allows");
}

#[test]
fn the_base_serves_with_its_own_account_and_needs_every_right_that_it_has() {
    serves_with_its_own_rights("base");
}

#[test]
fn the_kubeadm_overlay_serves_with_kube_proxys_kubeconfig() {
    serves_with_its_own_rights("overlays/kubeadm");
}

/// An object like the agent's own whose stubs have other instructions: one that says the same in 64 bits instead of 32.
fn with_other_stubs() -> Vec<u8> {
    /// `call bpf_tail_call`, `w0 = TCX_NEXT`, `exit`.
    const END: [u8; 24] =
        [0x85, 0, 0, 0, 12, 0, 0, 0, 0xb4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x95, 0, 0, 0, 0, 0, 0, 0];
    const MOV64: u8 = 0xb7;
    let mut object = OBJECT.to_vec();
    let ends: Vec<_> = (0..object.len()).step_by(8).filter(|at| object[*at..].starts_with(&END)).collect();
    assert!(ends.len() >= 2, "the stubs of this build end otherwise");
    ends.into_iter().for_each(|at| object[at + 8] = MOV64);
    object
}

/// A pod that is exchanged finds its predecessor's links with the capabilities of a pod, which are not root's.
#[test]
fn a_pod_takes_over_what_the_one_before_it_attached_and_nothing_is_lost() {
    const OBJECT_FILE: &str = "other-build.o";
    let _turn = Turn::beside();
    let mut cluster = Cluster::new("base");
    let vips = Vips::of(&cluster.api.create(&objects::service("web")).unwrap());
    for v6 in [false, true] {
        cluster.api.create(&objects::slice("web", v6, &[cluster.lab.pods[0].ip(v6)])).unwrap();
    }
    cluster.start();
    cluster.wait("the first sync", || cluster.log().contains(READY_LINE));
    let ask = Ask::new(Proto::Tcp, vips.v4).timeout(Duration::from_millis(200));
    let answered = || ask.once(&cluster.lab.client.ns).unwrap().outcome.answer().is_some();
    assert!(wait_until(SOON, answered), "{} is not answered; the log:\n{}", vips.v4, cluster.log());

    let plan = |fresh, to| {
        let (workers, pause) = (1, Duration::from_millis(1));
        LoadPlan { fresh, workers, pause, ..LoadPlan::new(Proto::Tcp, to) }
    };
    let loads = [plan(false, vips.v4), plan(false, vips.v6), plan(true, vips.v4)];
    let loads = loads.map(|plan| Load::start(&cluster.lab.client.ns, plan).unwrap());
    // The folder that stands for /run/fairlead.
    fs::write(cluster.kubelet.dir.join("-run-fairlead").join(OBJECT_FILE), with_other_stubs()).unwrap();
    let own = cluster.pod.containers[0].args.clone().unwrap();
    let other = [own.clone(), vec![format!("--ebpf-object=/run/fairlead/{OBJECT_FILE}")]].concat();
    let stub = cluster.stub();
    let (mut stubs, mut neighbour) = (Vec::new(), None);
    for (args, neighbour_comes) in [(&own, false), (&other, false), (&other, true), (&own, false)] {
        cluster.stop();
        if neighbour_comes {
            neighbour = Some(cluster.in_front());
        }
        cluster.pod.containers[0].args = Some(args.clone());
        cluster.start();
        cluster.wait("the first sync", || cluster.log().contains(READY_LINE));
        assert!(loads.iter().all(Load::turn_over), "a request hangs; the log:\n{}", cluster.log());
        if let (Some((id, _)), true) = (&neighbour, neighbour_comes) {
            let told = format!("[\"program {id}, tcx link");
            cluster.wait("ours is put back in front of it", || cluster.log().contains(&told));
        }
        let log = cluster.log();
        let complaints = || log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
        let complaints: Vec<_> = complaints().filter(|line| !line.contains("loading another eBPF object")).collect();
        assert!(complaints.is_empty(), "{complaints:#?}\n{log}");
        stubs.push(cluster.stub());
    }
    for load in loads {
        let report = load.stop();
        assert!(report.failures().is_empty(), "{report}");
    }
    let [same, other, again, back] = &stubs[..] else { panic!("{stubs:?}") };
    assert!(*same == stub && *other != stub && again == other && *back == stub, "whose stubs are attached: {stubs:?}");
}

/// The base without its value: nobody serves the ClusterIP of the API yet, so the agent cannot begin, and says what to do.
#[test]
fn without_the_address_of_the_api_server_the_agent_says_what_is_missing() {
    let _turn = Turn::beside();
    let mut cluster = Cluster::new("base");
    cluster.kubelet.config_maps.get_mut(NAME).unwrap().insert("api-server".to_owned(), String::new());
    cluster.start();
    let mut child = cluster.child.take().unwrap();
    assert!(wait_until(SOON, || matches!(child.try_wait(), Ok(Some(_)))), "it still runs:\n{}", cluster.log());
    janitor::release(child.id());
    assert_eq!(child.wait().unwrap().code(), Some(2), "{}", cluster.log());
    assert!(cluster.log().contains("--api-server") && cluster.log().contains("such as https://"), "{}", cluster.log());
}

/// Only the ClusterIP to go by: the node lives, says that it waits, and begins once somebody leads the address to the server.
#[test]
fn on_a_node_where_nobody_serves_the_api_yet_the_agent_waits_and_is_not_restarted() {
    let _turn = Turn::beside();
    let mut cluster = Cluster::new("base");
    let container = &mut cluster.pod.containers[0];
    container.args = Some(vec!["run".to_owned()]);
    cluster.start();
    cluster.wait("a word about the API server", || cluster.log().contains("the API server cannot be watched"));
    assert_eq!((cluster.status("/livez"), cluster.status("/healthz")), (200, 503));
    assert!(!cluster.log().contains(READY_LINE), "{}", cluster.log());
    assert!(!cluster.log().contains("cannot be shown"), "{}", cluster.log());
    // kube-proxy, or whoever serves it.
    let (ip, port) = cluster.kubelet.kubernetes.clone();
    let rules = format!(
        "table ip other_proxy {{\n  chain out {{\n    type nat hook output priority -100\n    ip daddr {ip} tcp dport {port} dnat to \
         {SERVER}\n  }}\n}}\n"
    );
    cluster.lab.node.ns.sysctl("net.ipv4.conf.all.route_localnet", "1").unwrap();
    cluster.lab.node.ns.nft(&rules).unwrap();
    cluster.wait("the first sync", || cluster.log().contains(READY_LINE));
    cluster.wait("the node is eligible", || cluster.status("/healthz") == 200);
}

/// What a node pays for a small cluster: the image that it pulls, and memory.
#[test]
fn the_image_is_small_and_takes_little_memory_with_a_hundred_services() {
    let _turn = Turn::beside();
    let Some(archive) = image::archive() else {
        not_run::because("there is no image here, and the program of a test is a larger one");
        return;
    };
    let bytes = fs::metadata(&archive).unwrap().len();
    assert!(bytes <= LARGEST_IMAGE, "the image has {bytes} bytes");
    let mut cluster = Cluster::new("base");
    let mut last = None;
    for n in 0..SERVICES {
        let name = format!("service-{n}");
        last = Some(Vips::of(&cluster.api.create(&objects::service(&name)).unwrap()));
        for v6 in [false, true] {
            // Ten endpoints, of which one is there.
            let mut endpoints = vec![cluster.lab.pods[0].ip(v6)];
            endpoints.extend((1..10).map(|m| elsewhere(n * 10 + m, v6)));
            cluster.api.create(&objects::slice(&name, v6, &endpoints)).unwrap();
        }
    }
    cluster.start();
    cluster.wait("the first sync", || cluster.log().contains(READY_LINE));
    let ask = Ask::new(Proto::Tcp, last.unwrap().v4).timeout(Duration::from_millis(200));
    let answered = || ask.once(&cluster.lab.client.ns).unwrap().outcome.answer().is_some();
    assert!(wait_until(SOON, answered), "the last Service is not answered; the log:\n{}", cluster.log());
    // What the start took is given back, and the first sweep over the flows is done.
    std::thread::sleep(Duration::from_secs(3));
    let pid = cluster.child.as_ref().unwrap().id();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim();
    let resident = resident.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024;
    println!("image {:.1} MB; resident {:.1} MB", bytes as f64 / 1e6, resident as f64 / 1e6);
    assert!(resident <= MOST_RESIDENT, "{resident} bytes are resident:\n{status}");
}

/// An address of a pod that is on no node of this cluster.
fn elsewhere(n: u32, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0x10, 0x245, 0, 0, 0, 0, n as u16).into()
    } else {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 245, 0, 0)) + n).into()
    }
}
