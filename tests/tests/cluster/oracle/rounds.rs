//! Rounds: many Services at once, each asked for by every kind of client on both nodes.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use k8s_openapi::api::core::v1::Service;

use super::{
    compare::{self, Tally},
    generate::{self, Generated},
    probe::{Kind, Magazine, Probe, Proto, Shot},
    sight::{Fate, fates},
    targets,
    world::{Client, PASSES, SETTINGS, Twins},
    write,
};
use crate::fixture::Vips;

/// Services of a round. kube-proxy takes a second or more for a round's sync, however many they are.
const SERVICES: usize = 60;
/// The seeds of the first rounds; every listed difference shows under them. Those of further rounds are new every time.
const FIXED_SEEDS: [u64; 2] = [2004, 2003];
/// How often a difference is looked at again before it is one: a packet may be lost on a busy machine, an endpoint missed.
const ATTEMPTS: usize = PASSES / 2;
/// How long both may take to know a round's objects.
const SYNCED: Duration = Duration::from_secs(60);

/// `FAIRLEAD_ORACLE_ROUNDS` makes it last longer; `FAIRLEAD_ORACLE_SEED` begins with another seed, and
/// `FAIRLEAD_ORACLE_ONLY` asks for one Service of each round alone.
#[test]
fn rules_10_to_76_the_first_packets_to_any_service_have_the_fate_that_kube_proxy_gives_them() {
    let mut twins = Twins::start();
    let mut magazine = Magazine::default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_nanos() as u64;
    let rounds: u64 = number("FAIRLEAD_ORACLE_ROUNDS").unwrap_or(FIXED_SEEDS.len() as u64 + 1);
    let first: Option<u64> = number("FAIRLEAD_ORACLE_SEED");
    let mut fixed = Tally::default();
    for n in 0..rounds {
        match (first, FIXED_SEEDS.get(n as usize)) {
            (Some(first), _) => drop(round(&mut twins, &mut magazine, first + n)),
            (None, Some(seed)) => fixed.add(&round(&mut twins, &mut magazine, *seed)),
            (None, None) => drop(round(&mut twins, &mut magazine, now.wrapping_add(n))),
        }
    }
    if first.is_none() && rounds >= FIXED_SEEDS.len() as u64 {
        fixed.assert_telling();
    }
}

/// A number from the environment.
fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

fn only() -> Option<usize> {
    number("FAIRLEAD_ORACLE_ONLY")
}

/// A round: Services are written and asked for, most of them are changed and asked for again, and all go.
fn round(twins: &mut Twins, magazine: &mut Magazine, seed: u64) -> Tally {
    let settings = (seed % SETTINGS.len() as u64) as usize;
    twins.run_with(settings);
    println!("seed {seed}: {}", SETTINGS[settings].name);
    let mut tally = Tally::default();
    let numbers: Vec<_> = (0..SERVICES).filter(|n| only().is_none_or(|only| only == *n)).collect();
    let first: Vec<_> = numbers.iter().map(|n| generate::service(seed, *n)).collect();
    let created = write::create(twins, &first);
    let sentinel = write::sentinel(twins);
    judge(twins, magazine, (seed, "created", 0), (&first, &created), (&sentinel, "pod-b"), &mut tally);
    let later: Vec<_> = numbers.iter().zip(&first).map(|(n, before)| generate::later(seed, *n, before)).collect();
    let changed = write::change(twins, &first, &later);
    write::move_sentinel(twins);
    judge(twins, magazine, (seed, "changed", ATTEMPTS), (&later, &changed), (&sentinel, "pod-a"), &mut tally);
    write::remove(twins);
    println!("{tally}");
    tally
}

/// Waits until both know the objects, and asks for them.
fn judge(
    twins: &Twins,
    magazine: &mut Magazine,
    (seed, phase, first_pass): (u64, &str, usize),
    (generated, objects): (&[Generated], &[Service]),
    (sentinel, at): (&Vips, &str),
    tally: &mut Tally,
) {
    let began = Instant::now();
    wait_synced(twins, magazine, sentinel, at);
    let synced = began.elapsed();
    let each = generated.iter().zip(objects).flat_map(|(made, service)| targets::of(made, service));
    let all: Vec<Probe> = each.chain(targets::nobodys()).collect();
    let (mut open, mut found) = (all.iter().collect::<Vec<_>>(), Vec::new());
    for attempt in 0..ATTEMPTS {
        magazine.pass = first_pass + attempt;
        found = compare::ask(twins, magazine, &open, attempt, tally);
        open = found.iter().map(|found| found.probe).collect();
        if open.is_empty() {
            break;
        }
        println!("seed {seed}, {phase}, attempt {attempt}: {} of {} probes differ", open.len(), all.len());
        std::thread::sleep(Duration::from_millis(300));
    }
    let services = generated.len();
    println!(
        "{} probes of {services} Services, {phase}: in step after {synced:.1?}, judged after {:.1?}",
        all.len(),
        began.elapsed()
    );
    assert!(
        found.is_empty(),
        "{} of {} probes differ, {phase}. FAIRLEAD_ORACLE_SEED={seed} FAIRLEAD_ORACLE_ROUNDS=1 FAIRLEAD_ORACLE_ONLY=N asks for \
         svc-N alone\n{}the agent's log:\n{}",
        found.len(),
        all.len(),
        compare::describe(&found, generated, objects),
        twins.log_tail()
    );
}

/// The last object that is written before probes are sent: once it is served as it is now, all are.
fn wait_synced(twins: &Twins, magazine: &mut Magazine, vips: &Vips, at: &str) {
    let probe = |to: SocketAddr| Probe {
        service: "in-step".to_owned(),
        kind: Kind::ClusterIp,
        client: Client::Pod,
        from: None,
        proto: Proto::Udp,
        to,
        endpoints: 1,
        sticky: false,
    };
    let probes = [vips.v4, vips.v6].map(probe);
    let began = Instant::now();
    loop {
        let shots: Vec<Shot> = probes.iter().flat_map(|probe| magazine.shots(probe, 1)).collect();
        let is_there = |fate: &Fate| matches!(fate, Fate::Reached { at: reached, .. } if *reached == at);
        if [&twins.ours, &twins.theirs].into_iter().all(|side| fates(side, &shots).iter().all(is_there)) {
            return;
        }
        let log = twins.log_tail();
        assert!(began.elapsed() < SYNCED, "not in step within {SYNCED:?}; the agent's log:\n{log}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
