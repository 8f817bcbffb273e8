//! One fault at a time. Each case also shows, by what the agent has counted, that its fault has happened.

use std::{fs, panic::AssertUnwindSafe, time::Duration};

use fairlead_lab::server::wait_until;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde_json::{Value, json};

use super::{
    AGREED, Chaos, maps,
    proxy::{Order, Rules},
    random::any_order,
};
use crate::{fixture::SOON, objects};

const SLICES: &str = "endpointslices";
/// A stalled list is given up after 10 s.
const AFTER_STALL: Duration = Duration::from_secs(25);

/// One fault.
type Case = fn(&mut Chaos);

#[test]
fn after_each_fault_the_maps_are_as_if_it_had_not_been() {
    let cases: [(&str, Case); 18] = [
        ("half an event", half_an_event),
        ("every connection breaks", every_connection_breaks),
        ("half a list, twice", half_a_list),
        ("a list that is gone in its middle", a_page_that_is_gone),
        ("a watch that says nothing for a while", a_silent_watch),
        ("a list that stops coming", a_stalled_list),
        ("slow bytes", slow_bytes),
        ("watches and lists are refused", refusals),
        ("an error in a watch", an_error_in_a_watch),
        ("a change of the past", a_change_of_the_past),
        ("a deletion of the past", a_deletion_of_the_past),
        ("a bookmark of the past", a_bookmark_of_the_past),
        ("everything twice", everything_twice),
        ("an object that cannot be read", an_unreadable_object),
        ("large objects", large_objects),
        ("more endpoints than there is room for", too_many_endpoints),
        ("a token that is replaced", a_replaced_token),
        ("faults and changes in any order", any_order),
    ];
    let mut chaos = Chaos::start();
    let (mut failed, mut took) = (Vec::new(), Vec::new());
    for (name, case) in cases {
        let began = std::time::Instant::now();
        chaos.notes = vec![name.to_owned()];
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
            case(&mut chaos);
            chaos.judge().unwrap_or_else(|wrong| panic!("{name}: {wrong}; {}", chaos.story()));
        }));
        took.push(format!("{name} {:.1} s", began.elapsed().as_secs_f32()));
        let token = chaos.proxy.token();
        chaos.proxy.rules(|rules| *rules = Rules { token, ..Rules::default() });
        if outcome.is_err() {
            failed.push(name);
            // What went wrong once is judged once.
            chaos.track.confirm();
            if !wait_until(AFTER_STALL, || maps(&chaos.agent) == maps(&chaos.twin)) {
                println!("the agents do not agree any more; what follows is not tried");
                break;
            }
        }
    }
    println!("{}", took.join(", "));
    assert!(failed.is_empty(), "{failed:?}; why stands above");
    assert!(chaos.agent.is_running() && chaos.twin.is_running());
}

/// Runs `fault`, and wants these errors of EndpointSlices to have been counted when both agents agree again.
fn with_errors(chaos: &mut Chaos, expected: &[(&str, u64)], limit: Duration, fault: impl FnOnce(&mut Chaos)) {
    let count =
        |chaos: &Chaos| expected.iter().map(|(reason, _)| chaos.errors("EndpointSlice", reason)).collect::<Vec<_>>();
    if expected.iter().any(|(reason, _)| matches!(*reason, "410" | "500" | "backwards")) {
        chaos.calm();
    }
    let before = count(chaos);
    fault(chaos);
    chaos.agree(limit);
    for ((before, after), (reason, times)) in before.iter().zip(count(chaos)).zip(expected) {
        assert!(after - before >= *times, "{reason}: counted {} times, not {times}", after - before);
    }
}

/// An ERROR event of this code, as API servers end watches.
fn error(code: u16) -> Order {
    let reason = if code == 410 { "Expired" } else { "InternalError" };
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "chaos"});
    say("ERROR", &status)
}

fn say(kind: &str, object: &Value) -> Order {
    Order::Say(format!("{}\n", json!({"type": kind, "object": object})))
}

fn half_an_event(chaos: &mut Chaos) {
    with_errors(chaos, &[("cut", 1)], AGREED, |chaos| {
        chaos.proxy.order(SLICES, &Order::HalfOfNext);
        chaos.move_on();
    });
}

fn every_connection_breaks(chaos: &mut Chaos) {
    with_errors(chaos, &[("cut", 1)], AGREED, |chaos| {
        chaos.proxy.order("", &Order::Reset);
        chaos.move_on();
    });
}

fn half_a_list(chaos: &mut Chaos) {
    with_errors(chaos, &[("410", 1), ("cut", 2)], AGREED, |chaos| {
        chaos.proxy.rules(|rules| rules.half_lists = 2);
        chaos.proxy.order(SLICES, &error(410));
        chaos.move_on();
    });
}

fn a_page_that_is_gone(chaos: &mut Chaos) {
    let (lists, _) = chaos.proxy.asked(SLICES);
    with_errors(chaos, &[("410", 2)], AGREED, |chaos| {
        chaos.proxy.rules(|rules| (rules.page, rules.gone_pages) = (Some(1), 1));
        chaos.proxy.order(SLICES, &error(410));
        chaos.move_on();
    });
    // A page, the one that is gone, and then one page for each slice.
    assert!(chaos.proxy.asked(SLICES).0 >= lists + 2 + 5, "the list has had no pages");
}

fn a_silent_watch(chaos: &mut Chaos) {
    chaos.proxy.rules(|rules| rules.mute = true);
    chaos.move_on();
    let mark = chaos.mark();
    std::thread::sleep(Duration::from_secs(1));
    assert!(!Chaos::has_seen(&chaos.agent, &mark), "the watch is not silent: this case shows nothing");
    chaos.proxy.rules(|rules| rules.mute = false);
    chaos.agree(AGREED);
}

fn a_stalled_list(chaos: &mut Chaos) {
    with_errors(chaos, &[("stalled", 1)], AFTER_STALL, |chaos| {
        chaos.proxy.rules(|rules| rules.stalled_lists = 1);
        chaos.proxy.order(SLICES, &error(410));
        chaos.move_on();
    });
}

fn slow_bytes(chaos: &mut Chaos) {
    with_errors(chaos, &[("410", 1)], AGREED, |chaos| {
        chaos.proxy.rules(|rules| (rules.slow, rules.padding) = (true, 20_000));
        chaos.proxy.order(SLICES, &error(410));
        chaos.move_on();
    });
}

fn refusals(chaos: &mut Chaos) {
    for (code, headers) in [(429, "retry-after: 1\r\n"), (503, "")] {
        with_errors(chaos, &[(&code.to_string(), 1)], AGREED, |chaos| {
            chaos.proxy.rules(|rules| rules.refuse_watches = vec![(code, headers.to_owned())]);
            chaos.proxy.order(SLICES, &Order::Reset);
            chaos.move_on();
        });
    }
    with_errors(chaos, &[("410", 1), ("500", 1)], AGREED, |chaos| {
        chaos.proxy.rules(|rules| rules.refuse_lists = vec![(500, String::new())]);
        chaos.proxy.order(SLICES, &error(410));
        chaos.move_on();
    });
}

fn an_error_in_a_watch(chaos: &mut Chaos) {
    with_errors(chaos, &[("500", 1)], AGREED, |chaos| {
        chaos.proxy.order(SLICES, &error(500));
        chaos.move_on();
    });
}

/// The oldest event of the probed Service's IPv4 slice.
fn past(chaos: &Chaos) -> Value {
    let said = chaos.proxy.said(SLICES);
    let events = said.iter().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let mut of_web = events.filter(|event| event["object"]["metadata"]["name"] == objects::slice_name("web", false));
    of_web.next().expect("the Service has been moved")
}

fn a_change_of_the_past(chaos: &mut Chaos) {
    chaos.move_on();
    chaos.agree(AGREED);
    with_errors(chaos, &[("backwards", 1)], AGREED, |chaos| {
        let past = past(chaos);
        chaos.proxy.order(SLICES, &say("MODIFIED", &past["object"]));
        chaos.proxy.order(SLICES, &say("ADDED", &past["object"]));
        std::thread::sleep(Duration::from_millis(300));
    });
}

fn a_deletion_of_the_past(chaos: &mut Chaos) {
    with_errors(chaos, &[("backwards", 1)], AGREED, |chaos| {
        let past = past(chaos);
        chaos.proxy.order(SLICES, &say("DELETED", &past["object"]));
        std::thread::sleep(Duration::from_millis(300));
    });
}

fn a_bookmark_of_the_past(chaos: &mut Chaos) {
    with_errors(chaos, &[("backwards", 1)], AGREED, |chaos| {
        let bookmark =
            json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": {"resourceVersion": "1"}});
        chaos.proxy.order(SLICES, &say("BOOKMARK", &bookmark));
        chaos.move_on();
    });
}

fn everything_twice(chaos: &mut Chaos) {
    let (lists, watches) = chaos.proxy.asked(SLICES);
    chaos.proxy.rules(|rules| rules.twice = true);
    for _ in 0..3 {
        chaos.move_on();
    }
    chaos.agree(AGREED);
    assert_eq!(chaos.proxy.asked(SLICES), (lists, watches), "a repetition of the last event is no fault");
}

fn an_unreadable_object(chaos: &mut Chaos) {
    chaos.agree(AGREED);
    chaos.proxy.order(SLICES, &Order::SpoilNext("/endpoints"));
    let stays = maps(&chaos.agent)
        .into_iter()
        .filter(|row| row.contains("\"web\"") && row.contains("10.244."))
        .collect::<Vec<_>>();
    let next = chaos.move_on();
    // Everything behind it is followed.
    let mark = chaos.mark();
    assert!(
        wait_until(SOON, || Chaos::has_seen(&chaos.agent, &mark)),
        "it holds others up:\n{}",
        chaos.agent.log_tail()
    );
    let rows = maps(&chaos.agent);
    assert!(!stays.is_empty() && stays.iter().all(|row| rows.contains(row)), "what was known of it stays: {rows:?}");
    let v6 = chaos.lab.pod(next).expect("the pod").ip(true).to_string();
    assert!(rows.iter().any(|row| row.contains("\"web\"") && row.contains(&v6)), "the other slice is used: {rows:?}");
    assert!(chaos.agent.log_text().contains("an object cannot be used; what was known of it stays"));
    chaos.move_on();
    chaos.agree(AGREED);
}

/// A Service with one slice for each of these numbers of endpoints. It comes last, when both agents know all of the slices:
/// where not all of them fit, what was served of the first ones would depend on which of them an agent saw together, and
/// Services are told by a watch of their own.
fn create_large(chaos: &mut Chaos, name: &str, slices: &[usize]) {
    let mut last = 0_u32;
    for (number, count) in slices.iter().enumerate() {
        let addresses: Vec<_> = (0..*count)
            .map(|_| {
                last += 1;
                std::net::Ipv4Addr::from(0x0a64_0000 + last).into()
            })
            .collect();
        let mut slice = objects::slice(name, false, &addresses);
        slice.metadata.name = Some(format!("{name}-{number}"));
        slice.ports.iter_mut().for_each(|ports| ports.truncate(1));
        chaos.api.create(&slice).expect("a slice");
    }
    chaos.both_have_seen_all();
    chaos.api.create(&objects::service(name)).expect("a Service");
}

fn delete_large(chaos: &mut Chaos, name: &str, slices: usize) {
    for number in 0..slices {
        chaos.api.delete::<EndpointSlice>("default", &format!("{name}-{number}")).expect("the slice");
    }
    chaos.api.delete::<Service>("default", name).expect("the Service");
    chaos.agree(AGREED);
}

fn large_objects(chaos: &mut Chaos) {
    chaos.proxy.rules(|rules| rules.padding = 1_000_000);
    chaos.move_on();
    chaos.agree(AGREED);
    chaos.proxy.rules(|rules| rules.padding = 0);
    create_large(chaos, "thousand", &[1000]);
    create_large(chaos, "hundred", &[1; 100]);
    chaos.agree(AGREED);
    let rows = maps(&chaos.agent).into_iter().filter(|row| row.starts_with("endpoints:"));
    let (thousand, hundred): (Vec<_>, Vec<_>) =
        rows.filter(|row| row.contains("\"10.100.")).partition(|row| row.contains("\"thousand\""));
    assert_eq!((thousand.len(), hundred.len()), (1000, 100));
    delete_large(chaos, "hundred", 100);
    delete_large(chaos, "thousand", 1);
}

fn too_many_endpoints(chaos: &mut Chaos) {
    create_large(chaos, "many", &[1000; 9]);
    chaos.agree(AGREED);
    let full = || {
        maps(&chaos.agent)
            .iter()
            .any(|row| row.contains("\"many\"") && row.contains("slots in a row in SLOTS_V: it is full"))
    };
    assert!(wait_until(SOON, full), "nobody says that it does not fit: {}", chaos.agent.log_tail());
    // All others are followed.
    chaos.move_on();
    chaos.agree(AGREED);
    delete_large(chaos, "many", 9);
    assert!(!maps(&chaos.agent).iter().any(|row| row.contains("\"many\"")), "it is gone");
}

fn a_replaced_token(chaos: &mut Chaos) {
    let account = chaos.account.clone();
    let before = chaos.errors("EndpointSlice", "401");
    with_errors(chaos, &[("401", 2)], AGREED, |chaos| {
        fs::create_dir(account.join("..second")).expect("a folder");
        fs::write(account.join("..second/token"), "second").expect("a token");
        std::os::unix::fs::symlink("..second", account.join("..data_tmp")).expect("a link");
        chaos.proxy.rules(|rules| rules.token = Some("second".to_owned()));
        chaos.proxy.order("", &Order::Reset);
        chaos.move_on();
        // The old one is refused, also when it is read again, before there is another.
        let refused = wait_until(SOON, || chaos.errors("EndpointSlice", "401") >= before + 2);
        assert!(refused, "the old token is not refused twice; the agent's log:\n{}", chaos.agent.log_tail());
        fs::rename(account.join("..data_tmp"), account.join("..data")).expect("the link can be replaced");
    });
}
