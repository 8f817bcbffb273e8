//! List and watch of one kind, for ever: what the server has becomes events, and nothing that it does wrong becomes one.
//!
//! kube-rs has a watcher, which is not for a server that misbehaves: it applies what a watch repeats of the past, lists
//! nothing while one object of many cannot be read, waits without bound for a list, and asks again without a pause when
//! a watch ends at once. Requests, types and credentials are kube-rs'.

use std::cmp::Ordering;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{AsyncBufReadExt as _, AsyncReadExt as _, StreamExt as _};
use kube::Client;
use kube::api::{ListParams, WatchParams};
use kube::core::Request;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::backoff::{ABSENT, Backoff};
use super::client::Server;
use super::failure::{Chain, Failure};
use super::text::{self, Page};
use super::{Decoded, text::Event as Line};
use crate::dataplane::sys::random_u64;
use crate::index::{Event, Kind, Object};
use crate::metrics::ApiMetrics;
use crate::source::{Closed, send};
use crate::sync::Input;

/// Objects of one page, as many as Kubernetes' own clients ask for.
const PAGE: u32 = 500;
/// A watch ends after this long, or up to a fifth less: connections of many nodes shall not end together.
const WATCH: Duration = Duration::from_secs(295);
/// The end of a watch that is due may be this late.
const LATE: Duration = Duration::from_secs(10);
/// A watch that ended earlier than this has failed, and one that lasted this long has worked.
const BRIEF: Duration = Duration::from_secs(2);
/// The same failure is said again after this long.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// How long the server may take, and how long it is left in peace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// To begin an answer. A busy server holds a request back for 15 s.
    pub(super) answer: Duration,
    /// Between two pieces of a page.
    pub(super) piece: Duration,
    /// For a whole page: as long as API servers give themselves.
    pub(super) page: Duration,
    /// Between two lines of a watch. API servers send a bookmark every minute, but none of a kind of which they have not
    /// seen an event since they started: until its first line, a watch may be silent for its whole time.
    pub(super) line: Duration,
    /// Pauses between attempts are this many times those of [`Backoff`].
    pub(super) pauses: f64,
}

impl Patience {
    /// With an API server.
    pub(super) const USUAL: Self = Self {
        answer: Duration::from_secs(20),
        piece: Duration::from_secs(10),
        page: Duration::from_secs(60),
        line: Duration::from_secs(75),
        pauses: 1.0,
    };
}

/// The objects of one kind that are wanted, and what becomes of them.
pub(super) struct Reflection<K, D> {
    /// Who is asked.
    pub(super) server: Arc<Server>,
    /// For what.
    pub(super) kind: Kind,
    /// Only those with fields like these.
    pub(super) fields: Option<String>,
    /// Only those with labels like these.
    pub(super) labels: Option<String>,
    /// There are API servers without it, and nothing is amiss then.
    pub(super) optional: bool,
    /// What the model makes of one.
    pub(super) decode: D,
    /// How long the server may take.
    pub(super) patience: Patience,
    /// What is counted.
    pub(super) metrics: ApiMetrics,
    /// Kubernetes' own type.
    pub(super) of: PhantomData<fn() -> K>,
}

impl<K, D> Reflection<K, D>
where
    K: kube::Resource<DynamicType = ()> + serde::de::DeserializeOwned,
    D: Fn(&K) -> Result<Decoded<Object>, String>,
{
    /// Tells until nobody listens any more.
    pub(super) async fn follow(self, to: mpsc::Sender<Input>) {
        let (mut backoff, mut complaints) = (Backoff::default(), Complaints::default());
        let mut version = None;
        loop {
            let (client, reading) = self.server.client();
            let began = Instant::now();
            let failure = match &mut version {
                None => match self.list(&client, &to).await {
                    Ok(listed) => {
                        version = Some(listed);
                        continue;
                    }
                    Err(failure) => failure,
                },
                Some(version) => {
                    let known = version.clone();
                    let watched = self.watch(&client, version, &to, &mut complaints).await;
                    // A watch that has brought something has worked, however short it was; but where each one ends in
                    // a list, that is too dear to be quick.
                    let brought = *version != known && !watched.as_ref().is_err_and(Failure::wants_list);
                    if brought || began.elapsed() >= BRIEF {
                        backoff.reset();
                    }
                    match watched {
                        Ok(()) => continue,
                        Err(failure) => failure,
                    }
                }
            };
            if matches!(failure, Failure::Closed) {
                return;
            }
            self.metrics.failed(self.kind, &failure.reason());
            if failure.wants_list() {
                version = None;
            }
            let absent = self.optional && failure.is_absent();
            let longest = if absent { ABSENT } else { failure.longest_pause() };
            let chance = random_u64().unwrap_or(u64::MAX);
            let pause = self.server.wait() + backoff.next(longest, chance).mul_f64(self.patience.pauses);
            complaints.hear(&failure, pause, absent);
            if failure.wants_credentials() {
                self.server.renew(reading).await;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Tells of everything there is, and says of which version that is.
    async fn list(&self, client: &Client, to: &mpsc::Sender<Input>) -> Result<Version, Failure> {
        // Not from the server's cache, which may lag behind what has been told.
        let mut params = ListParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        let mut listed = None;
        loop {
            let request = Request::new(K::url_path(&(), None)).list(&params).map_err(kube::Error::BuildRequest)?;
            let Page { version, next, items } = text::page::<K>(&self.page(client, request).await?)?;
            if listed.is_none() {
                tell(to, Event::Init(self.kind)).await?;
            }
            *listed.get_or_insert(0) += items.len();
            for object in items {
                let event = match self.decoded(&object) {
                    Ok(object) => object.map(Event::InitApply),
                    Err(Unreadable) => Some(Event::InitKeep(self.kind, object.name)),
                };
                if let Some(event) = event {
                    tell(to, event).await?;
                }
            }
            if next.is_none() {
                info!(objects = listed, "listed");
                self.metrics.listed(self.kind);
                tell(to, Event::InitDone(self.kind)).await?;
                return Ok(Version(version));
            }
            params.continue_token = next;
        }
    }

    /// The text of a page.
    async fn page(&self, client: &Client, request: hyper::Request<Vec<u8>>) -> Result<Vec<u8>, Failure> {
        let Patience { answer, piece, page, .. } = self.patience;
        let text = async {
            let mut body = pin!(within(answer, client.request_stream(request)).await??);
            let (mut text, mut part) = (Vec::new(), vec![0; 64 * 1024]);
            loop {
                match within(piece, body.read(&mut part)).await?.map_err(Failure::Cut)? {
                    0 => return Ok(text),
                    n => text.extend_from_slice(&part[..n]),
                }
            }
        };
        timeout(page, text).await.unwrap_or(Err(Failure::Slow(page)))
    }

    /// Tells of what changed since the version, and moves it along. Ends well when the server ends it in its time.
    async fn watch(
        &self,
        client: &Client,
        version: &mut Version,
        to: &mpsc::Sender<Input>,
        complaints: &mut Complaints,
    ) -> Result<(), Failure> {
        let length = WATCH - Duration::from_secs(random_u64().unwrap_or(0) % (WATCH.as_secs() / 5));
        let params = WatchParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            timeout: u32::try_from(length.as_secs()).ok(),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request =
            Request::new(K::url_path(&(), None)).watch(&params, &version.0).map_err(kube::Error::BuildRequest)?;
        let began = Instant::now();
        let mut lines = pin!(within(self.patience.answer, client.request_stream(request)).await??.lines());
        complaints.over();
        let mut patience = length + LATE;
        loop {
            let Some(line) = within(patience, lines.next()).await? else {
                return if began.elapsed() < BRIEF { Err(Failure::Brief) } else { Ok(()) };
            };
            let line = line.map_err(Failure::Cut)?;
            patience = self.patience.line;
            match text::event::<K>(&line)? {
                Line::Apply(object) => {
                    version.advance(&object.version)?;
                    let event = match self.decoded(&object) {
                        Ok(Some(object)) => Event::Apply(object),
                        Ok(None) => Event::Delete(self.kind, object.name),
                        Err(Unreadable) => continue,
                    };
                    tell(to, event).await?;
                }
                Line::Delete(object) => {
                    version.advance(&object.version)?;
                    tell(to, Event::Delete(self.kind, object.name)).await?;
                }
                Line::Bookmark(at) => version.advance(&at)?,
                Line::Error(status) => return Err(Failure::Event(status)),
            }
        }
    }

    /// The object as the model has it. One that cannot be read has been reported, and leaves what was known of it.
    fn decoded(&self, object: &text::Object<K>) -> Result<Option<Object>, Unreadable> {
        let name = &object.name;
        let read = object.object.as_ref().map_err(Clone::clone);
        let Decoded { object, warnings } = read.and_then(|object| (self.decode)(object)).map_err(|error| {
            warn!(object = %name, %error, "an object cannot be used; what was known of it stays");
            Unreadable
        })?;
        for warning in warnings {
            warn!(object = %name, %warning, "part of an object cannot be used");
        }
        Ok(object)
    }
}

struct Unreadable;

async fn within<T>(patience: Duration, future: impl Future<Output = T>) -> Result<T, Failure> {
    timeout(patience, future).await.map_err(|_| Failure::Silent(patience))
}

async fn tell(to: &mpsc::Sender<Input>, event: Event) -> Result<(), Failure> {
    send(to, event).await.map_err(|Closed| Failure::Closed)
}

/// A version of the cluster's objects. Those of one kind can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version(String);

impl Version {
    /// The watch has come to `next`, which is this one again or a later one. Of an earlier one nothing is to be believed:
    /// it may be a repetition, or all of the cluster may have gone back.
    fn advance(&mut self, next: &str) -> Result<(), Failure> {
        if compare(next, &self.0) == Some(Ordering::Less) {
            return Err(Failure::Backwards { from: self.0.clone(), to: next.to_owned() });
        }
        next.clone_into(&mut self.0);
        Ok(())
    }
}

/// As numbers of any length.
fn compare(a: &str, b: &str) -> Option<Ordering> {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let trimmed = |text: &str| text.trim_start_matches('0').to_owned();
    (number(a) && number(b)).then(|| {
        let (a, b) = (trimmed(a), trimmed(b));
        a.len().cmp(&b.len()).then_with(|| a.cmp(&b))
    })
}

/// Failures are said once, and again from time to time: attempts are too many for a line each.
#[derive(Default)]
struct Complaints {
    said: Option<(String, Instant)>,
}

impl Complaints {
    fn hear(&mut self, failure: &Failure, pause: Duration, absent: bool) {
        let (reason, pause_ms) = (failure.reason(), pause.as_millis() as u64);
        let known =
            self.said.as_ref().is_some_and(|(said, at)| *said == reason && (absent || at.elapsed() < SAY_AGAIN));
        let error = Chain(failure);
        if known {
            debug!(%error, pause_ms, "the API server cannot be watched");
            return;
        }
        if absent {
            info!(%error, "the API server does not have this kind, or not for this agent; it is not needed");
        } else {
            warn!(%error, pause_ms, "the API server cannot be watched; trying again, all stays as it is");
        }
        self.said = Some((reason, Instant::now()));
    }

    fn over(&mut self) {
        if self.said.take().is_some() {
            info!("the API server is watched again");
        }
    }
}

#[cfg(test)]
mod tests;
