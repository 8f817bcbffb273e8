//! A blocking client of the API server for tests, at home in the server's network namespace.

use std::{fmt, path::Path, sync::mpsc, thread::JoinHandle};

use anyhow::{Context as _, Result};
use fairlead_lab::Namespace;
use k8s_openapi::NamespaceResourceScope;
use kube::{
    Client, Config, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{runtime::Runtime, sync::mpsc as jobs};

type Job = Box<dyn FnOnce(&Runtime, &Client) + Send>;

/// A client of the API server. Its connections are made by one thread that has entered the namespace.
pub struct Api {
    jobs: Option<jobs::UnboundedSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// An object of the API that lives in a namespace and whose type is known at compile time.
pub trait Object:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()>
    + Clone
    + fmt::Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl<K> Object for K where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + fmt::Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

impl Api {
    /// Reads the kubeconfig and starts the client's thread. The server is asked for nothing yet.
    pub fn connect(netns: &Namespace, kubeconfig: &Path) -> Result<Self> {
        let (sender, mut receiver) = jobs::unbounded_channel::<Job>();
        let (started, start) = mpsc::channel();
        let (netns, path) = (netns.clone(), kubeconfig.to_owned());
        let thread = std::thread::spawn(move || {
            let client = netns.enter().and_then(|()| client(&path));
            let (runtime, client) = match client {
                Ok(ready) => {
                    // `connect` waits for this word, so the receiver is there.
                    started.send(Ok(())).ok();
                    ready
                }
                Err(error) => {
                    started.send(Err(error)).ok();
                    return;
                }
            };
            while let Some(job) = receiver.blocking_recv() {
                job(&runtime, &client);
            }
        });
        start.recv().context("the client's thread ended at its start")??;
        Ok(Self { jobs: Some(sender), thread: Some(thread) })
    }

    /// Runs `f` with the client on the client's thread.
    pub fn call<T: Send + 'static>(&self, f: impl AsyncFnOnce(Client) -> T + Send + 'static) -> T {
        let (said, hear) = mpsc::channel();
        let job: Job = Box::new(move |runtime, client| {
            // The caller waits below.
            said.send(runtime.block_on(f(client.clone()))).ok();
        });
        let sender = self.jobs.as_ref().expect("the sender is taken in drop only");
        assert!(sender.send(job).is_ok(), "the client's thread has ended");
        hear.recv().expect("the client's thread has panicked")
    }

    /// Creates the object in its own namespace (`default` where it names none).
    pub fn create<K: Object>(&self, object: &K) -> Result<K> {
        let object = object.clone();
        let namespace = object.meta().namespace.clone().unwrap_or_else(|| "default".to_owned());
        let name = object.meta().name.clone().unwrap_or_default();
        self.call(async move |client| {
            kube::Api::namespaced(client, &namespace)
                .create(&PostParams::default(), &object)
                .await
                .with_context(|| format!("cannot create {} {namespace}/{name}", K::kind(&())))
        })
    }

    /// Replaces the object: one write, without a read before it where `object` came from the server.
    pub fn replace<K: Object>(&self, object: &K) -> Result<K> {
        let object = object.clone();
        let namespace = object.meta().namespace.clone().unwrap_or_else(|| "default".to_owned());
        let name = object.meta().name.clone().unwrap_or_default();
        self.call(async move |client| {
            kube::Api::namespaced(client, &namespace)
                .replace(&name, &PostParams::default(), &object)
                .await
                .with_context(|| format!("cannot replace {} {namespace}/{name}", K::kind(&())))
        })
    }

    /// Applies a JSON merge patch.
    pub fn patch<K: Object>(&self, namespace: &str, name: &str, patch: serde_json::Value) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.call(async move |client| {
            kube::Api::namespaced(client, &namespace)
                .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
                .with_context(|| format!("cannot patch {} {namespace}/{name} with {patch}", K::kind(&())))
        })
    }

    /// Deletes the object.
    pub fn delete<K: Object>(&self, namespace: &str, name: &str) -> Result<()> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.call(async move |client| {
            kube::Api::<K>::namespaced(client, &namespace)
                .delete(&name, &DeleteParams::default())
                .await
                .map(drop)
                .with_context(|| format!("cannot delete {} {namespace}/{name}", K::kind(&())))
        })
    }

    /// Reads the object.
    pub fn get<K: Object>(&self, namespace: &str, name: &str) -> Result<K> {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.call(async move |client| {
            kube::Api::namespaced(client, &namespace)
                .get(&name)
                .await
                .with_context(|| format!("cannot get {} {namespace}/{name}", K::kind(&())))
        })
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // Without a sender the thread's loop ends.
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of a job has been shown by `call` already.
            thread.join().ok();
        }
    }
}

fn client(kubeconfig: &Path) -> Result<(Runtime, Client)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the client's runtime")?;
    let file = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("cannot read kubeconfig {}", kubeconfig.display()))?;
    let client = runtime.block_on(async {
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .with_context(|| format!("cannot use kubeconfig {}", kubeconfig.display()))?;
        Client::try_from(config).context("cannot make a client of the API server")
    })?;
    Ok((runtime, client))
}
