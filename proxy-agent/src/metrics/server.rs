//! `/metrics`, and what else is asked on kube-proxy's port 10249: rules 130–132.

use std::sync::Arc;

use hyper::StatusCode;

use super::Metrics;
use super::gather::Sources;
use crate::http::{self, Place};

const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves for ever.
pub async fn run(place: Place, metrics: Arc<Metrics>, sources: Sources) {
    let listener = place.listener().await;
    let sources = Arc::new(sources);
    http::serve(listener, move |request| {
        let (metrics, sources) = (Arc::clone(&metrics), Arc::clone(&sources));
        async move {
            match request.uri().path() {
                "/metrics" => {
                    metrics.gathered.set(sources.ask().await);
                    http::answer(StatusCode::OK, OPEN_METRICS, metrics.encode())
                }
                "/healthz" => http::answer(StatusCode::OK, TEXT, "ok"),
                "/proxyMode" => http::answer(StatusCode::OK, TEXT, "ebpf"),
                _ => http::not_found(),
            }
        }
    })
    .await;
}
