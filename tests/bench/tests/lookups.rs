//! Look-ups per packet do not grow unseen: each class of packets takes exactly what `tests/golden/lookups.txt` says.
//!
//! Needs root (CAP_BPF and CAP_NET_ADMIN) and the tool chain of the programs, because the counting build is made here.

use std::path::Path;

use fairlead_bench::{
    classes::Class,
    report,
    tally::{self, Count},
};
use proxy_common::abi::Tally;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../golden/lookups.txt");
const HEAD: &str = "\
# Look-ups, updates and deletes of maps that one packet of each class takes, and entries that it adds.
# FAIRLEAD_BLESS=1 cargo test -p fairlead-bench --test lookups
# writes this file anew.
";

fn counts() -> Vec<Count> {
    assert!(
        nix::unistd::geteuid().is_root(),
        "loading programs needs CAP_BPF and CAP_NET_ADMIN: run this as root, or leave it out with `--lib --bins`"
    );
    report::counts().expect("the programs load and count")
}

fn of(counts: &[Count], class: Class, map: Tally) -> Vec<u64> {
    let own = counts.iter().filter(|count| count.class == class);
    own.map(|count| count.by_map.get(&map).copied().unwrap_or(0)).collect()
}

#[test]
fn each_class_takes_the_look_ups_that_the_golden_file_says() {
    let counts = counts();
    let lines: String = counts.iter().map(|count| format!("{count}\n")).collect();
    let text = format!("{HEAD}{lines}");
    if std::env::var_os("FAIRLEAD_BLESS").is_some() {
        std::fs::create_dir_all(Path::new(GOLDEN).parent().unwrap()).unwrap();
        std::fs::write(GOLDEN, &text).unwrap();
    }
    let golden = std::fs::read_to_string(GOLDEN).unwrap();
    assert_eq!(text, golden, "look-ups changed; read the difference, then bless {GOLDEN}");

    // What the design promises, whatever the file says.
    for class in [Class::UdpRequest, Class::UdpReply, Class::TcpRequest, Class::TcpReply, Class::NodePortRequest] {
        assert_eq!(of(&counts, class, Tally::Flows), [1, 1], "{class:?}: an established packet is one flow look-up");
        for count in counts.iter().filter(|count| count.class == class) {
            assert_eq!(count.hashed(), 1, "{class:?} walks no other table: {count}");
        }
    }
    for class in [Class::OtherArrives, Class::OtherLeaves, Class::UdpRequestLeaves] {
        for count in counts.iter().filter(|count| count.class == class) {
            assert_eq!(count.hashed(), 0, "{class:?} walks no table: {count}");
        }
    }
    for count in counts.iter().filter(|count| matches!(count.class, Class::UdpNew | Class::TcpNew)) {
        assert_eq!((count.half_open, count.confirmed), (1, 0), "a half-open flow is one insert: {count}");
    }
}

#[test]
fn an_object_without_counters_is_refused() {
    assert!(nix::unistd::geteuid().is_root(), "loading programs needs CAP_BPF and CAP_NET_ADMIN: run this as root");
    let pins = report::pins("plain").unwrap();
    let error = tally::Counting::new(proxy_agent::dataplane::load::OBJECT, pins).unwrap_err();
    assert!(format!("{error:#}").contains("feature tally"), "{error:#}");
}
