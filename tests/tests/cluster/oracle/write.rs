//! A round's objects on their way to the API server.

use std::net::IpAddr;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::{
    generate::{Generated, LABEL},
    world::{Twins, place},
};
use crate::{fixture::Vips, objects};

/// So many Services are written at a time.
const AT_A_TIME: usize = 4;
/// The Service that is written last.
const SENTINEL: &str = "in-step";

/// A client of both kinds of objects.
#[derive(Clone)]
struct Writer {
    services: kube::Api<Service>,
    slices: kube::Api<EndpointSlice>,
}

impl Writer {
    fn new(client: kube::Client) -> Self {
        let services = kube::Api::namespaced(client.clone(), "default");
        Self { services, slices: kube::Api::namespaced(client, "default") }
    }

    async fn create(self, made: Generated) -> anyhow::Result<Service> {
        let service: Service = serde_json::from_value(made.service.clone())?;
        let created = self.services.create(&PostParams::default(), &service).await;
        let mut created = created.with_context(|| made.service.to_string())?;
        if let Some(balancer) = &made.balancer {
            created = self.balance(&made.name, balancer).await?;
        }
        for slice in made.slices {
            self.create_slice(slice).await?;
        }
        Ok(created)
    }

    async fn change(self, before: Generated, after: Generated) -> anyhow::Result<Service> {
        let Some(edit) = &after.edit else { return Ok(self.services.get(&after.name).await?) };
        let patched = self.services.patch(&after.name, &PatchParams::default(), &Patch::Merge(edit)).await;
        let mut service = patched.with_context(|| edit.to_string())?;
        if let Some(balancer) = &after.balancer {
            service = self.balance(&after.name, balancer).await?;
        }
        let name = |slice: &Value| slice["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let kept: Vec<String> = after.slices.iter().map(name).collect();
        let had: Vec<String> = before.slices.iter().map(name).collect();
        for slice in after.slices {
            let name = name(&slice);
            if had.contains(&name) {
                let object: EndpointSlice = serde_json::from_value(slice.clone())?;
                let replaced = self.slices.replace(&name, &PostParams::default(), &object).await;
                replaced.with_context(|| slice.to_string())?;
            } else {
                self.create_slice(slice).await?;
            }
        }
        for gone in had.iter().filter(|name| !kept.contains(name)) {
            self.slices.delete(gone, &DeleteParams::default()).await?;
        }
        Ok(service)
    }

    async fn balance(&self, name: &str, balancer: &Value) -> anyhow::Result<Service> {
        let status = json!({"status": {"loadBalancer": balancer}});
        let patched = self.services.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await;
        patched.with_context(|| status.to_string())
    }

    async fn create_slice(&self, slice: Value) -> anyhow::Result<EndpointSlice> {
        let object: EndpointSlice = serde_json::from_value(slice.clone())?;
        self.slices.create(&PostParams::default(), &object).await.with_context(|| slice.to_string())
    }
}

/// Creates the objects and returns the Services as the API server has them.
pub(super) fn create(twins: &Twins, generated: &[Generated]) -> Vec<Service> {
    let generated = generated.to_vec();
    let written = twins.api.call(async move |client| {
        let writer = Writer::new(client);
        let writes = generated.into_iter().map(|made| writer.clone().create(made));
        stream::iter(writes).buffered(AT_A_TIME).try_collect::<Vec<_>>().await
    });
    written.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Makes the one of the other.
pub(super) fn change(twins: &Twins, before: &[Generated], after: &[Generated]) -> Vec<Service> {
    let pairs: Vec<_> = before.iter().cloned().zip(after.iter().cloned()).collect();
    let written = twins.api.call(async move |client| {
        let writer = Writer::new(client);
        let writes = pairs.into_iter().map(|(before, after)| writer.clone().change(before, after));
        stream::iter(writes).buffered(AT_A_TIME).try_collect::<Vec<_>>().await
    });
    written.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Creates the round's last object, with `pod-b` behind it.
pub(super) fn sentinel(twins: &Twins) -> Vips {
    let mut service = objects::service(SENTINEL);
    service.metadata.labels = Some([(LABEL.to_owned(), "yes".to_owned())].into());
    let vips = Vips::of(&twins.api.create(&service).expect("the last Service"));
    for v6 in [false, true] {
        twins.api.create(&sentinel_slice(v6, "pod-b")).expect("the last slice");
    }
    vips
}

/// Puts `pod-a` behind it.
pub(super) fn move_sentinel(twins: &Twins) {
    for v6 in [false, true] {
        twins.api.replace(&sentinel_slice(v6, "pod-a")).expect("the last change");
    }
}

fn sentinel_slice(v6: bool, at: &str) -> EndpointSlice {
    let mut slice = objects::slice(SENTINEL, v6, &[place(at, v6)]);
    slice.metadata.labels.get_or_insert_default().insert(LABEL.to_owned(), "yes".to_owned());
    slice
}

/// Removes all of the round's objects.
pub(super) fn remove(twins: &Twins) {
    let removed: kube::Result<()> = twins.api.call(async |client| {
        let (params, ours) = (DeleteParams::default(), ListParams::default().labels(LABEL));
        let writer = Writer::new(client);
        writer.services.delete_collection(&params, &ours).await?;
        writer.slices.delete_collection(&params, &ours).await?;
        Ok(())
    });
    removed.expect("the round's objects can be removed");
}

/// The Service's addresses as the API server gave them.
pub(super) fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let ips = service.spec.as_ref().and_then(|spec| spec.cluster_ips.as_ref());
    ips.into_iter().flatten().filter_map(|ip| ip.parse().ok()).collect()
}
