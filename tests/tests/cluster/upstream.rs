//! What Kubernetes' own end-to-end tests of Services ask of a proxy, asked of the agent.
//!
//! Pods are objects whose status the cases set; their endpoints are written by kube-controller-manager. The cases share
//! one cluster of two nodes at the same time, so each has Services and Pods of its own. In comments and names `e2e N` is the
//! place in the list of upstream's cases that `tests/conformance/e2e.yaml` keeps.

use std::sync::{
    PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicBool, Ordering},
};

use fairlead_lab::Proto;
use fairlead_tests::controlplane::Api;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

pub(crate) use self::world::World;
use crate::{
    fixture::{SOON, TARGET, Turn, Vips},
    objects,
};

mod affinity;
mod balancer;
mod conntrack;
mod edits;
mod follow;
mod lifecycle;
mod local;
mod node_ports;
mod ports;
mod ranges;
mod slices;
mod topology;
mod traffic;
mod unready;
mod world;

/// Ports that every server listens on.
const TARGETS: [u16; 3] = [TARGET, 8081, 8082];

/// The cluster of all these cases, and of others that need none to themselves; made when first needed.
static SHARED: RwLock<Option<World>> = RwLock::new(None);
/// A case has failed in it: it is not lent again.
static SPOILT: AtomicBool = AtomicBool::new(false);

/// The shared cluster, for as long as a case has its turn: beside others, or as its only user.
pub(crate) struct Lent<G> {
    shared: G,
    _turn: Turn,
}

type Beside = RwLockReadGuard<'static, Option<World>>;
type Only = RwLockWriteGuard<'static, Option<World>>;

impl<G: std::ops::Deref<Target = Option<World>>> std::ops::Deref for Lent<G> {
    type Target = World;

    fn deref(&self) -> &World {
        self.shared.as_ref().expect("it was made before it was lent")
    }
}

impl std::ops::DerefMut for Lent<Only> {
    fn deref_mut(&mut self) -> &mut World {
        self.shared.as_mut().expect("it was made before it was lent")
    }
}

impl<G> Drop for Lent<G> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            SPOILT.store(true, Ordering::Relaxed);
        }
    }
}

/// Waits for the turn of this case and for the cluster.
pub(crate) fn world() -> Lent<Beside> {
    lend(Turn::beside())
}

/// The same for a case that measures.
pub(crate) fn world_alone() -> Lent<Beside> {
    lend(Turn::alone())
}

fn lend(turn: Turn) -> Lent<Beside> {
    loop {
        let shared = SHARED.read().unwrap_or_else(PoisonError::into_inner);
        if shared.is_some() && !SPOILT.load(Ordering::Relaxed) {
            return Lent { shared, _turn: turn };
        }
        drop(shared);
        drop(only());
    }
}

/// The same for a case that changes what others rely on, and restores it.
pub(crate) fn world_for_one() -> Lent<Only> {
    let turn = Turn::beside();
    Lent { shared: only(), _turn: turn }
}

/// The cluster without any other user, made if there is none that is sound.
fn only() -> Only {
    let mut shared = SHARED.write().unwrap_or_else(PoisonError::into_inner);
    if SPOILT.swap(false, Ordering::Relaxed) {
        *shared = None;
    }
    shared.get_or_insert_with(World::build);
    shared
}

/// See [`World::service`].
fn create(api: &Api, name: &str, spec: Value) -> Service {
    try_create(api, name, spec).expect("the API server takes it")
}

fn try_create(api: &Api, name: &str, spec: Value) -> anyhow::Result<Service> {
    let mut service = serde_json::to_value(objects::service(name))?;
    service["spec"]["selector"] = json!({"app": name});
    if let Value::Object(fields) = spec {
        for (field, value) in fields {
            service["spec"][field] = value;
        }
    }
    api.create(&serde_json::from_value::<Service>(service)?)
}

/// A port of a Service, for `spec`.
fn port(name: &str, number: u16, proto: Proto, target: impl Into<Value>) -> Value {
    json!({"name": name, "port": number, "protocol": proto.name(), "targetPort": target.into()})
}
