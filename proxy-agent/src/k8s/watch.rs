//! The Kubernetes API: list and watch of Services, EndpointSlices and the own Node.
//!
//! Bookmarks, a new list after 410 Gone and backoff are kube-rs' [`mod@watcher`]. Objects are decoded as they arrive, so
//! that nothing holds on to fields that the proxy does not read.

use std::fmt::Debug;
use std::path::Path;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::mpsc;
use tracing::{Instrument as _, info, info_span, warn};

use super::{Decoded, endpoint_slice, labels, node, service};
use crate::events::Notice;
use crate::index::{Event, Kind, Object};
use crate::model::ObjectName;
use crate::source::{Closed, Source, SourceError, send};
use crate::sync::Input;

/// The Kubernetes API server.
pub struct KubeApi {
    client: Client,
    url: String,
    node: String,
}

impl KubeApi {
    /// The current context of a kubeconfig, seen from the node of this name. `server` takes the place of its URL.
    pub async fn from_kubeconfig(file: &Path, server: Option<&str>, node: &str) -> Result<Self, SourceError> {
        let what = || format!("kubeconfig {}", file.display());
        let kubeconfig = Kubeconfig::read_from(file).map_err(|error| unusable(what(), error))?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        Self::connect(config.map_err(|error| unusable(what(), error))?, what(), server, node)
    }

    /// The service account of the pod that this runs in. Its server's ClusterIP may be one that nobody serves yet:
    /// `server` takes its place.
    pub fn in_cluster(server: Option<&str>, node: &str) -> Result<Self, SourceError> {
        let what = || "the service account of this pod".to_owned();
        let config = kube::Config::incluster().map_err(|error| unusable(what(), error))?;
        Self::connect(config, what(), server, node)
    }

    /// Writes Events until nobody tells any more.
    pub fn publish(&self, notices: mpsc::Receiver<Notice>) -> impl Future<Output = ()> + Send + use<> {
        super::events::publish(self.client.clone(), self.node.clone(), notices)
    }

    fn connect(mut config: kube::Config, what: String, server: Option<&str>, node: &str) -> Result<Self, SourceError> {
        if let Some(server) = server {
            config.cluster_url = server.parse().map_err(|error| unusable(format!("--api-server {server}"), error))?;
        }
        let url = config.cluster_url.to_string();
        let client = super::client::connect(config).map_err(|error| unusable(what, error))?;
        Ok(Self { client, url, node: node.to_owned() })
    }
}

fn unusable(what: String, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SourceError {
    SourceError::Kube { what, source: source.into() }
}

impl Source for KubeApi {
    fn describe(&self) -> String {
        format!("the Kubernetes API at {}", self.url)
    }

    fn run(self: Box<Self>, to: mpsc::Sender<Input>) -> BoxFuture<'static, Result<(), SourceError>> {
        let Self { client, node, .. } = *self;
        let own = node.clone();
        let nodes = Watch {
            // Rule 4.
            config: watcher::Config::default().fields(&format!("metadata.name={node}")),
            api: Api::<core::Node>::all(client.clone()),
            kind: Kind::Node,
            decode: move |object: &core::Node| {
                node::decode(object, &own).map(|decoded| mapped(decoded, Object::Node)).map_err(|e| e.to_string())
            },
        };
        let services = Watch {
            api: Api::<core::Service>::all(client.clone()),
            // Rule 1: those that another proxy serves, and headless ones, never leave the server.
            config: watcher::Config::default()
                .labels(&format!("!{}", labels::SERVICE_PROXY_NAME))
                .fields("spec.clusterIP!=None"),
            kind: Kind::Service,
            decode: |object: &core::Service| {
                service::decode(object).map(|decoded| mapped(decoded, Object::Service)).map_err(|e| e.to_string())
            },
        };
        let slices = Watch {
            api: Api::<discovery::EndpointSlice>::all(client.clone()),
            // Rule 2.
            config: watcher::Config::default().labels(&format!("!{}", labels::HEADLESS)),
            kind: Kind::EndpointSlice,
            decode: move |object: &discovery::EndpointSlice| {
                let decoded = endpoint_slice::decode(object, &node);
                decoded.map(|decoded| mapped(decoded, Object::Slice)).map_err(|e| e.to_string())
            },
        };
        async move {
            let services = services.follow(to.clone()).instrument(info_span!("services"));
            let slices = slices.follow(to.clone()).instrument(info_span!("endpointslices"));
            let nodes = nodes.follow(to).instrument(info_span!("node"));
            // All end only when nobody listens any more.
            futures::future::join3(services, slices, nodes).await;
            Ok(())
        }
        .boxed()
    }
}

fn mapped<T>(decoded: Decoded<T>, object: impl FnOnce(T) -> Object) -> Decoded<Object> {
    Decoded { object: decoded.object.map(object), warnings: decoded.warnings }
}

/// The watch of one kind.
struct Watch<K, D> {
    api: Api<K>,
    config: watcher::Config,
    kind: Kind,
    decode: D,
}

impl<K, D> Watch<K, D>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + Debug + Send + 'static,
    D: Fn(&K) -> Result<Decoded<Object>, String>,
{
    async fn follow(self, to: mpsc::Sender<Input>) {
        let Self { api, config, kind, decode } = self;
        let mut events = watcher(api, config).default_backoff().boxed();
        let mut listed = 0_usize;
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(watcher::Event::Init) => {
                    listed = 0;
                    Some(Event::Init(kind))
                }
                Ok(watcher::Event::InitApply(object)) => {
                    listed += 1;
                    match decoded(&decode, &object) {
                        Ok(object) => object.map(Event::InitApply),
                        Err(Unreadable) => Some(Event::InitKeep(kind, name_of(&object))),
                    }
                }
                Ok(watcher::Event::InitDone) => {
                    info!(objects = listed, "listed");
                    Some(Event::InitDone(kind))
                }
                Ok(watcher::Event::Apply(object)) => match decoded(&decode, &object) {
                    Ok(Some(object)) => Some(Event::Apply(object)),
                    Ok(None) => Some(Event::Delete(kind, name_of(&object))),
                    Err(Unreadable) => None,
                },
                Ok(watcher::Event::Delete(object)) => Some(Event::Delete(kind, name_of(&object))),
                Err(error) => {
                    warn!(error = %Chain(&error), "the API server cannot be watched; trying again, all stays as it is");
                    None
                }
            };
            let Some(event) = event else { continue };
            if let Err(Closed) = send(&to, event).await {
                return;
            }
        }
    }
}

/// The object as the model has it. One that cannot be read has been reported, and leaves what was known of it.
fn decoded<K: kube::Resource>(
    decode: impl Fn(&K) -> Result<Decoded<Object>, String>,
    object: &K,
) -> Result<Option<Object>, Unreadable> {
    let name = name_of(object);
    let Decoded { object, warnings } = decode(object).map_err(|error| {
        warn!(object = %name, %error, "an object cannot be used; what was known of it stays");
        Unreadable
    })?;
    for warning in warnings {
        warn!(object = %name, %warning, "part of an object cannot be used");
    }
    Ok(object)
}

struct Unreadable;

fn name_of<K: kube::Resource>(object: &K) -> ObjectName {
    ObjectName::new(object.namespace().as_deref().unwrap_or_default(), &object.name_any())
}

/// An error with its causes, each once.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let message = error.to_string();
            if !text.contains(&message) {
                text = format!("{text}: {message}");
            }
            cause = error.source();
        }
        f.write_str(&text)
    }
}
