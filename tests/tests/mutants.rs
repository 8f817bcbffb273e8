//! Tests that cannot fail prove nothing: objects with one fault each must fail by the test that is named for them.
//!
//! Each fault is a feature of `proxy-ebpf`, decided at one line. The object is built with it, and the packet tier runs
//! the named test on it in a process of its own. Needs root and the tools that build eBPF.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A fault and the packet test that notices it.
struct Mutant {
    /// Feature of `proxy-ebpf`, without `mutant-`.
    fault: &'static str,
    /// Test of the packet tier.
    noticed_by: &'static str,
}

const MUTANTS: [Mutant; 17] = [
    Mutant {
        fault: "no-direction",
        noticed_by: "flows::the_reply_of_an_endpoint_here_is_translated_where_it_leaves_not_where_it_arrives::udp_v4",
    },
    Mutant {
        fault: "no-checksum",
        noticed_by: "flows::the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service::tcp_v6",
    },
    Mutant {
        fault: "runs-swapped",
        noticed_by: "policy::rule_24_an_internal_local_policy_offers_the_endpoints_of_this_node::tcp_v4",
    },
    Mutant {
        fault: "shared-tuples",
        noticed_by: "tuples::one_client_port_to_two_services_with_the_same_endpoint_gets_two_ports::udp_v4",
    },
    Mutant { fault: "dead-endpoints", noticed_by: "flows::rule_105_datagrams_move_when_their_endpoint_is_gone::v4" },
    Mutant { fault: "closed-lives", noticed_by: "flows::a_syn_after_the_fins_of_both_sides_begins_anew::v6" },
    Mutant { fault: "no-transit", noticed_by: "bridge::a_frame_in_transit_is_left_alone::tcp_v4" },
    Mutant { fault: "no-handshake", noticed_by: "handshake::what_ingress_translated_egress_leaves_alone::tcp_v4" },
    Mutant { fault: "no-guard", noticed_by: "tuples::a_direct_packet_on_a_services_tuple_gets_another_port::udp_v6" },
    Mutant {
        fault: "unsettled",
        noticed_by: "flows::a_half_open_flow_keeps_its_endpoint_when_the_run_changes::tcp_v4",
    },
    Mutant { fault: "any-slot", noticed_by: "limits::a_slot_that_changed_hands_is_not_used::tcp_v6" },
    Mutant { fault: "routed-bridge", noticed_by: "bridge::a_pod_on_the_bridge_reaches_its_neighbour_by_mac::tcp_v4" },
    Mutant { fault: "udp-at-once", noticed_by: "flows::datagrams_that_do_not_last_stay_half_open::v4" },
    Mutant {
        fault: "uncontested",
        noticed_by: "tuples::a_connection_that_the_endpoint_has_with_the_client_already_is_left_alone::v4",
    },
    Mutant {
        fault: "no-masquerade",
        noticed_by: "masquerade::rule_68_a_node_port_masquerades_a_client_outside::udp_v6",
    },
    Mutant {
        fault: "masquerade-sockets",
        noticed_by: "masquerade::a_port_that_a_socket_of_the_node_has_is_not_taken::tcp_v4",
    },
    Mutant { fault: "no-zero-checksum", noticed_by: "headers::no_udp_checksum_stays_no_checksum" },
];

/// The packet tier's test binary, built if need be.
fn packet_tier() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["test", "--no-run", "--message-format=json", "-p", env!("CARGO_PKG_NAME"), "--test", "packets"];
    let mut build = Command::new(cargo);
    // What cargo tells this test about its own package would make build scripts of others run anew.
    let own = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_EXE_"];
    for (name, _) in std::env::vars_os().filter(|(name, _)| own.iter().any(|o| name.to_string_lossy().starts_with(o))) {
        build.env_remove(name);
    }
    let output = build
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo {} failed", arguments.join(" "));
    let messages = String::from_utf8_lossy(&output.stdout);
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "packets")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .expect("cargo names the test binary that it built")
}

fn build(features: &[&str]) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace");
    let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let target_dir = &target_dir;
    let options = proxy_ebpf_build::Options { workspace, target_dir, features, opt_level: None, subcommand: "build" };
    proxy_ebpf_build::build(&options)
        .unwrap_or_else(|e| panic!("cannot build the object with {features:?}: {e}"))
        .object
}

/// Runs one test on an object: whether it passed, and what it said.
fn run(tier: &Path, object: &Path, test: &str) -> (bool, String) {
    let output = Command::new(tier)
        .args(["--exact", test])
        .env("FAIRLEAD_EBPF_OBJECT", object)
        .env("RUST_BACKTRACE", "0")
        .output()
        .expect("the packet tier runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("running 1 test"), "the packet tier has no test {test}:\n{said}");
    (output.status.success(), said)
}

#[test]
fn every_fault_is_noticed_by_its_test() {
    let tier = packet_tier();
    let sound = build(&[]);
    for Mutant { fault, noticed_by } in &MUTANTS {
        let (passed, said) = run(&tier, &sound, noticed_by);
        assert!(passed, "without any fault, {noticed_by} fails:\n{said}");
        println!("{fault}: {noticed_by} passes without it");
    }
    let mut unnoticed = Vec::new();
    for Mutant { fault, noticed_by } in &MUTANTS {
        let object = build(&[&format!("mutant-{fault}")]);
        let (passed, said) = run(&tier, &object, noticed_by);
        // An object that does not load shows nothing about the test.
        assert!(!said.contains("cannot load"), "the object with mutant-{fault} does not load:\n{said}");
        if passed {
            unnoticed.push(format!("mutant-{fault} passes {noticed_by}"));
        }
        println!("{fault}: {}", if passed { "NOT noticed" } else { "noticed" });
    }
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}

/// The debug build is loaded once in a while; it must load then.
#[test]
fn the_object_that_logs_works() {
    let (tier, object) = (packet_tier(), build(&["log"]));
    for family in ["tcp_v4", "udp_v6"] {
        let test =
            format!("flows::the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service::{family}");
        let (passed, said) = run(&tier, &object, &test);
        assert!(passed, "{said}");
    }
}

#[test]
fn every_fault_of_the_programs_is_tried() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy-ebpf/Cargo.toml");
    let text = std::fs::read_to_string(&manifest).unwrap_or_else(|e| panic!("cannot read {}: {e}", manifest.display()));
    let faults: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("mutant-")?.split_once(" = ")).collect();
    for (fault, _) in &faults {
        assert!(MUTANTS.iter().any(|mutant| mutant.fault == *fault), "mutant-{fault} has no test here");
    }
    assert_eq!(faults.len(), MUTANTS.len());
}
