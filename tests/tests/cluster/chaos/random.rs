//! Faults and changes in an order that nobody has thought of. A run says its seed; `FAIRLEAD_CHAOS_SEED` repeats it.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde_json::{Value, json};

use super::{AGREED, Chaos, proxy::Order};
use crate::objects;

const STEPS: usize = 36;
/// Services that come and go beside the probed one.
const OTHERS: [&str; 3] = ["one", "two", "three"];
const PODS: [&str; 3] = ["pod-a", "pod-b", "pod-c"];
const RESOURCES: [&str; 2] = ["services", "endpointslices"];

/// SplitMix64: what follows from a seed is the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).expect("it is below n")
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn pods(&mut self) -> Vec<&'static str> {
        PODS.into_iter().filter(|_| self.below(2) == 0).collect()
    }
}

/// Carries out one sequence; the cluster is as the named cases have left it.
pub(super) fn any_order(chaos: &mut Chaos) {
    let fresh = || SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos() as u64;
    let seed = std::env::var("FAIRLEAD_CHAOS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(fresh);
    chaos.note(format!("FAIRLEAD_CHAOS_SEED={seed}"));
    let mut dice = Dice(seed);
    let mut there = BTreeSet::new();
    for step in 0..STEPS {
        let what = if dice.below(2) == 0 { change(chaos, &mut dice, &mut there) } else { fault(chaos, &mut dice) };
        chaos.note(format!("{step}: {what}"));
        std::thread::sleep(Duration::from_millis(dice.next() % 150));
        if step % 12 == 11 {
            let token = chaos.proxy.token();
            chaos.proxy.rules(|rules| *rules = super::proxy::Rules { token, ..Default::default() });
            chaos.agree(AGREED);
            chaos.judge().unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}; {}", chaos.story()));
        }
    }
    assert!(chaos.agent.is_running() && chaos.twin.is_running(), "seed {seed}");
}

fn change(chaos: &mut Chaos, dice: &mut Dice, there: &mut BTreeSet<&'static str>) -> String {
    let name = dice.of(&OTHERS);
    match dice.below(4) {
        0 => format!("web moves to {}", chaos.move_on()),
        1 if there.remove(name) => {
            for v6 in [false, true] {
                chaos.api.delete::<EndpointSlice>("default", &objects::slice_name(name, v6)).expect("the slice");
            }
            chaos.api.delete::<Service>("default", name).expect("the Service");
            format!("{name} goes")
        }
        2 if there.contains(name) => {
            let port = 1 + dice.below(60_000);
            let ports = json!({"spec": {"ports": [{"name": "tcp", "port": port, "protocol": "TCP"}]}});
            chaos.api.patch::<Service>("default", name, ports).expect("the Service");
            format!("{name} has port {port}")
        }
        _ => {
            if there.insert(name) {
                chaos.api.create(&objects::service(name)).expect("a Service");
                for v6 in [false, true] {
                    chaos.api.create(&objects::slice(name, v6, &[])).expect("a slice");
                }
            }
            let pods = dice.pods();
            chaos.set(name, dice.below(2) == 0, &pods);
            format!("{name} has {pods:?}")
        }
    }
}

/// The version that an event tells of.
fn version(event: &Value) -> u64 {
    let version = event["object"]["metadata"]["resourceVersion"].as_str();
    version.and_then(|text| text.parse().ok()).expect("a version")
}

fn fault(chaos: &Chaos, dice: &mut Dice) -> String {
    let resource = dice.of(&RESOURCES);
    let error = |code: u16| {
        let status =
            json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "chaos"});
        Order::Say(format!("{}\n", json!({"type": "ERROR", "object": status})))
    };
    let order = |order: &Order, what: &str| {
        chaos.proxy.try_order(resource, order);
        format!("{resource}: {what}")
    };
    match dice.below(12) {
        0 => order(&Order::Reset, "the watch breaks"),
        1 => order(&Order::HalfOfNext, "half of the next event"),
        2 => {
            let code = dice.of(&[410, 500]);
            order(&error(code), &format!("an error {code} in the watch"))
        }
        3 => {
            chaos.proxy.rules(|rules| rules.half_lists += 1);
            order(&error(410), "half a list")
        }
        4 => {
            chaos.proxy.rules(|rules| (rules.page, rules.gone_pages) = (Some(2), 1));
            order(&error(410), "a page that is gone")
        }
        5 => {
            let said: Vec<Value> =
                chaos.proxy.said(resource).iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
            let Some(mut event) = (!said.is_empty()).then(|| said[dice.below(said.len())].clone()) else {
                return "nothing to repeat".to_owned();
            };
            if event["type"] != "BOOKMARK" {
                event["type"] = dice.of(&["ADDED", "MODIFIED", "DELETED"]).into();
            }
            // What is of the newest version, as something else than it was, is no repetition.
            if Some(version(&event)) == said.iter().map(version).max() {
                return "nothing to repeat".to_owned();
            }
            order(&Order::Say(format!("{event}\n")), "something of the past")
        }
        6 => {
            let refusal = (dice.of(&[401, 429, 500, 503, 504]), dice.of(&["", "retry-after: 1\r\n"]).to_owned());
            chaos.proxy.rules(|rules| {
                rules.refuse_watches.push(refusal.clone());
                rules.refuse_lists.push(refusal.clone());
            });
            order(&Order::Reset, &format!("the next list and watch are answered with {refusal:?}"))
        }
        7 => {
            chaos.proxy.rules(|rules| rules.mute = !rules.mute);
            "watches become silent, or speak again".to_owned()
        }
        8 => {
            chaos.proxy.rules(|rules| rules.slow = !rules.slow);
            "bytes become slow, or fast again".to_owned()
        }
        9 => {
            chaos.proxy.rules(|rules| rules.twice = !rules.twice);
            "everything twice, or once again".to_owned()
        }
        10 => {
            chaos.proxy.rules(|rules| rules.padding = 30_000 - rules.padding);
            "objects become large, or small again".to_owned()
        }
        _ => {
            // Cannot be read in the watch; the list that follows is good.
            chaos.proxy.try_order(resource, &Order::SpoilNext("/metadata/creationTimestamp"));
            order(&error(410), "an object that cannot be read")
        }
    }
}
