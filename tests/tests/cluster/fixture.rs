//! One cluster: namespaces, servers in its pods, the API server, the agent.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use fairlead_lab::{Ask, Lab, LabConfig, Netfilter, Outcome, Proto, Server, Shape};
use fairlead_tests::controlplane::{Api, ControlPlane, SERVER, node};
use k8s_openapi::api::core::v1::Service;

use crate::{agent::Agent, alone, client::Client, objects, relay::Relay};

/// The port that the pods' servers listen on.
pub(crate) const TARGET: u16 = 8080;
/// How long an effect may take to appear where the case measures something else.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// How long an agent that lost the API server may take to be in step again: a pause of at most 5 s, and what a busy machine
/// takes.
pub(crate) const AFTER_BACKOFF: Duration = Duration::from_secs(15);

/// Who has the machine.
static TURNS: (Mutex<Turns>, Condvar) =
    (Mutex::new(Turns { tickets: 0, next: 0, alone: false, beside: 0 }), Condvar::new());

/// Cases that want to be alone get their turn in the order in which they ask for it, and before the others: one that began among
/// those would wait for the longest of them, and nobody could begin meanwhile.
struct Turns {
    tickets: u64,
    next: u64,
    alone: bool,
    beside: u32,
}

/// The turn of a case, also after one that panicked. It ends when this is dropped.
pub(crate) struct Turn {
    alone: bool,
}

impl Turn {
    /// Waits for the turn of a case that may run beside others.
    pub(crate) fn beside() -> Self {
        let mut turns = Self::wait(|turns| turns.alone || turns.next != turns.tickets);
        turns.beside += 1;
        drop(turns);
        // Those that measure come first, and are done.
        alone::forget();
        Self { alone: false }
    }

    /// Waits for the turn of a case that has the machine to itself.
    pub(crate) fn alone() -> Self {
        let mut turns = TURNS.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = turns.tickets;
        turns.tickets += 1;
        drop(turns);
        let mut turns = Self::wait(|turns| turns.next != ticket || turns.alone || turns.beside > 0);
        turns.next += 1;
        turns.alone = true;
        Self { alone: true }
    }

    fn wait(not_yet: impl Fn(&Turns) -> bool) -> MutexGuard<'static, Turns> {
        let turns = TURNS.0.lock().unwrap_or_else(PoisonError::into_inner);
        TURNS.1.wait_while(turns, |turns| not_yet(turns)).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = TURNS.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.alone = false;
        turns.beside -= u32::from(!self.alone);
        TURNS.1.notify_all();
    }
}

/// Makes something that outlives the case that needs it first: what a control plane runs ends with the thread that started
/// it, so that is one which never ends.
pub(crate) fn kept<T: Send + 'static>(make: impl FnOnce() -> T + Send + 'static) -> T {
    let (made, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Who waits takes it, or has panicked.
        made.send(make()).ok();
        loop {
            std::thread::park();
        }
    });
    hear.recv().expect("what is shared could not be made; the message stands above")
}

/// A cluster with a running agent. Fields are dropped in their order: the agent first, its namespaces last.
pub(crate) struct Cluster {
    pub(crate) agent: Agent,
    pub(crate) relay: Relay,
    pub(crate) api: Api,
    pub(crate) plane: ControlPlane,
    _servers: Vec<Server>,
    pub(crate) lab: Lab,
    _turn: Option<Turn>,
}

impl Cluster {
    /// A cluster whose agent has done its first sync. It runs as `system:kube-proxy`, with that user's rights only.
    pub(crate) fn start() -> Self {
        let turn = Turn::beside();
        Self { _turn: Some(turn), ..Self::without_turn() }
    }

    /// The same, for who sees to turns.
    pub(crate) fn without_turn() -> Self {
        Self::of(Lab::new(LabConfig::new(Shape::Routed, Netfilter::Conntrack)).unwrap())
    }

    /// The same in this lab.
    pub(crate) fn of(lab: Lab) -> Self {
        let servers = lab
            .pods
            .iter()
            .map(|pod| {
                let addresses = [pod.ip(false), pod.ip(true)].map(|ip| SocketAddr::new(ip, TARGET));
                Server::both(&pod.ns, &pod.name, &addresses).unwrap()
            })
            .collect();
        let plane = ControlPlane::start(&lab.node.ns).unwrap();
        let api = plane.api().unwrap();
        create_node(&api, &lab);
        let relay = Relay::start(&lab.node.ns, SERVER);
        let kubeconfig = lab.dir().join("agent.kubeconfig");
        let text = fs::read_to_string(plane.proxy_kubeconfig()).unwrap();
        assert!(text.contains(&SERVER.to_string()), "the kubeconfig names another server: {text}");
        fs::write(&kubeconfig, text.replace(&SERVER.to_string(), &relay.address().to_string())).unwrap();
        let agent = Agent::start(&lab, &kubeconfig);
        Self { agent, relay, api, plane, _servers: servers, lab, _turn: None }
    }

    /// Creates a dual-stack Service, port 80 over TCP and UDP, and says which ClusterIPs the API server gave it.
    pub(crate) fn create_service(&self, name: &str) -> Vips {
        Vips::of(&self.api.create(&objects::service(name)).unwrap())
    }

    /// Creates the Service's slices, one per family, with these pods as their endpoints.
    pub(crate) fn create_slices(&self, service: &str, pods: &[&str]) {
        for v6 in [false, true] {
            self.api.create(&objects::slice(service, v6, &self.addresses(pods, v6))).unwrap();
        }
    }

    /// Gives the Service's slices other endpoints.
    pub(crate) fn set_endpoints(&self, service: &str, pods: &[&str]) {
        for v6 in [false, true] {
            self.api.replace(&objects::slice(service, v6, &self.addresses(pods, v6))).unwrap();
        }
    }

    /// The addresses of the pods of these names.
    pub(crate) fn addresses(&self, pods: &[&str], v6: bool) -> Vec<IpAddr> {
        pods.iter().map(|name| self.lab.pod(name).unwrap_or_else(|| panic!("no pod {name}")).ip(v6)).collect()
    }

    /// Asks once from the client pod.
    pub(crate) fn ask(&self, proto: Proto, to: SocketAddr) -> Outcome {
        Ask::new(proto, to).once(&self.lab.client.ns).unwrap().outcome
    }

    /// Asks from the client pod until the outcome is the wanted one, and says how long that took.
    pub(crate) fn ask_until(
        &self,
        limit: Duration,
        proto: Proto,
        to: SocketAddr,
        wanted: &str,
        is_wanted: impl Fn(&Outcome) -> bool,
    ) -> Duration {
        self.ask_from_until(&self.lab.client.ns, limit, proto, to, wanted, is_wanted)
    }

    /// The same from elsewhere.
    pub(crate) fn ask_from_until<'a>(
        &self,
        from: impl Into<Client<'a>>,
        limit: Duration,
        proto: Proto,
        to: SocketAddr,
        wanted: &str,
        is_wanted: impl Fn(&Outcome) -> bool,
    ) -> Duration {
        let (began, from) = (Instant::now(), from.into());
        let mut timeout = Duration::from_millis(200);
        loop {
            let outcome = from.ask(proto, to).timeout(timeout).once(from.ns).unwrap().outcome;
            if is_wanted(&outcome) {
                return began.elapsed();
            }
            assert!(
                began.elapsed() < limit,
                "{to}/{proto} is not {wanted} within {limit:?} for {from}: the last attempt was {outcome}; the agent's log:\n{}",
                self.agent.log_tail()
            );
            if outcome == Outcome::Timeout {
                timeout = (timeout * 2).min(Duration::from_secs(2));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the pod of this name answers at every address and transport of the Service.
    pub(crate) fn served_by(&self, vips: &Vips, server: &str, limit: Duration) {
        for (proto, to) in vips.all() {
            self.ask_until(limit, proto, to, &format!("answered by {server}"), |outcome| {
                outcome.server() == Some(server)
            });
        }
    }

    /// Waits until every address and transport of the Service refuses.
    pub(crate) fn refused(&self, vips: &Vips, limit: Duration) {
        for (proto, to) in vips.all() {
            self.ask_until(limit, proto, to, "refused", |outcome| *outcome == Outcome::Refused);
        }
    }

    /// Waits until nobody answers at any address of the Service any more: refused or silence.
    pub(crate) fn gone(&self, vips: &Vips, limit: Duration) {
        for (proto, to) in vips.all() {
            self.ask_until(limit, proto, to, "gone", |outcome| outcome.answer().is_none());
        }
    }
}

/// The ClusterIPs of a Service, with its port.
#[derive(Clone, Debug)]
pub(crate) struct Vips {
    pub(crate) v4: SocketAddr,
    pub(crate) v6: SocketAddr,
}

impl Vips {
    pub(crate) fn of(service: &Service) -> Self {
        let ips = service.spec.as_ref().and_then(|spec| spec.cluster_ips.clone()).unwrap_or_default();
        let parsed: Vec<SocketAddr> =
            ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), objects::PORT)).collect();
        let find = |v6| {
            let found = parsed.iter().find(|address| address.is_ipv6() == v6);
            *found.unwrap_or_else(|| panic!("the API server gave no address of both families: {ips:?}"))
        };
        Self { v4: find(false), v6: find(true) }
    }

    /// Both families over both transports.
    pub(crate) fn all(&self) -> [(Proto, SocketAddr); 4] {
        [(Proto::Tcp, self.v4), (Proto::Udp, self.v4), (Proto::Tcp, self.v6), (Proto::Udp, self.v6)]
    }
}

/// Creates the Node of this lab with its addresses.
pub(crate) fn create_node(api: &Api, lab: &Lab) {
    let addresses = [lab.node.v4.into(), lab.node.v6.into()];
    let created = node::create(api, lab.node_name());
    created.and_then(|()| node::set_addresses(api, lab.node_name(), &addresses)).unwrap();
}
