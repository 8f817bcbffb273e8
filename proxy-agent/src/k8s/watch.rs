//! The Kubernetes API as a source: Services, EndpointSlices, ServiceCIDRs and the own Node.
//!
//! Objects are decoded as they arrive, so that nothing holds on to fields that the proxy does not read.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use tokio::sync::mpsc;
use tracing::{Instrument as _, info_span};

use super::client::{Access, Server, Settings};
use super::reflect::{Patience, Reflection};
use super::{Decoded, endpoint_slice, labels, node, service, service_cidr};
use crate::events::Notice;
use crate::index::{Kind, Object};
use crate::metrics::ApiMetrics;
use crate::source::{Source, SourceError};
use crate::sync::Input;

/// The Kubernetes API server.
pub struct KubeApi {
    server: Arc<Server>,
    node: String,
    metrics: ApiMetrics,
    patience: Patience,
}

impl KubeApi {
    /// The current context of a kubeconfig, seen from the node of this name. `server` takes the place of its URL.
    pub async fn from_kubeconfig(
        file: &Path,
        server: Option<&str>,
        node: &str,
        metrics: ApiMetrics,
    ) -> Result<Self, SourceError> {
        Self::connect(Access::Kubeconfig(file.to_owned()), server, node, metrics).await
    }

    /// The service account of the pod that this runs in. Its server's ClusterIP may be one that nobody serves yet:
    /// `server` takes its place.
    pub async fn in_cluster(server: Option<&str>, node: &str, metrics: ApiMetrics) -> Result<Self, SourceError> {
        Self::connect(Access::InCluster, server, node, metrics).await
    }

    async fn connect(
        access: Access,
        server: Option<&str>,
        node: &str,
        metrics: ApiMetrics,
    ) -> Result<Self, SourceError> {
        let server = Arc::new(Server::new(Settings { access, url: server.map(str::to_owned) }).await?);
        Ok(Self { server, node: node.to_owned(), metrics, patience: Patience::USUAL })
    }

    /// Writes Events until nobody tells any more.
    pub fn publish(&self, notices: mpsc::Receiver<Notice>) -> impl Future<Output = ()> + Send + use<> {
        super::events::publish(Arc::clone(&self.server), self.node.clone(), notices)
    }

    fn reflection<K, D>(&self, kind: Kind, decode: D) -> Reflection<K, D> {
        Reflection {
            server: Arc::clone(&self.server),
            kind,
            fields: None,
            labels: None,
            optional: false,
            decode,
            patience: self.patience,
            metrics: self.metrics.clone(),
            of: PhantomData,
        }
    }
}

impl Source for KubeApi {
    fn describe(&self) -> String {
        format!("the Kubernetes API at {}", self.server.url())
    }

    fn run(self: Box<Self>, to: mpsc::Sender<Input>) -> BoxFuture<'static, Result<(), SourceError>> {
        let (own, own_too) = (self.node.clone(), self.node.clone());
        let nodes = Reflection {
            // Rule 4.
            fields: Some(format!("metadata.name={own}")),
            ..self.reflection(Kind::Node, move |object: &core::Node| said(node::decode(object, &own), Object::Node))
        };
        let services = Reflection {
            // Rule 1: those that another proxy serves, and headless ones, never leave the server.
            labels: Some(format!("!{}", labels::SERVICE_PROXY_NAME)),
            fields: Some("spec.clusterIP!=None".to_owned()),
            ..self.reflection(Kind::Service, |object: &core::Service| said(service::decode(object), Object::Service))
        };
        let slices = Reflection {
            // Rule 2.
            labels: Some(format!("!{}", labels::HEADLESS)),
            ..self.reflection(Kind::EndpointSlice, move |object: &discovery::EndpointSlice| {
                said(endpoint_slice::decode(object, &own_too), Object::Slice)
            })
        };
        let cidrs = Reflection {
            // Since Kubernetes 1.33.
            optional: true,
            ..self.reflection(Kind::ServiceCidr, |object: &networking::ServiceCIDR| {
                said(service_cidr::decode(object), Object::ServiceCidr)
            })
        };
        async move {
            let services = services.follow(to.clone()).instrument(info_span!("services"));
            let slices = slices.follow(to.clone()).instrument(info_span!("endpointslices"));
            let cidrs = cidrs.follow(to.clone()).instrument(info_span!("servicecidrs"));
            let nodes = nodes.follow(to).instrument(info_span!("node"));
            // All end only when nobody listens any more.
            futures::future::join4(services, slices, cidrs, nodes).await;
            Ok(())
        }
        .boxed()
    }
}

fn said<T, E: std::fmt::Display>(
    decoded: Result<Decoded<T>, E>,
    object: impl FnOnce(T) -> Object,
) -> Result<Decoded<Object>, String> {
    let Decoded { object: inner, warnings } = decoded.map_err(|error| error.to_string())?;
    Ok(Decoded { object: inner.map(object), warnings })
}
