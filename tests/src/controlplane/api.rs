//! A blocking client of the API server for tests, at home in the server's network namespace.

use std::{fmt, path::Path, sync::mpsc, thread::JoinHandle, time::Duration};

use anyhow::{Context as _, Result, bail};
use fairlead_lab::Namespace;
use k8s_openapi::NamespaceResourceScope;
use kube::{
    Client, Config, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{runtime::Runtime, sync::mpsc as jobs};

/// How long a request may stay without an answer.
const PATIENCE: Duration = Duration::from_secs(5);

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
        let (object, name) = (object.clone(), name_of(object));
        self.request("create", &name.clone(), async move |api: kube::Api<K>| {
            api.create(&PostParams::default(), &object).await
        })
    }

    /// Replaces the object: one write; without a version in `object` it is unconditional.
    pub fn replace<K: Object>(&self, object: &K) -> Result<K> {
        let (object, name) = (object.clone(), name_of(object));
        self.request("replace", &name.clone(), async move |api: kube::Api<K>| {
            api.replace(&name.1, &PostParams::default(), &object).await
        })
    }

    /// Applies a JSON merge patch.
    pub fn patch<K: Object>(&self, namespace: &str, name: &str, patch: serde_json::Value) -> Result<K> {
        let name = (namespace.to_owned(), name.to_owned());
        self.request("patch", &name.clone(), async move |api: kube::Api<K>| {
            api.patch(&name.1, &PatchParams::default(), &Patch::Merge(&patch)).await
        })
    }

    /// Applies a JSON merge patch to the object's status, which no other request can change.
    pub fn patch_status<K: Object>(&self, namespace: &str, name: &str, patch: serde_json::Value) -> Result<K> {
        let name = (namespace.to_owned(), name.to_owned());
        self.request("patch the status of", &name.clone(), async move |api: kube::Api<K>| {
            api.patch_status(&name.1, &PatchParams::default(), &Patch::Merge(&patch)).await
        })
    }

    /// Deletes the object.
    pub fn delete<K: Object>(&self, namespace: &str, name: &str) -> Result<()> {
        let name = (namespace.to_owned(), name.to_owned());
        self.request("delete", &name.clone(), async move |api: kube::Api<K>| {
            api.delete(&name.1, &DeleteParams::default()).await.map(drop)
        })
    }

    /// Reads the object.
    pub fn get<K: Object>(&self, namespace: &str, name: &str) -> Result<K> {
        let name = (namespace.to_owned(), name.to_owned());
        self.request("get", &name.clone(), async move |api: kube::Api<K>| api.get(&name.1).await)
    }

    /// Sends a request of one object and waits for the answer, but not for ever: a server that is just starting or
    /// ending may take a request and never answer it.
    fn request<K: Object, T: Send + 'static>(
        &self,
        verb: &str,
        (namespace, name): &(String, String),
        request: impl AsyncFnOnce(kube::Api<K>) -> kube::Result<T> + Send + 'static,
    ) -> Result<T> {
        let wanted = format!("{verb} {} {namespace}/{name}", K::kind(&()));
        let namespace = namespace.clone();
        self.call(async move |client| {
            match tokio::time::timeout(PATIENCE, request(kube::Api::namespaced(client, &namespace))).await {
                Ok(answer) => answer.with_context(|| format!("cannot {wanted}")),
                Err(_) => bail!("cannot {wanted}: no answer within {PATIENCE:?}"),
            }
        })
    }
}

fn name_of<K: Object>(object: &K) -> (String, String) {
    let meta = object.meta();
    (meta.namespace.clone().unwrap_or_else(|| "default".to_owned()), meta.name.clone().unwrap_or_default())
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
