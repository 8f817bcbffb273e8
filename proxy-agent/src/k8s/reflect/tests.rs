//! Lists and watches of a server that says what a case has written down, byte for byte, over real connections: what a
//! real API server cannot be made to do. What it can be made to do is the cluster tier's.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc as std_mpsc;
use std::time::Instant;

use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::super::client::{Access, Settings};
use super::*;
use crate::k8s::service;

/// Longer than a busy machine takes.
const PATIENCE: Patience = Patience {
    answer: Duration::from_secs(10),
    piece: Duration::from_secs(10),
    page: Duration::from_secs(10),
    line: Duration::from_secs(60),
    pauses: 0.1,
};
/// For cases in which it ends.
const SHORT: Patience = Patience {
    answer: Duration::from_millis(1000),
    piece: Duration::from_millis(700),
    page: Duration::from_millis(1700),
    line: Duration::from_millis(1200),
    pauses: 0.1,
};
/// The agent's own pauses.
const UNHURRIED: Patience = Patience { pauses: 1.0, ..PATIENCE };
/// Within this, something that is due happens.
const SOON: Duration = Duration::from_secs(10);

/// A request, as far as the cases look at it.
#[derive(Clone, Debug)]
struct Asked {
    at: Instant,
    target: String,
    token: Option<String>,
}

impl Asked {
    fn is_watch(&self) -> bool {
        self.target.contains("watch=true")
    }

    fn since_version(&self) -> &str {
        self.target.split("resourceVersion=").nth(1).and_then(|rest| rest.split('&').next()).unwrap_or_default()
    }
}

/// What is done with a connection, one after the other; at the end it is closed.
#[derive(Clone, Debug)]
enum Act {
    Say(String),
    Wait(Duration),
    /// Ends it as a crash does.
    Reset,
}

/// A server. What it answers to its n-th request is up to the case.
struct Script {
    addr: SocketAddr,
    asked: std_mpsc::Receiver<Asked>,
}

impl Script {
    fn start(answer: impl Fn(usize, &Asked) -> Vec<Act> + Send + 'static) -> Self {
        Self::listen("127.0.0.1:0".parse().unwrap(), answer)
    }

    fn listen(addr: SocketAddr, answer: impl Fn(usize, &Asked) -> Vec<Act> + Send + 'static) -> Self {
        let listener = TcpListener::bind(addr).unwrap();
        let addr = listener.local_addr().unwrap();
        let (said, asked) = std_mpsc::channel();
        std::thread::spawn(move || {
            let mut number = 0;
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                // A connection that was made and not used.
                let Some(request) = request(&stream) else { continue };
                let acts = answer(number, &request);
                number += 1;
                if said.send(request).is_err() {
                    return;
                }
                std::thread::spawn(move || act(stream, acts));
            }
        });
        Self { addr, asked }
    }

    fn next(&self) -> Asked {
        self.asked.recv_timeout(SOON).expect("a request")
    }

    /// Requests until nothing more comes for a while.
    fn all_within(&self, time: Duration) -> Vec<Asked> {
        let until = Instant::now() + time;
        let next = || self.asked.recv_timeout(until.saturating_duration_since(Instant::now())).ok();
        std::iter::from_fn(next).collect()
    }
}

fn request(stream: &TcpStream) -> Option<Asked> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut token = None;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some(value) = line.to_lowercase().strip_prefix("authorization: bearer ") {
            token = Some(value.to_owned());
        }
    }
    Some(Asked { at: Instant::now(), target: first.split(' ').nth(1)?.to_owned(), token })
}

fn act(mut stream: TcpStream, acts: Vec<Act>) {
    for act in acts {
        match act {
            // Whoever has gone does not hear it.
            Act::Say(text) => stream.write_all(text.as_bytes()).unwrap_or_default(),
            Act::Wait(time) => std::thread::sleep(time),
            Act::Reset => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
        }
    }
    stream.shutdown(std::net::Shutdown::Write).ok();
    stream.read_to_end(&mut Vec::new()).ok();
}

fn head(status: &str, more: &str) -> Act {
    Act::Say(format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n{more}\r\n"))
}

fn whole(status: &str, more: &str, body: &str) -> Vec<Act> {
    vec![head(status, &format!("{more}content-length: {}\r\n", body.len())), Act::Say(body.to_owned())]
}

fn refused(status: &str) -> Vec<Act> {
    let code: u16 = status[..3].parse().unwrap();
    whole(
        status,
        "",
        &json!({"kind": "Status", "status": "Failure", "code": code, "message": "as written"}).to_string(),
    )
}

fn object(name: &str, version: u64) -> Value {
    let ports = json!([{"name": "http", "port": 80}]);
    json!({
        "metadata": {"name": name, "namespace": "a", "resourceVersion": version.to_string()},
        "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": ports},
    })
}

fn listed(version: u64, next: &str, items: &[Value]) -> String {
    let metadata = json!({"resourceVersion": version.to_string(), "continue": next});
    json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": metadata, "items": items}).to_string()
}

fn list(version: u64, items: &[Value]) -> Vec<Act> {
    whole("200 OK", "", &listed(version, "", items))
}

fn chunk(text: &str) -> Act {
    Act::Say(format!("{:x}\r\n{text}\r\n", text.len()))
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

/// A watch that says this and stays open until the client has lost patience.
fn watch(lines: &[String]) -> Vec<Act> {
    let mut acts = vec![head("200 OK", "transfer-encoding: chunked\r\n")];
    acts.extend(lines.iter().map(|line| chunk(line)));
    acts.push(Act::Wait(Duration::from_secs(60)));
    acts
}

/// A reflection of Services, as the agent has it but for its patience.
struct Rig {
    runtime: Runtime,
    events: mpsc::Receiver<Input>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn start(addr: SocketAddr) -> Self {
        Self::start_with(PATIENCE, addr, false)
    }

    fn start_with(patience: Patience, addr: SocketAddr, optional: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("token"), "first").unwrap();
        Self::start_in(dir, patience, addr, optional)
    }

    fn start_in(dir: tempfile::TempDir, patience: Patience, addr: SocketAddr, optional: bool) -> Self {
        let kubeconfig = dir.path().join("kubeconfig");
        write_kubeconfig(&kubeconfig, addr);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let settings = Settings { access: Access::Kubeconfig(kubeconfig), url: None };
        let server = Arc::new(runtime.block_on(Server::new(settings)).unwrap());
        let reflection = Reflection {
            server,
            kind: Kind::Service,
            fields: None,
            labels: None,
            optional,
            decode: |object: &Service| {
                let Decoded { object, warnings } = service::decode(object).map_err(|error| error.to_string())?;
                Ok(Decoded { object: object.map(Object::Service), warnings })
            },
            patience,
            metrics: ApiMetrics::default(),
            of: PhantomData,
        };
        let (to, events) = mpsc::channel(64);
        runtime.spawn(reflection.follow(to));
        Self { runtime, events, dir }
    }

    fn next(&mut self) -> String {
        let next = self.runtime.block_on(async { timeout(SOON, self.events.recv()).await });
        let Ok(Some(Input::Event(event))) = next else { panic!("no event: {next:?}") };
        match event {
            Event::Init(_) => "init".to_owned(),
            Event::InitApply(object) => format!("listed {}", object.name().name()),
            Event::InitKeep(_, name) => format!("kept {}", name.name()),
            Event::InitDone(_) => "done".to_owned(),
            Event::Apply(object) => format!("applied {}", object.name().name()),
            Event::Delete(_, name) => format!("deleted {}", name.name()),
            Event::NodeAddrs(_) => panic!("of an API server"),
        }
    }

    fn expect(&mut self, expected: &[&str]) {
        for (i, expected) in expected.iter().enumerate() {
            assert_eq!(self.next(), *expected, "event {i}");
        }
    }

    fn expect_silence(&mut self, time: Duration) {
        let next = self.runtime.block_on(async { timeout(time, self.events.recv()).await });
        assert!(next.is_err(), "{next:?}");
    }
}

fn write_kubeconfig(file: &Path, addr: SocketAddr) {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\ncontexts:\n- {{name: a, context: {{cluster: a, user: a}}}}\nclusters:\n\
         - {{name: a, cluster: {{server: 'http://{addr}'}}}}\nusers:\n- {{name: a, user: {{tokenFile: {}}}}}\n",
        file.with_file_name("token").display()
    );
    fs::write(file, text).unwrap();
}

#[test]
fn pages_become_one_list_and_a_watch_goes_on_from_where_it_ended() {
    let server = Script::start(|number, _| match number {
        0 => whole("200 OK", "", &listed(10, "page two", &[object("one", 3)])),
        1 => list(10, &[object("two", 4)]),
        2 => {
            let bookmark = json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "20"}});
            let mut acts = watch(&[line("MODIFIED", &object("one", 12)), line("BOOKMARK", &bookmark)]);
            // It has lived long enough to be none that ended at once.
            *acts.last_mut().unwrap() = Act::Wait(Duration::from_millis(300));
            acts.push(Act::Say("0\r\n\r\n".to_owned()));
            acts
        }
        _ => watch(&[line("DELETED", &object("two", 21))]),
    });
    let mut rig = Rig::start(server.addr);
    rig.expect(&["init", "listed one", "listed two", "done", "applied one", "deleted two"]);
    let asked: Vec<_> = (0..4).map(|_| server.next()).collect();
    assert!(asked[1].target.contains("continue=page+two"), "{asked:?}");
    assert_eq!(asked.iter().map(Asked::is_watch).collect::<Vec<_>>(), [false, false, true, true]);
    assert_eq!((asked[2].since_version(), asked[3].since_version()), ("10", "20"));
    assert!(asked[2].target.contains("allowWatchBookmarks=true"), "{asked:?}");
}

#[test]
fn what_a_watch_repeats_of_the_past_is_not_believed_and_a_list_says_what_is() {
    for (kind, past) in [("MODIFIED", object("one", 11)), ("DELETED", object("one", 9)), ("ADDED", object("gone", 5))] {
        let past = line(kind, &past);
        let server = Script::start(move |number, _| match number {
            0 => list(10, &[object("one", 3)]),
            // The second is the first again.
            1 => watch(&[line("MODIFIED", &object("one", 12)), line("MODIFIED", &object("one", 12)), past.clone()]),
            2 => list(13, &[object("one", 12)]),
            _ => watch(&[]),
        });
        let mut rig = Rig::start(server.addr);
        rig.expect(&["init", "listed one", "done", "applied one", "applied one", "init", "listed one", "done"]);
    }
    // A bookmark of the past would make the next watch repeat it.
    let bookmark = json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "9"}});
    let server = Script::start(move |number, asked| match number {
        0 => list(10, &[]),
        1 => watch(&[line("BOOKMARK", &bookmark)]),
        _ if asked.is_watch() => watch(&[]),
        // All of the cluster has gone back: a list is believed.
        _ => list(9, &[object("one", 3)]),
    });
    let mut rig = Rig::start(server.addr);
    rig.expect(&["init", "done", "init", "listed one", "done"]);
    assert_eq!(
        server.all_within(Duration::from_secs(1)).iter().rfind(|asked| asked.is_watch()).unwrap().since_version(),
        "9"
    );
}

#[test]
fn an_object_that_cannot_be_read_keeps_what_was_known_of_it_and_delays_nothing() {
    let mut bad = object("bad", 4);
    bad["spec"]["ports"] = json!("eighty");
    let at = |version: &str| {
        let mut bad = bad.clone();
        bad["metadata"]["resourceVersion"] = json!(version);
        bad
    };
    let (known, changed, deleted) = (at("4"), at("14"), at("16"));
    let server = Script::start(move |number, _| match number {
        0 => list(10, &[object("one", 3), known.clone(), object("two", 5)]),
        _ => watch(&[line("MODIFIED", &changed), line("ADDED", &object("three", 15)), line("DELETED", &deleted)]),
    });
    let mut rig = Rig::start(server.addr);
    rig.expect(&["init", "listed one", "kept bad", "listed two", "done", "applied three", "deleted bad"]);
    assert_eq!(server.all_within(Duration::from_millis(300)).len(), 2, "a list and a watch");
}

#[test]
fn half_an_answer_tells_nothing_and_is_asked_for_again_from_the_same_version() {
    let text = listed(10, "", &[object("one", 3)]);
    let event = line("DELETED", &object("one", 12));
    let server = Script::start(move |number, _| match number {
        // Half a list: closed, then reset.
        0 => vec![
            head("200 OK", &format!("content-length: {}\r\n", text.len())),
            Act::Say(text[..text.len() / 2].to_owned()),
        ],
        1 => vec![
            head("200 OK", &format!("content-length: {}\r\n", text.len())),
            Act::Say(text[..90].to_owned()),
            Act::Reset,
        ],
        // Half a list that calls itself whole.
        2 => whole("200 OK", "", &text[..text.len() - 4]),
        3 => whole("200 OK", "", &text),
        // Half an event: reset, closed, and with an end that calls itself well.
        4 => vec![
            head("200 OK", "transfer-encoding: chunked\r\n"),
            chunk(&event[..event.len() / 2]),
            Act::Wait(Duration::from_millis(50)),
            Act::Reset,
        ],
        5 => vec![head("200 OK", "transfer-encoding: chunked\r\n"), chunk(&event[..event.len() - 2])],
        6 => vec![
            head("200 OK", "transfer-encoding: chunked\r\n"),
            chunk(&event[..event.len() - 2]),
            Act::Say("0\r\n\r\n".to_owned()),
        ],
        _ => watch(std::slice::from_ref(&event)),
    });
    let mut rig = Rig::start(server.addr);
    rig.expect(&["init", "listed one", "done", "deleted one"]);
    let asked: Vec<_> = (0..8).map(|_| server.next()).collect();
    for watch in &asked[4..] {
        assert_eq!((watch.is_watch(), watch.since_version()), (true, "10"), "{asked:?}");
    }
}

#[test]
fn a_version_that_is_gone_wants_a_list_wherever_it_is_said() {
    let expired = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"});
    let too_large = json!({"kind": "Status", "code": 504, "reason": "Timeout", "message": "Too large resource version",
        "details": {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]}});
    let server = Script::start(move |number, _| match number {
        // In the middle of a list: it begins anew.
        0 => whole("200 OK", "", &listed(10, "page two", &[object("one", 3)])),
        1 => refused("410 Gone"),
        2 => list(11, &[object("one", 3)]),
        3 => refused("410 Gone"),
        4 => list(12, &[]),
        5 => watch(&[line("ERROR", &expired)]),
        6 => list(13, &[]),
        7 => whole("504 Gateway Timeout", "", &too_large.to_string()),
        8 => list(5, &[]),
        _ => watch(&[]),
    });
    let mut rig = Rig::start(server.addr);
    rig.expect(&["init", "listed one", "init", "listed one", "done", "init", "done", "init", "done", "init", "done"]);
    let asked: Vec<_> = (0..10).map(|_| server.next()).collect();
    let last = &asked[9];
    assert_eq!((last.is_watch(), last.since_version()), (true, "5"));
}

#[test]
fn an_answer_that_stops_coming_is_given_up() {
    let text = listed(10, "", &[object("one", 3)]);
    let half = vec![head("200 OK", &format!("content-length: {}\r\n", text.len())), Act::Say(text[..60].to_owned())];
    // A byte now and then, for ever.
    let dripping =
        (60..text.len()).flat_map(|i| [Act::Say(text[i..=i].to_owned()), Act::Wait(Duration::from_millis(150))]);
    let dripping: Vec<_> = half.iter().cloned().chain(dripping).collect();
    let stalled = [half.clone(), vec![Act::Wait(Duration::from_secs(60))]].concat();
    let server = Script::start(move |number, _| match number {
        0 => vec![Act::Wait(Duration::from_secs(60))],
        1 => stalled.clone(),
        2 => dripping.clone(),
        3 => list(10, &[]),
        4 => vec![Act::Wait(Duration::from_secs(60))],
        // A line, and then nothing: this and the next one.
        5 => watch(&[line("ADDED", &object("one", 11))]),
        6 => watch(&[line("MODIFIED", &object("one", 12)), "{\"type\":".to_owned()]),
        _ => watch(&[line("ADDED", &object("two", 13))]),
    });
    let mut rig = Rig::start_with(SHORT, server.addr, false);
    rig.expect(&["init", "done", "applied one", "applied one", "applied two"]);
    let asked: Vec<_> = (0..8).map(|_| server.next()).collect();
    let Patience { answer, piece, page, line, .. } = SHORT;
    for (i, bound) in [answer, piece, page, Duration::ZERO, answer, line, line].into_iter().enumerate() {
        let took = asked[i + 1].at - asked[i].at;
        // A pause comes on top.
        assert!(took >= bound && took < bound + Duration::from_millis(3_500), "request {i}: {took:?} for {bound:?}");
    }
}

#[test]
fn a_server_that_asks_for_patience_gets_it() {
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        let server = Script::start(move |number, _| match number {
            0 | 2 => whole(status, "retry-after: 1\r\n", "later"),
            1 => list(10, &[]),
            _ => watch(&[]),
        });
        let mut rig = Rig::start(server.addr);
        rig.expect(&["init", "done"]);
        let asked: Vec<_> = (0..4).map(|_| server.next()).collect();
        for refused in [0, 2] {
            let took = asked[refused + 1].at - asked[refused].at;
            assert!(took >= Duration::from_secs(1), "{status}: asked again after {took:?}");
            assert!(took < Duration::from_secs(4), "{status}: asked again after {took:?}");
        }
    }
}

#[test]
fn errors_without_a_word_about_time_are_met_with_pauses_that_grow() {
    let server = Script::start(|number, _| match number {
        0 => refused("500 Internal Server Error"),
        1 => refused("504 Gateway Timeout"),
        2 => vec![Act::Reset],
        _ => list(10, &[]),
    });
    let mut rig = Rig::start_with(UNHURRIED, server.addr, false);
    rig.expect(&["init", "done"]);
    let asked: Vec<_> = (0..4).map(|_| server.next()).collect();
    for (i, longest) in [400, 800, 1600].into_iter().enumerate() {
        let took = asked[i + 1].at - asked[i].at;
        assert!(took >= Duration::from_millis(longest / 4), "attempt {i}: {took:?}");
        assert!(took < Duration::from_millis(longest + 1_000), "attempt {i}: {took:?}");
    }
}

#[test]
fn watches_that_end_at_once_are_not_asked_for_without_a_pause() {
    let server = Script::start(|number, _| match number {
        0 => list(10, &[]),
        n if n % 2 == 0 => vec![head("200 OK", "transfer-encoding: chunked\r\n"), Act::Say("0\r\n\r\n".to_owned())],
        // Not even one that has something to say.
        _ => {
            let mut acts = watch(&[line("MODIFIED", &object("one", 12))]);
            *acts.last_mut().unwrap() = Act::Say("0\r\n\r\n".to_owned());
            acts
        }
    });
    let _rig = Rig::start_with(UNHURRIED, server.addr, false);
    let asked = server.all_within(Duration::from_secs(3));
    // One that has brought something is followed by a first pause again: at least a tenth of a second.
    assert!((3..=25).contains(&asked.len()), "{} requests in 3 s", asked.len());
}

#[test]
fn a_replaced_token_is_used_as_soon_as_the_old_one_is_refused() {
    let server = Script::start(|number, asked| match (number, asked.token.as_deref()) {
        (0, _) => list(10, &[]),
        (1, _) => vec![head("200 OK", "transfer-encoding: chunked\r\n"), Act::Wait(Duration::from_secs(1)), Act::Reset],
        (_, Some("second")) => watch(&[line("ADDED", &object("one", 11))]),
        _ => refused("401 Unauthorized"),
    });
    // As the kubelet does it: the file is a link into a folder that a link names.
    let dir = tempfile::tempdir().unwrap();
    for (folder, token) in [("..1", "first"), ("..2", "second")] {
        fs::create_dir(dir.path().join(folder)).unwrap();
        fs::write(dir.path().join(folder).join("token"), token).unwrap();
    }
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap();
    link("..1", "..data");
    link("..data/token", "token");
    link("..2", "..data_tmp");
    let mut rig = Rig::start_in(dir, PATIENCE, server.addr, false);
    rig.expect(&["init", "done"]);
    assert_eq!(server.next().token.as_deref(), Some("first"));
    fs::rename(rig.dir.path().join("..data_tmp"), rig.dir.path().join("..data")).unwrap();
    let replaced = Instant::now();
    // kube-rs alone would go on with the old one for a minute.
    rig.expect(&["applied one"]);
    assert!(replaced.elapsed() < Duration::from_secs(8), "{:?}", replaced.elapsed());
}

#[test]
fn a_server_that_is_back_is_used_within_two_seconds() {
    let server = Script::start(|number, _| if number == 0 { list(10, &[]) } else { vec![Act::Reset] });
    let addr = server.addr;
    let mut rig = Rig::start_with(UNHURRIED, addr, false);
    rig.expect(&["init", "done"]);
    // It says no more: attempts fail, long enough for pauses to be at their longest.
    rig.expect_silence(Duration::from_secs(4));
    drop(server);
    // The next connection shows the thread that nobody listens to it any more.
    let back = loop {
        match std::panic::catch_unwind(|| Script::listen(addr, |_, _| watch(&[line("ADDED", &object("one", 11))]))) {
            Ok(server) => break server,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let since = Instant::now();
    rig.expect(&["applied one"]);
    assert!(since.elapsed() < Duration::from_millis(2_500), "{:?}", since.elapsed());
    assert_eq!(back.next().since_version(), "10");
}

#[test]
fn a_kind_that_the_server_does_not_have_is_asked_for_ever_more_seldom() {
    let server = Script::start(|_, _| refused("404 Not Found"));
    let mut rig = Rig::start_with(UNHURRIED, server.addr, true);
    rig.expect_silence(Duration::from_secs(4));
    let asked = server.all_within(Duration::ZERO);
    assert!((2..=6).contains(&asked.len()), "{} requests in 4 s", asked.len());
}
