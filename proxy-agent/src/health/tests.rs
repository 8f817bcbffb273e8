//! kube-proxy's own scenarios of its health server, in our words.

use super::*;

struct Clock(Moment);

impl Clock {
    fn new() -> Self {
        let wall = "2026-05-17T10:00:00.25Z".parse().unwrap();
        Self(Moment { at: Instant::now(), wall })
    }

    fn pass(&mut self, secs: u64) -> Moment {
        self.0 = Moment { at: self.0.at + Duration::from_secs(secs), wall: self.0.wall + Duration::from_secs(secs) };
        self.0
    }
}

const V4: Families = Families::one(IpFamily::V4);
const V6: Families = Families::one(IpFamily::V6);

fn healthy(health: &Health, now: Moment) -> [bool; 2] {
    [Question::Ready, Question::Live].map(|question| health.judge(now).answer(question).0)
}

fn started(clock: &Clock) -> Health {
    let health = Health::default();
    health.node(false);
    health.updated(Families::BOTH, clock.0);
    health
}

#[test]
fn rule_116_starting_is_healthy_and_a_family_is_judged_after_its_first_update() {
    let mut clock = Clock::new();
    let health = Health::default();
    health.node(false);
    assert_eq!(healthy(&health, clock.0), [true, true]);
    health.queued(Families::BOTH, clock.0);
    assert_eq!(healthy(&health, clock.pass(3600)), [true, true], "no family was ever up to date");
    health.updated(V4, clock.0);
    health.queued(V4, clock.0);
    assert_eq!(healthy(&health, clock.pass(60)), [false, false]);
}

#[test]
fn rule_116_the_oldest_change_that_waits_decides() {
    let mut clock = Clock::new();
    let health = started(&clock);
    assert_eq!(healthy(&health, clock.pass(86_400)), [true, true], "nothing waits");
    health.queued(Families::BOTH, clock.0);
    assert_eq!(healthy(&health, clock.pass(59)), [true, true]);
    health.queued(Families::BOTH, clock.0);
    assert_eq!(healthy(&health, clock.pass(1)), [false, false], "a later change does not set the clock back");
    health.updated(Families::BOTH, clock.0);
    assert_eq!(healthy(&health, clock.0), [true, true]);
}

#[test]
fn rule_116_each_family_must_keep_up() {
    let mut clock = Clock::new();
    let health = started(&clock);
    health.queued(Families::BOTH, clock.0);
    clock.pass(60);
    health.updated(V4, clock.0);
    assert_eq!(healthy(&health, clock.0), [false, false]);
    let (_, body) = health.judge(clock.0).answer(Question::Live);
    assert!(body.contains(r#""healthy":false,"status":{"IPv4""#) && body.contains(r#""healthy":false}}}"#), "{body}");
    health.updated(V6, clock.0);
    assert_eq!(healthy(&health, clock.0), [true, true]);
}

#[test]
fn rule_118_a_node_that_is_about_to_go_is_not_eligible_and_still_alive() {
    let clock = Clock::new();
    let health = Health::default();
    health.updated(Families::BOTH, clock.0);
    assert_eq!(healthy(&health, clock.0), [false, true], "not known yet");
    for leaving in [false, true, false] {
        health.node(leaving);
        assert_eq!(healthy(&health, clock.0), [!leaving, true]);
    }
}

#[test]
fn rule_119_the_bodies_are_kube_proxys() {
    let mut clock = Clock::new();
    let health = started(&clock);
    health.queued(V6, clock.0);
    clock.pass(5);
    let family = r#"{"lastUpdated":"2026-05-17T10:00:00.25Z","healthy":true}"#;
    let at =
        |text: &str| format!(r#""lastUpdated":"2026-05-17T10:00:{text}Z","currentTime":"2026-05-17T10:00:05.25Z""#);
    let status = format!(r#""status":{{"IPv4":{family},"IPv6":{family}}}"#);
    assert_eq!(
        health.judge(clock.0).answer(Question::Ready),
        (true, format!(r#"{{{},"nodeEligible":true,"healthy":true,{status}}}"#, at("05.25")))
    );
    assert_eq!(
        health.judge(clock.0).answer(Question::Live),
        (true, format!(r#"{{{},"healthy":true,{status}}}"#, at("05.25")))
    );
    // `healthy` is the proxy's own, whatever the node's object says; the time is that of the last sync.
    health.node(true);
    assert_eq!(
        health.judge(clock.0).answer(Question::Ready),
        (false, format!(r#"{{{},"nodeEligible":false,"healthy":true,{status}}}"#, at("00.25")))
    );
}

#[test]
fn a_node_without_ipv6_shows_one_family() {
    let clock = Clock::new();
    let health = Health::default();
    let (_, body) = health.judge(clock.0).answer(Question::Live);
    assert!(body.starts_with(r#"{"lastUpdated":"2026"#) && body.ends_with(r#""healthy":true}"#), "{body}");
    health.updated(V4, clock.0);
    let (_, body) = health.judge(clock.0).answer(Question::Live);
    assert!(body.contains("IPv4") && !body.contains("IPv6"), "{body}");
}
