//! The connection to the API server: kube-rs' client over sockets that notice when the other side is gone, with
//! credentials that can be read anew, and an ear for what the server asks of its clients.
//!
//! A watch only listens. When a firewall or a crashed machine in between forgets its connection, nobody says so, and
//! kube-rs would wait for the end of the watch, five minutes. The kernel's keepalive asks, and costs the server nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::Response;
use hyper::header::RETRY_AFTER;
use hyper_util::client::legacy::{Client as HttpClient, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};
use tracing::{debug, info};

use crate::source::SourceError;

/// After this much silence the kernel asks whether the other side is still there …
const KEEPALIVE: Duration = Duration::from_secs(30);
/// … again at this interval …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// … and gives the connection up when so many questions stayed without an answer: together the 45 seconds that
/// Kubernetes' own clients take.
const KEEPALIVE_RETRIES: u32 = 3;
/// The same bound for what was sent and never acknowledged; the kernel's own is a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(45);
/// So long a connection may take to be made. The kernel's own attempts within a longer one come ever more seldom, and a
/// server that is back would wait for them.
const CONNECT: Duration = Duration::from_secs(5);
/// A server that asks for more patience than this does not get it.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Where the API server's address and the credentials come from.
#[derive(Clone, Debug)]
pub(super) enum Access {
    /// The current context of a kubeconfig.
    Kubeconfig(PathBuf),
    /// The service account of the pod that this runs in.
    InCluster,
}

/// The API server that `access` names, or `url` in place of its address.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) access: Access,
    pub(super) url: Option<String>,
}

impl Settings {
    fn what(&self) -> String {
        match &self.access {
            Access::Kubeconfig(file) => format!("kubeconfig {}", file.display()),
            Access::InCluster => "the service account of this pod".to_owned(),
        }
    }

    async fn config(&self) -> Result<Config, SourceError> {
        let unusable = |error: BoxError| SourceError::Kube { what: self.what(), source: error };
        let mut config = match &self.access {
            Access::Kubeconfig(file) => {
                let kubeconfig = Kubeconfig::read_from(file).map_err(|error| unusable(error.into()))?;
                let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
                config.map_err(|error| unusable(error.into()))?
            }
            Access::InCluster => Config::incluster().map_err(|error| unusable(error.into()))?,
        };
        if let Some(url) = &self.url {
            let what = format!("--api-server {url}");
            config.cluster_url = url
                .parse()
                .map_err(|error: hyper::http::uri::InvalidUri| SourceError::Kube { what, source: error.into() })?;
        }
        config.connect_timeout = Some(CONNECT);
        Ok(config)
    }

    async fn connect(&self, asked: &Asked) -> Result<(Client, String), SourceError> {
        let config = self.config().await?;
        let url = config.cluster_url.to_string();
        let client = connect(config, asked.clone());
        let client = client.map_err(|error| SourceError::Kube { what: self.what(), source: error.into() })?;
        Ok((client, url))
    }
}

/// The API server.
#[derive(Debug)]
pub(super) struct Server {
    settings: Settings,
    url: String,
    asked: Asked,
    current: Mutex<Current>,
}

struct Current {
    client: Client,
    /// How often credentials were read.
    reading: u64,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").field("reading", &self.reading).finish_non_exhaustive()
    }
}

impl Server {
    /// Reads address and credentials. The server is asked for nothing yet.
    pub(super) async fn new(settings: Settings) -> Result<Self, SourceError> {
        let asked = Asked::default();
        let (client, url) = settings.connect(&asked).await?;
        Ok(Self { settings, url, asked, current: Mutex::new(Current { client, reading: 0 }) })
    }

    /// Its address.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// A client, and the number of the reading that its credentials are of.
    pub(super) fn client(&self) -> (Client, u64) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        (current.client.clone(), current.reading)
    }

    /// Reads the credentials again, unless somebody has since the reading of this number. A token, a client's
    /// certificate and the server's CA are files that are replaced while the agent runs.
    pub(super) async fn renew(self: &Arc<Self>, reading: u64) {
        if self.client().1 != reading {
            return;
        }
        let server = Arc::clone(self);
        let runtime = tokio::runtime::Handle::current();
        // Files are read, and a plugin may be run.
        let connected = tokio::task::spawn_blocking(move || runtime.block_on(server.settings.connect(&server.asked)));
        match connected.await {
            Ok(Ok((client, _))) => {
                let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
                if current.reading == reading {
                    *current = Current { client, reading: reading + 1 };
                    info!("credentials read again");
                }
            }
            Ok(Err(error)) => debug!(%error, "credentials cannot be read again"),
            Err(error) => debug!(%error, "credentials were not read again"),
        }
    }

    /// How long the server wants its clients to wait from now.
    pub(super) fn wait(&self) -> Duration {
        let until = *self.asked.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }
}

/// Until when the server has asked its clients to wait (`Retry-After`).
#[derive(Clone, Debug, Default)]
struct Asked(Arc<Mutex<Option<Instant>>>);

impl Asked {
    fn hear<B>(&self, answer: &Response<B>) {
        let status = answer.status();
        if !(status.is_server_error() || status == hyper::StatusCode::TOO_MANY_REQUESTS) {
            return;
        }
        let seconds = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(wait) = seconds.map(Duration::from_secs) {
            let until = Instant::now() + wait.min(LONGEST_WAIT);
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            *known = (*known).max(Some(until));
        }
    }
}

fn connect(config: Config, asked: Asked) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        // The way through a proxy is kube-rs' own; the far side of it cannot be asked anyway.
        return Client::try_from(config);
    }
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_keepalive(Some(KEEPALIVE));
    connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
    connector.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let https = config.rustls_https_connector_with_connector(connector)?;
    let http = HttpClient::builder(TokioExecutor::new()).build::<_, Body>(https);
    // In kube-rs' own order: the server's address, who asks, the connection.
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_response(move |answer: Response<hyper::body::Incoming>| {
            asked.hear(&answer);
            answer
        })
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
