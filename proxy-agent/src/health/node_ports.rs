//! The `healthCheckNodePort` of each Service that has one: kube-proxy's rules 122–129.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Health, Moment};
use crate::config::NodePortAddresses;
use crate::devices::NodeAddresses;
use crate::events::{About, Events, Notice, Severity};
use crate::http::{self, Reach};
use crate::model::{IpFamily, ObjectName};
use crate::plan::health::HealthCheck;

/// Health checks by Service.
pub type HealthChecks = BTreeMap<ObjectName, HealthCheck>;

/// What could not be listened on is tried again this often.
const RETRY: Duration = Duration::from_secs(5);
/// How many endpoints of the Service this node has: load balancers weigh nodes by it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// One socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    service: ObjectName,
    addr: SocketAddr,
}

/// What the sockets depend on.
pub struct Inputs {
    /// What is to be answered.
    pub checks: watch::Receiver<HealthChecks>,
    /// The node's addresses.
    pub addresses: watch::Receiver<NodeAddresses>,
    /// Which of them take NodePorts.
    pub policy: NodePortAddresses,
    /// Whether the proxy keeps up.
    pub health: Arc<Health>,
    /// Where failures are told.
    pub events: Events,
    /// This node's name.
    pub node: String,
}

/// Listens where the checks say, until nobody tells any more.
pub async fn run(mut inputs: Inputs) -> Result<(), watch::error::RecvError> {
    let mut open = Open::default();
    loop {
        let wanted = {
            let (checks, addresses) = (inputs.checks.borrow_and_update(), inputs.addresses.borrow_and_update());
            places(&checks, &addresses, &inputs.policy)
        };
        open.bring_into_step(&wanted, &inputs).await;
        tokio::select! {
            changed = inputs.checks.changed() => changed?,
            changed = inputs.addresses.changed() => changed?,
            () = tokio::time::sleep(RETRY), if !open.failures.is_empty() => {}
        }
    }
}

/// Every socket that should be open: on all addresses of a family, or on those that take NodePorts.
fn places(checks: &HealthChecks, addresses: &NodeAddresses, policy: &NodePortAddresses) -> Vec<Place> {
    let mut places = Vec::new();
    for (service, check) in checks {
        for (family, _) in IpFamily::ALL.into_iter().zip(check.local).filter(|(_, local)| local.is_some()) {
            let ips = if policy.takes_all(family) || mutant!("rule-122") {
                vec![family.unspecified()]
            } else {
                let own = addresses.iter().filter(|(addr, flags)| takes_node_ports(**addr, **flags, family));
                own.map(|(addr, _)| *addr).collect()
            };
            let place = |ip| Place { service: service.clone(), addr: SocketAddr::new(ip, check.port) };
            places.extend(ips.into_iter().map(place));
        }
    }
    places
}

fn takes_node_ports(addr: IpAddr, flags: u32, family: IpFamily) -> bool {
    // A link-local address means nothing without its link.
    let link_local = matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
    IpFamily::of(&addr) == family && flags & proxy_common::abi::NodeAddr::NODE_PORTS != 0 && !link_local
}

/// The sockets that are open, and those that could not be opened with the reason.
#[derive(Default)]
struct Open {
    servers: BTreeMap<Place, JoinHandle<()>>,
    failures: BTreeMap<Place, String>,
}

impl Open {
    async fn bring_into_step(&mut self, wanted: &[Place], inputs: &Inputs) {
        self.failures.retain(|place, _| wanted.contains(place));
        // Those that go first: their port may be wanted by those that come.
        let gone: Vec<_> = self.servers.keys().filter(|place| !wanted.contains(place)).cloned().collect();
        for place in gone {
            if let Some(server) = self.servers.remove(&place) {
                tracing::info!(service = %place.service, addr = %place.addr, "health check closed");
                server.abort();
                // An aborted task is an error by its nature; what counts is that its socket is closed by now.
                server.await.unwrap_or_default();
            }
        }
        for place in wanted {
            if !self.servers.contains_key(place) {
                self.open(place.clone(), inputs);
            }
        }
    }

    fn open(&mut self, place: Place, inputs: &Inputs) {
        let listener = match http::listen(place.addr, Reach::Own) {
            Ok(listener) => listener,
            Err(error) => return self.failed(place, &error, inputs),
        };
        tracing::info!(service = %place.service, addr = %place.addr, "health check opened");
        self.failures.remove(&place);
        let (service, family) = (place.service.clone(), IpFamily::of(&place.addr.ip()));
        let (checks, health) = (inputs.checks.clone(), Arc::clone(&inputs.health));
        // Any path and any method (rule 123).
        let server = http::serve(listener, move |_| {
            let local = checks.borrow().get(&service).and_then(|check| check.local[family as usize]).unwrap_or(0);
            std::future::ready(answer(&service, local, health.judge(Moment::now()).healthy))
        });
        self.servers.insert(place, tokio::spawn(server));
    }

    /// Told once for each reason (rule 128).
    fn failed(&mut self, place: Place, error: &std::io::Error, inputs: &Inputs) {
        let (service, port, error) = (&place.service, place.addr.port(), error.to_string());
        if self.failures.get(&place) == Some(&error) {
            return;
        }
        tracing::error!(%service, addr = %place.addr, error, "cannot answer health checks; trying again");
        inputs.events.tell(Notice {
            about: About::Service(service.clone()),
            severity: Severity::Warning,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: format!(
                "node {} failed to start healthcheck \"{service}\" on port {port}: listen {}: {error}",
                inputs.node, place.addr
            ),
        });
        self.failures.insert(place, error);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.servers.values().for_each(JoinHandle::abort);
    }
}

/// The body, byte for byte (rule 125).
struct Body<'a> {
    service: &'a ObjectName,
    local: usize,
    healthy: bool,
}

impl fmt::Display for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (namespace, name) = (self.service.namespace(), self.service.name());
        write!(f, "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n")?;
        if mutant!("rule-125") {
            write!(f, " ")?;
        }
        write!(f, "\t\"localEndpoints\": {},\n\t\"serviceProxyHealthy\": {}\n}}", self.local, self.healthy)
    }
}

fn answer(service: &ObjectName, local: usize, healthy: bool) -> http::Answer {
    let mut answer =
        http::json(local != 0 && (healthy || mutant!("rule-123")), Body { service, local, healthy }.to_string());
    answer.headers_mut().insert(WEIGHT, HeaderValue::from(if mutant!("rule-124") { 1 } else { local }));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::StatusCode;
    use proxy_common::abi::NodeAddr;

    fn web() -> ObjectName {
        ObjectName::new("ns", "name")
    }

    #[test]
    fn rules_123_to_125_status_headers_and_body() {
        let text = "{\n\t\"service\": {\n\t\t\"namespace\": \"ns\",\n\t\t\"name\": \"name\"\n\t},\n\t\"localEndpoints\": 2,\n\t\
                    \"serviceProxyHealthy\": true\n}";
        let yes = answer(&web(), 2, true);
        assert_eq!((yes.status(), yes.body().as_str()), (StatusCode::OK, text));
        for (local, healthy) in [(0, true), (2, false), (0, false)] {
            let no = answer(&web(), local, healthy);
            assert_eq!(no.status(), StatusCode::SERVICE_UNAVAILABLE, "{local} {healthy}");
            let header = |name: &str| no.headers().get(name).and_then(|value| value.to_str().ok());
            assert_eq!(header("content-type"), Some("application/json"));
            assert_eq!(header("x-content-type-options"), Some("nosniff"));
            assert_eq!(header("x-load-balancing-endpoint-weight"), Some(&*local.to_string()));
        }
    }

    #[test]
    fn rule_122_on_every_address_or_on_those_that_take_node_ports() {
        let checks = HealthChecks::from([(web(), HealthCheck { port: 31_000, local: [Some(1), Some(0)] })]);
        let flags = NodeAddr::LOCAL | NodeAddr::NODE_PORTS;
        let addresses: NodeAddresses =
            [("192.0.2.1", flags), ("198.51.100.1", NodeAddr::LOCAL), ("2001:db8::1", flags), ("fe80::1", flags)]
                .map(|(addr, flags)| (addr.parse().unwrap(), flags))
                .into();
        let listed = |policy: &NodePortAddresses| {
            let mut places: Vec<_> =
                places(&checks, &addresses, policy).iter().map(|place| place.addr.to_string()).collect();
            places.sort();
            places
        };
        let networks = |texts: &[&str]| NodePortAddresses::Networks(texts.iter().map(|t| t.parse().unwrap()).collect());
        assert_eq!(listed(&NodePortAddresses::All), ["0.0.0.0:31000", "[::]:31000"]);
        assert_eq!(listed(&NodePortAddresses::Primary), ["192.0.2.1:31000", "[2001:db8::1]:31000"]);
        assert_eq!(listed(&networks(&["192.0.2.0/24"])), ["192.0.2.1:31000", "[::]:31000"]);
        assert_eq!(listed(&networks(&["0.0.0.0/0", "2001:db8::/64"])), ["0.0.0.0:31000", "[2001:db8::1]:31000"]);
    }

    #[test]
    fn a_family_without_an_address_of_the_service_is_not_answered() {
        let checks = HealthChecks::from([(web(), HealthCheck { port: 31_000, local: [None, Some(0)] })]);
        let places = places(&checks, &NodeAddresses::new(), &NodePortAddresses::All);
        assert_eq!(places.iter().map(|place| place.addr.to_string()).collect::<Vec<_>>(), ["[::]:31000"]);
    }
}
