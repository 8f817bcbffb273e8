//! The connection to the API server: kube-rs' client over sockets that notice when the other side is gone.
//!
//! A watch only listens. When a firewall or a crashed machine in between forgets its connection, nobody says so, and
//! kube-rs would wait for the end of the watch, five minutes. The kernel's keepalive asks, and costs the server nothing.

use std::time::Duration;

use hyper_util::client::legacy::{Client as HttpClient, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

/// After this much silence the kernel asks whether the other side is still there …
const KEEPALIVE: Duration = Duration::from_secs(30);
/// … again at this interval …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// … and gives the connection up when so many questions stayed without an answer: together the 45 seconds that
/// Kubernetes' own clients take.
const KEEPALIVE_RETRIES: u32 = 3;
/// The same bound for what was sent and never acknowledged; the kernel's own is a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(45);

/// A client of the API server that `config` names.
pub(super) fn connect(config: Config) -> Result<Client, kube::Error> {
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
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
