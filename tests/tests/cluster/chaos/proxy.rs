//! A proxy between agent and API server that sees what they say, and spoils it as a case wants: plain HTTP towards the
//! agent, TLS and the rights of `system:kube-proxy` towards the server. Objects are the real server's.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use fairlead_lab::Namespace;
use futures::{AsyncBufReadExt as _, StreamExt as _};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Runtime,
    sync::{mpsc, watch},
};

/// Where it listens: the agent's namespace has its loopback to itself.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 16080);
/// Bytes of a slow answer that go together, and the pause behind them.
const DRIP: (usize, Duration) = (700, Duration::from_millis(4));

/// How an API server begins to tell that nothing has changed.
const BOOKMARK: &str = r#"{"type":"BOOKMARK""#;

/// kube-rs' own request type, which has no name here, with another target.
macro_rules! request {
    ($method:expr, $target:expr, $body:expr) => {{
        let list = kube::core::Request::new("/").list(&kube::api::ListParams::default());
        let mut request = list.expect("a request without parameters").map(|_| $body);
        *request.method_mut() = $method.parse().expect("the agent's method");
        *request.uri_mut() = $target.parse().expect("the agent's target");
        request
    }};
}

/// What is done to answers, until it is changed.
#[derive(Clone, Debug, Default)]
pub(super) struct Rules {
    /// The next lists of EndpointSlices are answered with these statuses and headers, the last one first.
    pub(super) refuse_lists: Vec<(u16, String)>,
    /// The same of watches.
    pub(super) refuse_watches: Vec<(u16, String)>,
    /// So many lists break off in the middle.
    pub(super) half_lists: u32,
    /// So many lists stop coming in the middle.
    pub(super) stalled_lists: u32,
    /// Pages of lists are this large, whatever was asked for.
    pub(super) page: Option<u32>,
    /// So many second pages are gone.
    pub(super) gone_pages: u32,
    /// Nothing of a watch passes, and the connection stays.
    pub(super) mute: bool,
    /// Answers come slowly.
    pub(super) slow: bool,
    /// Every event is told twice.
    pub(super) twice: bool,
    /// Bytes of an annotation that every object of a watch gets.
    pub(super) padding: usize,
    /// The token that is taken; any, where there is none.
    pub(super) token: Option<String>,
}

/// What is done to a watch that runs, once.
#[derive(Clone, Debug)]
pub(super) enum Order {
    /// Says this line, of the case's own.
    Say(String),
    /// Says half of the next event, and breaks off.
    HalfOfNext,
    /// Says the next event with `"nonsense"` in place of this field of its object.
    SpoilNext(&'static str),
    /// Breaks off.
    Reset,
}

/// One kind of object, as URLs call it.
type Resource = String;

struct Shared {
    rules: watch::Sender<Rules>,
    watches: Mutex<Vec<(Resource, mpsc::UnboundedSender<Order>)>>,
    /// Every event of every watch, as the server said it.
    said: Mutex<HashMap<Resource, Vec<String>>>,
    requests: Mutex<Vec<(Resource, bool)>>,
    stop: AtomicBool,
}

/// A running proxy.
pub(super) struct Proxy {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _runtime: Arc<Runtime>,
}

impl Proxy {
    /// Starts it in the namespace; the kubeconfig says where the server is and what it is asked as.
    pub(super) fn start(netns: &Namespace, kubeconfig: &Path) -> Self {
        let inside = netns.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || inside.enter().expect("the namespace can be entered"))
            .build()
            .expect("a runtime");
        let file = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
        let client = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            Client::try_from(config.expect("a kubeconfig that can be used")).expect("a client")
        });
        let shared = Arc::new(Shared {
            rules: watch::Sender::default(),
            watches: Mutex::default(),
            said: Mutex::default(),
            requests: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let listener = netns.run(|| TcpListener::bind(LISTEN)).expect("the namespace").expect("a free port");
        let (runtime, netns, to_thread) = (Arc::new(runtime), netns.clone(), Arc::clone(&shared));
        let handle = Arc::clone(&runtime);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if to_thread.stop.load(Ordering::Relaxed) {
                    return;
                }
                let stream = stream.expect("a connection");
                let connection = Connection { stream, client: client.clone(), shared: Arc::clone(&to_thread) };
                let (netns, runtime) = (netns.clone(), Arc::clone(&handle));
                std::thread::spawn(move || {
                    netns.enter().expect("the namespace can be entered");
                    // Whoever hangs up ends the connection, not the case.
                    connection.serve(&runtime).unwrap_or_default();
                });
            }
        });
        Self { shared, thread: Some(thread), _runtime: runtime }
    }

    /// Where the agent finds it.
    pub(super) fn url(&self) -> String {
        format!("http://{LISTEN}")
    }

    /// Changes the rules.
    pub(super) fn rules(&self, change: impl FnOnce(&mut Rules)) {
        self.shared.rules.send_modify(change);
    }

    /// Orders something of every watch of the resource, or of all with `""`; at least one must run.
    pub(super) fn order(&self, resource: &str, order: &Order) {
        let found = fairlead_lab::server::wait_until(Duration::from_secs(10), || self.try_order(resource, order));
        assert!(found, "no watch of {resource:?} runs");
    }

    /// The same where one runs.
    pub(super) fn try_order(&self, resource: &str, order: &Order) -> bool {
        let mut watches = lock(&self.shared.watches);
        watches.retain(|(_, watch)| !watch.is_closed());
        let wanted = watches.iter().filter(|(of, _)| resource.is_empty() || of == resource);
        // A watch that has just ended does not hear it.
        wanted.filter(|(_, watch)| watch.send(order.clone()).is_ok()).count() > 0
    }

    /// The token that is taken now.
    pub(super) fn token(&self) -> Option<String> {
        self.shared.rules.borrow().token.clone()
    }

    /// The events of a resource so far.
    pub(super) fn said(&self, resource: &str) -> Vec<String> {
        lock(&self.shared.said).get(resource).cloned().unwrap_or_default()
    }

    /// Number of lists and of watches of the resource so far.
    pub(super) fn asked(&self, resource: &str) -> (usize, usize) {
        let requests = lock(&self.shared.requests);
        let count = |watch| requests.iter().filter(|(of, is_watch)| of == resource && *is_watch == watch).count();
        (count(false), count(true))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Threads wait for connections or lines, and end with the process; the port goes with the namespace.
        drop(self.thread.take());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Connection {
    stream: TcpStream,
    client: Client,
    shared: Arc<Shared>,
}

struct Asked {
    method: String,
    target: String,
    token: Option<String>,
    body: Vec<u8>,
}

impl Connection {
    fn serve(mut self, runtime: &Runtime) -> std::io::Result<()> {
        let Some(asked) = self.read()? else { return Ok(()) };
        let (path, query) = asked.target.split_once('?').unwrap_or((&asked.target, ""));
        let resource = path.rsplit('/').next().unwrap_or_default().to_owned();
        let is_watch = query.contains("watch=true");
        let rules = self.shared.rules.borrow().clone();
        if asked.method != "GET" {
            return self.pass(runtime, &asked);
        }
        lock(&self.shared.requests).push((resource.clone(), is_watch));
        if rules.token.as_ref().is_some_and(|token| asked.token.as_ref() != Some(token)) {
            return self.refuse(401, "");
        }
        let mut refusal = None;
        if resource == "endpointslices" {
            self.shared.rules.send_modify(|rules| {
                refusal = if is_watch { &mut rules.refuse_watches } else { &mut rules.refuse_lists }.pop();
            });
        }
        if let Some((status, headers)) = refusal {
            return self.refuse(status, &headers);
        }
        if is_watch { self.watch(runtime, &resource, &asked) } else { self.list(runtime, &asked, &rules) }
    }

    fn read(&self) -> std::io::Result<Option<Asked>> {
        let mut reader = BufReader::new(&self.stream);
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(None);
        }
        let (mut token, mut length) = (None, 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
                break;
            }
            let Some((name, value)) = line.trim().split_once(": ") else { continue };
            match name.to_ascii_lowercase().as_str() {
                "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
                "content-length" => length = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let mut words = first.split(' ').map(str::to_owned);
        let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
        Ok(Some(Asked { method, target, token, body }))
    }

    fn refuse(&mut self, status: u16, headers: &str) -> std::io::Result<()> {
        let body =
            format!(r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","code":{status},"message":"chaos"}}"#);
        self.say(&format!("{}{body}", head(status, &format!("content-length: {}\r\n{headers}", body.len()))))
    }

    fn say(&mut self, text: &str) -> std::io::Result<()> {
        let slow = self.shared.rules.borrow().slow;
        let (bytes, pause) = if slow { DRIP } else { (usize::MAX, Duration::ZERO) };
        for part in text.as_bytes().chunks(bytes) {
            self.stream.write_all(part)?;
            if slow {
                std::thread::sleep(pause);
            }
        }
        Ok(())
    }

    fn reset(&self) -> std::io::Result<()> {
        // Closed with the drop of the connection, by RST.
        setsockopt(&self.stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).map_err(Into::into)
    }

    /// Takes one from what is left of a count, and says what is left then. Another connection may have been first.
    fn take(&self, count: impl FnOnce(&mut Rules) -> &mut u32) -> Option<u32> {
        let mut left = None;
        self.shared.rules.send_if_modified(|rules| {
            let count = count(rules);
            left = count.checked_sub(1);
            *count = left.unwrap_or(0);
            left.is_some()
        });
        left
    }

    /// What is not read passes as it is.
    fn pass(&mut self, runtime: &Runtime, asked: &Asked) -> std::io::Result<()> {
        let mut request = request!(asked.method, asked.target, kube::client::Body::from(asked.body.clone()));
        let kind = if asked.method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        request.headers_mut().insert("content-type", kind.parse().expect("a media type"));
        let status = runtime.block_on(async { self.client.send(request).await.map(|answer| answer.status().as_u16()) });
        let body = "{}";
        self.say(&format!("{}{body}", head(status.unwrap_or(503), "content-length: 2\r\n")))
    }

    fn list(&mut self, runtime: &Runtime, asked: &Asked, rules: &Rules) -> std::io::Result<()> {
        let follows = asked.target.contains("continue=");
        if follows && self.take(|rules| &mut rules.gone_pages).is_some() {
            return self.refuse(410, "");
        }
        let target = match rules.page {
            Some(page) => asked.target.replace("limit=500", &format!("limit={page}")),
            None => asked.target.clone(),
        };
        let request = request!("GET", target, Vec::new());
        let text = match runtime.block_on(self.client.request_text(request)) {
            Ok(text) => text,
            Err(kube::Error::Api(status)) => return self.refuse(status.code, ""),
            Err(_) => return self.refuse(503, ""),
        };
        let begin = head(200, &format!("content-length: {}\r\n", text.len()));
        let half: String = text.chars().take(text.chars().count() / 2).collect();
        if let Some(left) = self.take(|rules| &mut rules.half_lists) {
            self.say(&format!("{begin}{half}"))?;
            return if left.is_multiple_of(2) { Ok(()) } else { self.reset() };
        }
        if self.take(|rules| &mut rules.stalled_lists).is_some() {
            self.say(&format!("{begin}{half}"))?;
            // Until the agent has lost patience.
            self.stream.read_to_end(&mut Vec::new())?;
            return Ok(());
        }
        self.say(&format!("{begin}{text}"))
    }

    fn watch(&mut self, runtime: &Runtime, resource: &str, asked: &Asked) -> std::io::Result<()> {
        let stream = match runtime.block_on(self.client.request_stream(request!("GET", asked.target, Vec::new()))) {
            Ok(stream) => stream,
            Err(kube::Error::Api(status)) => return self.refuse(status.code, ""),
            Err(_) => return self.refuse(503, ""),
        };
        let (sender, mut orders) = mpsc::unbounded_channel();
        self.say(&head(200, "transfer-encoding: chunked\r\n"))?;
        lock(&self.shared.watches).push((resource.to_owned(), sender));
        // Whoever watches says nothing more: what can be read is the end.
        let watcher = {
            let _inside = runtime.enter();
            // SAFETY: the copy owns its descriptor, and nothing closes or exchanges that while it is registered.
            unsafe { AsyncFd::register_with_interest(self.stream.try_clone()?, Interest::READABLE)? }
        };
        let mut lines = pin!(stream.lines());
        let mut rules = self.shared.rules.subscribe();
        let (mut half, mut spoil) = (false, None);
        loop {
            let mute = rules.borrow_and_update().mute;
            let line = runtime.block_on(async {
                tokio::select! {
                    biased;
                    order = orders.recv() => Next::Order(order),
                    _ = watcher.readable() => Next::Gone,
                    _ = rules.changed() => Next::Rules,
                    line = lines.next(), if !mute => Next::Line(line),
                }
            });
            match line {
                Next::Rules => {}
                Next::Gone => return Ok(()),
                Next::Order(Some(Order::Say(line))) => self.chunk(&line)?,
                Next::Order(Some(Order::HalfOfNext)) => half = true,
                Next::Order(Some(Order::SpoilNext(field))) => spoil = Some(field),
                Next::Order(Some(Order::Reset) | None) => return self.reset(),
                Next::Line(Some(Ok(line))) => {
                    lock(&self.shared.said).entry(resource.to_owned()).or_default().push(line.clone());
                    if half {
                        self.chunk(&line[..line.len() / 2])?;
                        return self.reset();
                    }
                    let (padding, twice) = {
                        let rules = self.shared.rules.borrow();
                        (rules.padding, rules.twice)
                    };
                    // A bookmark has no fields to spoil.
                    let spoilt = if line.starts_with(BOOKMARK) { None } else { spoil.take() };
                    let line = changed(&line, spoilt, padding);
                    for _ in 0..=usize::from(twice) {
                        self.chunk(&format!("{line}\n"))?;
                    }
                }
                // However the server has ended it.
                Next::Line(_) => return self.say("0\r\n\r\n"),
            }
        }
    }

    fn chunk(&mut self, text: &str) -> std::io::Result<()> {
        self.say(&format!("{:x}\r\n{text}\r\n", text.len()))
    }
}

enum Next<L> {
    Order(Option<Order>),
    Rules,
    Gone,
    Line(L),
}

/// The event with a field of its object spoilt, or its object made larger.
fn changed(line: &str, spoil: Option<&str>, padding: usize) -> String {
    if spoil.is_none() && padding == 0 {
        return line.to_owned();
    }
    let mut event: serde_json::Value = serde_json::from_str(line).expect("the server's events are JSON");
    if let Some(field) = spoil {
        *event["object"].pointer_mut(field).unwrap_or_else(|| panic!("no {field} in {line}")) = "nonsense".into();
    }
    if padding > 0 {
        event["object"]["metadata"]["annotations"]["padding"] = "x".repeat(padding).into();
    }
    event.to_string()
}

fn head(status: u16, more: &str) -> String {
    format!("HTTP/1.1 {status} chaos\r\ncontent-type: application/json\r\nconnection: close\r\n{more}\r\n")
}
