//! The cluster: an API server with some thousand Services, a node, two pods that answer for all endpoints.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Lab, LabConfig, Netfilter, Shape, manifest::NODE_NAME, topology::SERVICE_CIDRS};
use fairlead_tests::controlplane::{Api, ControlPlane, node};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::api::PostParams;
use serde_json::json;

use super::{
    answers::{Answers, PORT, Side, TARGET, service},
    probe,
};

/// Endpoints of each Service.
pub(super) const ENDPOINTS: u32 = 10;
/// Services that are created at a time, as a busy controller does.
const AT_ONCE: usize = 16;
/// A server that is short of time ends connections without an answer, and may have created all the same.
const ATTEMPTS: u32 = 20;
/// Questions after a change that only the new pod may answer.
const AFTERWARDS: u32 = 4;
const NAMESPACE: &str = "default";

/// One change, seen from outside.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effect {
    /// From the API server's answer to the first answer of the new pod; zero where that came first.
    pub(super) took: Duration,
    /// Questions after that which the new pod did not answer.
    pub(super) late: u32,
    /// Between which times the machine had to run for this to mean anything.
    pub(super) span: (Instant, Instant),
}

/// A running cluster. Fields are dropped in their order.
pub(super) struct Cluster {
    api: Api,
    pub(super) plane: ControlPlane,
    _answers: Answers,
    pub(super) lab: Lab,
    /// Which pod the slice of each Service leads to.
    sides: Vec<Side>,
}

impl Cluster {
    pub(super) fn start() -> Result<Self> {
        let lab = Lab::new(LabConfig { pods: 2, ..LabConfig::new(Shape::Routed, Netfilter::None) })?;
        // A Service that is not served yet must not send its packets round in circles between the node and its router.
        lab.ext.ns.ip_batch(&format!("route replace blackhole {}\n", SERVICE_CIDRS[0]))?;
        let answers = Answers::start(&lab)?;
        let plane = ControlPlane::start(&lab.node.ns)?;
        let api = plane.api()?;
        node::create(&api, NODE_NAME)?;
        node::set_addresses(&api, NODE_NAME, &[lab.node.v4.into(), lab.node.v6.into()])?;
        Ok(Self { api, plane, _answers: answers, lab, sides: Vec::new() })
    }

    /// Services that there are.
    pub(super) fn services(&self) -> u32 {
        self.sides.len() as u32
    }

    /// Creates Services, each with its slice, until there are this many.
    pub(super) fn grow(&mut self, to: u32) -> Result<()> {
        let numbers = self.services()..to;
        self.sides.resize(to as usize, Side::A);
        self.api.call(async move |client| {
            let services = kube::Api::<Service>::namespaced(client.clone(), NAMESPACE);
            let slices = kube::Api::<EndpointSlice>::namespaced(client, NAMESPACE);
            let (services, slices) = (&services, &slices);
            let create = async |n: u32| {
                insist(services, &service_object(n)).await?;
                insist(slices, &slice_object(n, Side::A)).await
            };
            futures::stream::iter(numbers).map(create).buffer_unordered(AT_ONCE).try_collect::<()>().await
        })
    }

    /// Waits until every Service answers.
    pub(super) fn last_served(&self, limit: Duration, alive: impl FnMut() -> bool + Send) -> Result<Instant> {
        let services = self.services();
        self.lab.client.ns.run(|| probe::last_served(services, limit, alive))?
    }

    /// Leads a Service to the other pod: one write of its slice, all ten endpoints at once.
    pub(super) fn change(&mut self, n: u32, limit: Duration) -> Result<Effect> {
        let to = self.sides[n as usize].other();
        self.sides[n as usize] = to;
        let slice = slice_object(n, to);
        let give_up = AtomicBool::new(false);
        let (api, client) = (&self.api, &self.lab.client.ns);
        std::thread::scope(|scope| {
            let probe = scope.spawn(|| {
                client.enter()?;
                let heard = probe::first_answer(service(n), to, &give_up)?;
                let others = match heard {
                    Some(_) => probe::others(service(n), to, AFTERWARDS)?,
                    None => 0,
                };
                Ok::<_, anyhow::Error>((heard, others))
            });
            let requested = Instant::now();
            let written = api.replace(&slice);
            let answered = Instant::now();
            while written.is_ok() && !probe.is_finished() && answered.elapsed() < limit {
                std::thread::sleep(Duration::from_micros(200));
            }
            give_up.store(true, Ordering::Relaxed);
            written?;
            let (heard, late) = probe.join().map_err(|_| anyhow::anyhow!("the probe panicked"))??;
            let heard = heard.with_context(|| format!("the new pod of Service {n} did not answer within {limit:?}"))?;
            ensure!(heard > requested, "Service {n} was answered by its new pod before the change");
            let took = heard.saturating_duration_since(answered);
            Ok(Effect { took, late, span: (requested, heard) })
        })
    }
}

async fn insist<K>(api: &kube::Api<K>, object: &K) -> Result<()>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned + serde::Serialize,
{
    for attempt in 1.. {
        match api.create(&PostParams::default(), object).await {
            Ok(_) => break,
            Err(kube::Error::Api(status)) if status.code == 409 => break,
            Err(error) if attempt == ATTEMPTS => {
                return Err(error).with_context(|| format!("not created by {ATTEMPTS} attempts"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    Ok(())
}

fn name(n: u32) -> String {
    format!("service-{n}")
}

/// A Service of one port and one address, as most are.
fn service_object(n: u32) -> Service {
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name(n), "namespace": NAMESPACE, "labels": {"app": name(n)}},
        "spec": {
            "clusterIP": service(n).ip(),
            "ports": [{"name": "main", "port": PORT, "protocol": "UDP", "targetPort": TARGET}],
        },
    });
    serde_json::from_value(object).expect("a literal of this file")
}

/// Its slice, written by hand: no controller knows of it. The fields are those that the controllers write.
fn slice_object(n: u32, side: Side) -> EndpointSlice {
    let endpoint = |m: u32| {
        let pod = format!("{}-{m}", name(n));
        json!({
            "addresses": [side.address(n * ENDPOINTS + m)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", m % 7),
            "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": "d3b0738c-0e1f-4b5a-9c8e-1f2a3b4c5d6e"},
            "zone": "zone-a",
        })
    };
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{}-by-hand", name(n)), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": name(n), "app": name(n)},
        },
        "addressType": "IPv4",
        "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "main", "port": TARGET, "protocol": "UDP"}],
    });
    serde_json::from_value(object).expect("a literal of this file")
}
