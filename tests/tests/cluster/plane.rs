//! The API server itself: what the other cases rely on.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use fairlead_lab::{Namespace, janitor};
use fairlead_tests::controlplane::{Api, ControlPlane, SERVICE_CIDRS};
use k8s_openapi::api::{
    core::v1::{Secret, Service},
    discovery::v1::EndpointSlice,
};
use kube::api::ListParams;

use crate::{
    agent::ms,
    fixture::{Turn, Vips},
    objects,
    upstream::world,
};

/// A namespace for an API server alone; removed when dropped.
pub(crate) struct Alone(pub(crate) Namespace);

impl Alone {
    pub(crate) fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        janitor::arm().unwrap();
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let netns = Namespace::create(&format!("{}plane-{number}", janitor::own_prefix())).unwrap();
        netns.ip_batch("link set lo up\n").unwrap();
        Self(netns)
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.0.delete();
    }
}

#[test]
fn a_restarted_api_server_has_the_same_objects_and_knows_the_same_clients() {
    let _turn = Turn::beside();
    let alone = Alone::new();
    let mut plane = ControlPlane::start(&alone.0).unwrap();
    let api = plane.api().unwrap();
    let created = api.create(&objects::service("kept")).unwrap();
    let vips = Vips::of(&created);
    let [v4, v6] = SERVICE_CIDRS.split(',').map(|cidr| cidr.split_once('/').unwrap().0).collect::<Vec<_>>()[..] else {
        panic!("two ranges are expected: {SERVICE_CIDRS}")
    };
    assert!(vips.v4.ip().to_string().starts_with(v4.trim_end_matches(".0.0")), "{vips:?} is not of {v4}");
    assert!(vips.v6.ip().to_string().starts_with(v6), "{vips:?} is not of {v6}");
    api.create(&objects::slice("kept", false, &["10.244.1.10".parse().unwrap()])).unwrap();

    let stopped = plane.stop().unwrap();
    assert!(api.get::<Service>("default", "kept").is_err(), "the API server still answers after its stop");
    plane.resume().unwrap();
    println!("the API server stopped within {}", ms(stopped));
    let again = plane.api().unwrap();
    assert_eq!(again.get::<Service>("default", "kept").unwrap().metadata.uid, created.metadata.uid);

    plane.crash();
    plane.resume().unwrap();
    let again = plane.api().unwrap();
    let slice = again.get::<EndpointSlice>("default", &objects::slice_name("kept", false)).unwrap();
    assert_eq!(slice.endpoints.len(), 1, "what was written before a crash is there after it");
    again.delete::<Service>("default", "kept").unwrap();
    assert!(again.get::<Service>("default", "kept").is_err());
}

#[test]
fn rule_9_the_proxy_may_read_services_and_slices_and_little_else() {
    let world = world();
    let api = Api::connect(&world.lab.node.ns, &world.plane.proxy_kubeconfig()).unwrap();
    let (services, slices, secrets) = api.call(async |client| {
        let all = ListParams::default();
        (
            kube::Api::<Service>::all(client.clone()).list(&all).await,
            kube::Api::<EndpointSlice>::all(client.clone()).list(&all).await,
            kube::Api::<Secret>::all(client).list(&all).await,
        )
    });
    assert!(services.unwrap().items.iter().any(|service| service.metadata.name.as_deref() == Some("kubernetes")));
    slices.unwrap();
    assert!(is_status(&secrets.unwrap_err(), 403), "secrets are readable");
    let error = api.create(&objects::service("forbidden")).unwrap_err();
    assert!(format!("{error:#}").contains("forbidden"), "{error:#}");
}

#[test]
fn the_api_server_ends_with_the_thread_that_started_it() {
    let _turn = Turn::beside();
    let alone = Alone::new();
    let netns = alone.0.clone();
    let forgotten = std::thread::spawn(move || {
        let plane = ControlPlane::start(&netns).unwrap();
        let api = plane.api().unwrap();
        // Never dropped: as after a test runner that was killed.
        std::mem::forget(plane);
        api
    });
    let api = forgotten.join().unwrap();
    let gone = fairlead_lab::server::wait_until(Duration::from_secs(20), || {
        api.get::<Service>("default", "kubernetes").is_err()
    });
    assert!(gone, "the API server outlived the thread that started it");
}

/// True where the API server answered with this code.
pub(crate) fn is_status(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}
