//! A hostile API server: after each fault the kernel's maps equal those of an agent that nobody disturbed, and no packet
//! in between went to an endpoint that was not to be chosen at that time.
//!
//! Two agents follow the same objects of the same real API server. One is spoken to through a [`proxy`] that cuts, stalls,
//! refuses and repeats; the other, its twin with pins of its own and no device, is asked directly what should be.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use fairlead_lab::{
    Ask, Lab, LabConfig, Netfilter, Proto, Server, Shape, http, schedule::Preferred, server::wait_until,
};
use fairlead_tests::controlplane::{Api, ControlPlane};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use crate::{
    agent::Agent,
    fixture::{SOON, TARGET, Turn, Vips, create_node},
    objects,
    prober::{Heard, PATIENCE, Prober},
};

mod named;
mod proxy;
mod random;

use proxy::Proxy;

/// Slots of both agents: few enough for a Service that does not fit.
const SLOTS: &str = "8192";
/// How soon both agents agree once the server behaves again. The longest pause between attempts is 5 s.
const AGREED: Duration = Duration::from_secs(20);
/// Of a hundred questions so many may stay without an answer: a busy machine gives some to a server too late.
const MISSING: usize = 5;
/// A watch that has lasted this long has worked: pauses are short again.
const WORKED: Duration = Duration::from_millis(2_100);

/// A state of the probed Service, from the moment when it began to be written.
struct State {
    since: Instant,
    endpoints: BTreeSet<&'static str>,
}

/// Which endpoints could be chosen when.
#[derive(Default)]
struct Track {
    states: Vec<State>,
    /// From then on, none before this state.
    confirmed: Vec<(Instant, usize)>,
}

impl Track {
    fn write(&mut self, endpoints: &[&'static str]) {
        self.states.push(State { since: Instant::now(), endpoints: endpoints.iter().copied().collect() });
    }

    fn confirm(&mut self) {
        self.confirmed.push((Instant::now(), self.states.len() - 1));
    }

    /// Every answer is of a state that had been written when it came, none of one before the last that was confirmed when its
    /// question was asked, and none of one before that of an answer that had come by then: endpoints follow the objects, and
    /// never back. Of two questions under way at a time either may be the first that the node hears.
    fn judge(&self, answers: &mut [Heard], begun: Instant) -> Result<(), String> {
        answers.sort_by_key(|answer| answer.at);
        // When an answer came that showed a later state than all before it.
        let mut shown: Vec<(Instant, usize)> = Vec::new();
        for answer in answers {
            let before = |marks: &[(Instant, usize)]| {
                marks.iter().rfind(|(at, _)| *at <= answer.asked).map_or(0, |(_, state)| *state)
            };
            let first = before(&self.confirmed).max(before(&shown));
            let possible = (first..self.states.len())
                .filter(|i| self.states[*i].since <= answer.at)
                .find(|i| self.states[*i].endpoints.contains(answer.server.as_str()));
            let state = possible.ok_or_else(|| {
                let (asked, at) = (answer.asked.duration_since(begun), answer.at.duration_since(begun));
                let since = |state: &State| (state.since.saturating_duration_since(begun), state.endpoints.clone());
                let states: Vec<_> = self.states[first..].iter().take(4).map(since).collect();
                format!(
                    "{} answered at {at:?} what was asked at {asked:?}; in state {first} or later, from {states:?}",
                    answer.server
                )
            })?;
            if shown.last().is_none_or(|(_, last)| *last < state) {
                shown.push((answer.at, state));
            }
        }
        Ok(())
    }
}

/// A cluster with both agents, and probers at work. Fields are dropped in their order.
struct Chaos {
    prober: Prober,
    steady: Prober,
    agent: Agent,
    twin: Agent,
    proxy: Proxy,
    api: Api,
    _plane: ControlPlane,
    _servers: Vec<Server>,
    lab: Lab,
    track: Track,
    begun: Instant,
    marks: u16,
    account: PathBuf,
    /// What was done and seen since the case began: told where it fails.
    notes: Vec<String>,
    _turn: Turn,
}

impl Chaos {
    fn start() -> Self {
        let turn = Turn::beside();
        let lab = Lab::new(LabConfig::new(Shape::Routed, Netfilter::Conntrack)).expect("a lab");
        let serve = |pod: &fairlead_lab::Pod| {
            Server::both(&pod.ns, &pod.name, &[false, true].map(|v6| SocketAddr::new(pod.ip(v6), TARGET)))
        };
        // What else the machine runs is not held against the agent: servers and probers go before it.
        let first = Preferred::new();
        let servers = lab.pods.iter().map(serve).collect::<Result<_, _>>().expect("servers in the pods");
        drop(first);
        warm(&lab);
        let plane = ControlPlane::start(&lab.node.ns).expect("an API server");
        let api = plane.api().expect("a client");
        create_node(&api, &lab);
        let mut track = Track::default();
        let mut vips = Vec::new();
        for (name, pod) in [("web", "pod-a"), ("steady", "pod-c")] {
            vips.push(Vips::of(&api.create(&objects::service(name)).expect("a Service")));
            for v6 in [false, true] {
                let addresses = [lab.pod(pod).expect("the pod").ip(v6)];
                api.create(&objects::slice(name, v6, &addresses)).expect("a slice");
            }
        }
        track.write(&["pod-a"]);
        api.create(&objects::service("mark")).expect("a Service");
        api.create(&objects::slice("mark", false, &[])).expect("a slice");

        let proxy = Proxy::start(&lab.node.ns, &plane.proxy_kubeconfig());
        // As the kubelet mounts a token: the file is a link into a folder that a link names.
        let account = lab.dir().join("account");
        fs::create_dir_all(account.join("..first")).expect("a folder");
        fs::write(account.join("..first/token"), "first").expect("a token");
        std::os::unix::fs::symlink("..first", account.join("..data")).expect("a link");
        std::os::unix::fs::symlink("..data/token", account.join("token")).expect("a link");
        let kubeconfig = lab.dir().join("chaos.kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "chaos",
            "contexts": [{"name": "chaos", "context": {"cluster": "chaos", "user": "chaos"}}],
            "clusters": [{"name": "chaos", "cluster": {"server": proxy.url()}}],
            "users": [{"name": "chaos", "user": {"tokenFile": account.join("token")}}],
        });
        fs::write(&kubeconfig, text.to_string()).expect("a kubeconfig");
        proxy.rules(|rules| rules.token = Some("first".to_owned()));
        let agent = Agent::start_with(&lab, &kubeconfig, "agent", &["--max-slots", SLOTS]);
        let alone = ["--max-slots", SLOTS, "--devices", "none", "--healthz-bind-address=", "--metrics-bind-address="];
        let twin = Agent::start_with(&lab, &plane.proxy_kubeconfig(), "twin", &alone);
        let first = Preferred::new();
        let prober = Prober::start(&lab.client.ns, vips[0].v4);
        let steady = Prober::start(&lab.client.ns, vips[1].v6);
        drop(first);
        let begun = Instant::now();
        let (marks, servers) = (0, servers);
        let mut chaos = Self {
            prober,
            steady,
            agent,
            twin,
            proxy,
            api,
            _plane: plane,
            _servers: servers,
            lab,
            track,
            begun,
            marks,
            account,
            notes: Vec::new(),
            _turn: turn,
        };
        chaos.agree(SOON);
        chaos
    }

    /// Waits until what failed before does not count any more.
    fn calm(&self) {
        let agreed = self.track.confirmed.last().map_or(self.begun, |(at, _)| *at);
        std::thread::sleep(WORKED.saturating_sub(agreed.elapsed()));
    }

    /// Gives the probed Service these endpoints.
    fn endpoints(&mut self, pods: &[&'static str]) {
        self.track.write(pods);
        for v6 in [false, true] {
            self.set("web", v6, pods);
        }
    }

    /// The same, to the next of the pods.
    fn move_on(&mut self) -> &'static str {
        let pods = ["pod-a", "pod-b", "pod-c"];
        let next = pods[self.track.states.len() % pods.len()];
        self.endpoints(&[next]);
        next
    }

    fn set(&self, service: &str, v6: bool, pods: &[&str]) {
        let addresses: Vec<_> = pods.iter().map(|pod| self.lab.pod(pod).expect("the pod").ip(v6)).collect();
        self.api.replace(&objects::slice(service, v6, &addresses)).expect("a slice that is there");
    }

    /// Writes a Service and a slice that nothing else is like, and says how they can be told.
    fn mark(&mut self) -> [Value; 2] {
        self.marks += 1;
        let ports = json!({"spec": {"ports": [{"name": "tcp", "port": self.marks, "protocol": "TCP"}]}});
        self.api.patch::<Service>("default", "mark", ports).expect("the Service");
        let pod = self.lab.pods[0].ip(false);
        let mut slice = objects::slice("mark", false, &[pod]);
        for port in slice.ports.iter_mut().flatten() {
            port.port = Some(10_000 + i32::from(self.marks));
        }
        self.api.replace(&slice).expect("the slice");
        [json!(self.marks), json!(10_000 + self.marks)]
    }

    /// True once the agent has got as far as the mark.
    fn has_seen(agent: &Agent, [service, slice]: &[Value; 2]) -> bool {
        let has = |what: &str, port: &Value| {
            let rows = agent.shown(what);
            rows.as_array().into_iter().flatten().any(|row| row["service"] == "mark" && row["port"] == *port)
        };
        has("services", service) && has("endpoints", slice)
    }

    /// Waits until both agents have got as far as everything that was written until now.
    fn both_have_seen_all(&mut self) {
        let mark = self.mark();
        for (name, agent) in [("agent", &self.agent), ("twin", &self.twin)] {
            assert!(wait_until(SOON, || Self::has_seen(agent, &mark)), "the {name} lags; {}", self.story());
        }
    }

    /// Waits until both agents have the same in their maps, of all that was written until now.
    fn agree(&mut self, limit: Duration) {
        let mark = self.mark();
        let seen = wait_until(SOON, || Self::has_seen(&self.twin, &mark));
        assert!(seen, "the twin lags; its log:\n{}", self.twin.log_tail());
        let began = Instant::now();
        let (mut found, mut wanted) = (Vec::new(), Vec::new());
        // The twin may be busy with what does not fit, and tries that again.
        let same = wait_until(limit, || {
            (found, wanted) = (maps(&self.agent), maps(&self.twin));
            found == wanted
        });
        let differing = || {
            let (wanted, found): (BTreeSet<_>, BTreeSet<_>) = (wanted.iter().collect(), found.iter().collect());
            let list =
                |set: Vec<&&String>| set.into_iter().take(10).map(|row| row.as_str()).collect::<Vec<_>>().join("\n");
            let (lacks, has) = (list(wanted.difference(&found).collect()), list(found.difference(&wanted).collect()));
            format!("it lacks:\n{lacks}\nit has:\n{has}")
        };
        assert!(same, "the agents do not agree within {limit:?}; {}\n{}", self.story(), differing());
        self.note(format!("agreed after {:?}", began.elapsed()));
        self.track.confirm();
    }

    /// What came before a failure, for its message.
    fn story(&self) -> String {
        format!("before:\n{}\nthe agent's log:\n{}", self.notes.join("\n"), self.agent.log_tail())
    }

    fn note(&mut self, text: String) {
        self.notes.push(format!("{:?}: {text}", self.begun.elapsed()));
    }

    /// How often lists and watches of this kind have failed for this reason, as the agent counts it.
    fn errors(&self, kind: &str, reason: &str) -> u64 {
        let metrics = http::get(&self.lab.node.ns, SocketAddr::from(([127, 0, 0, 1], 10_249)), "/metrics");
        let text = metrics.expect("the agent's metrics").body;
        let sample = format!("fairlead_api_errors_total{{kind=\"{kind}\",reason=\"{reason}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&sample)?.parse().ok()).unwrap_or(0)
    }

    /// Every answer until now was given by whom it could be given.
    fn judge(&self) -> Result<(), String> {
        let mut answers = self.prober.heard();
        self.track.judge(&mut answers, self.begun)?;
        let strangers: BTreeSet<_> =
            self.steady.heard().into_iter().map(|answer| answer.server).filter(|server| server != "pod-c").collect();
        if !strangers.is_empty() {
            return Err(format!("a Service that nobody touched was answered by {strangers:?}"));
        }
        for (what, prober) in [("moved", &self.prober), ("untouched", &self.steady)] {
            let heard: BTreeSet<_> = prober.heard().into_iter().map(|answer| answer.asked).collect();
            // The last ones are on their way.
            let asked = prober.asked();
            let due = &asked[..asked.len().saturating_sub(PATIENCE)];
            let missing: Vec<_> = due.iter().filter(|at| !heard.contains(at)).collect();
            if missing.len() * 100 > due.len() * MISSING {
                let at: Vec<_> =
                    missing.iter().map(|at| at.saturating_duration_since(self.begun).as_millis()).collect();
                let (missing, due) = (missing.len(), due.len());
                return Err(format!(
                    "{what}: {missing} of {due} questions were not answered, those of these ms: {at:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Asks each pod once by its own address: no question of a prober waits for the node to find a neighbour, or is lost where
/// too many wait.
fn warm(lab: &Lab) {
    for (pod, v6) in lab.pods.iter().flat_map(|pod| [(pod, false), (pod, true)]) {
        let ask = Ask::new(Proto::Udp, SocketAddr::new(pod.ip(v6), TARGET));
        let answered = || ask.once(&lab.client.ns).expect("the namespace").outcome.answer().is_some();
        assert!(wait_until(SOON, answered), "{} does not answer at its own address", pod.name);
    }
}

/// What an agent's maps hold, but for numbers that each agent gives out by itself and what packets have counted.
fn maps(agent: &Agent) -> Vec<String> {
    let mut rows = Vec::new();
    for what in ["services", "endpoints"] {
        for mut row in agent.shown(what).as_array().cloned().expect("an array") {
            let fields = row.as_object_mut().expect("objects");
            for own in ["port_id", "endpoint_id", "generation", "new_flows", "refused"] {
                fields.remove(own);
            }
            // How many slots were looked for when it was tried last.
            if let Some(why) = fields.get_mut("not_served") {
                *why = why.as_str().unwrap_or_default().replace(|c: char| c.is_ascii_digit(), "").into();
            }
            rows.push(format!("{what}: {row}"));
        }
    }
    rows.sort();
    rows
}

#[test]
fn an_answer_of_the_past_or_of_nobodys_endpoint_is_found() {
    let now = Instant::now();
    let at = |ms: u64| now + Duration::from_millis(ms);
    let heard = |ms: u64, server: &str| Heard { asked: at(ms), at: at(ms + 1), server: server.to_owned() };
    let state =
        |ms: u64, endpoints: &[&'static str]| State { since: at(ms), endpoints: endpoints.iter().copied().collect() };
    let track = Track {
        states: vec![state(0, &["a"]), state(100, &["b"]), state(200, &["a", "c"])],
        confirmed: vec![(at(150), 1), (at(300), 2)],
    };
    let judged = |answers: &[(u64, &str)]| {
        let mut answers: Vec<_> = answers.iter().map(|(ms, server)| heard(*ms, server)).collect();
        track.judge(&mut answers, now)
    };
    judged(&[(10, "a"), (120, "a"), (130, "b"), (180, "b"), (210, "c"), (250, "a"), (310, "a")]).unwrap();
    // Under way together.
    let late = Heard { at: at(113), ..heard(110, "a") };
    track.judge(&mut [heard(111, "b"), late], now).unwrap();
    for (what, wrong) in [
        ("nobody's", &[(10, "x")][..]),
        ("not written yet", &[(10, "b")]),
        ("confirmed to be over", &[(160, "a")]),
        ("confirmed to be over", &[(310, "b")]),
        ("back again", &[(110, "b"), (120, "a")]),
    ] {
        judged(wrong).expect_err(what);
    }
}
