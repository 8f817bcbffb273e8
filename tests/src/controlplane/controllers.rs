//! kube-controller-manager beside an API server, with the controllers that Services and their endpoints come from.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::api::ListParams;
use serde_json::json;

use super::{
    Api, ControlPlane,
    process::{Log, Process, spend_memory},
};

/// Those that turn Pods and Endpoints into slices, that remove what belonged to what is gone, and that say which ServiceCIDR
/// is ready. The others
/// would act on workloads, volumes and certificates, which no case has; and without kubelets that report, those of
/// nodes and Pods would taint and evict.
const CONTROLLERS: [&str; 7] = [
    "endpointslice-controller",
    "endpoints-controller",
    "endpointslice-mirroring-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "service-cidr-controller",
];
/// A cold start takes two seconds on an idle machine; this bounds it on a busy one.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// The Service that tells when they work.
const PROBE: (&str, &str) = ("kube-system", "controllers-ready");

/// A running kube-controller-manager. Dropping it ends it.
#[derive(Debug)]
pub struct ControllerManager {
    process: Process,
    log: Log,
}

impl ControllerManager {
    /// Starts it in the API server's namespace as user `system:kube-controller-manager`; each controller acts with the
    /// rights of its own ServiceAccount, as in every cluster. Returns once a Service has got its slices.
    pub fn start(plane: &ControlPlane) -> Result<Self> {
        let log = Log::new(plane.dir(), "kube-controller-manager");
        let mut command = plane.netns.command(plane.programs.path("kube-controller-manager"));
        command
            .arg(format!("--kubeconfig={}", plane.manager_kubeconfig().display()))
            .arg(format!("--controllers={}", CONTROLLERS.join(",")))
            .args([
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                // It serves nobody.
                "--secure-port=0",
                // The defaults, 20 and 30, are there to spare an API server; thousands of Services took minutes.
                "--kube-api-qps=1000",
                "--kube-api-burst=2000",
            ]);
        spend_memory(&mut command);
        let process = Process::start(&mut command, &log, None)?;
        let mut manager = Self { process, log };
        manager
            .wait_usable(&plane.api()?)
            .with_context(|| format!("kube-controller-manager is of no use{}", manager.log.tail()))?;
        Ok(manager)
    }

    fn wait_usable(&mut self, api: &Api) -> Result<()> {
        let (namespace, name) = PROBE;
        let service = serde_json::from_value::<Service>(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterIP": "None", "selector": {"app": name}},
        }))?;
        api.create(&service)?;
        let deadline = Instant::now() + READY_WITHIN;
        while slices(api, namespace, name)?.is_empty() {
            self.process.check()?;
            if Instant::now() > deadline {
                bail!("no EndpointSlice of Service {namespace}/{name} within {READY_WITHIN:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        api.delete::<Service>(namespace, name)
    }
}

/// The slices of a Service as they are now.
fn slices(api: &Api, namespace: &str, service: &str) -> Result<Vec<EndpointSlice>> {
    let (namespace, label) = (namespace.to_owned(), format!("kubernetes.io/service-name={service}"));
    api.call(async move |client| {
        kube::Api::<EndpointSlice>::namespaced(client, &namespace).list(&ListParams::default().labels(&label)).await
    })
    .map(|list| list.items)
    .with_context(|| format!("cannot list the slices of {service}"))
}
