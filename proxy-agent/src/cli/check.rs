//! `fairlead check`: can this kernel run it, what is missing, what does it cost. Changes nothing.

mod memory;
mod sysctl;

use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use super::print;
use super::table::Table;
use crate::args::CheckArgs;
use crate::config::{NodePortAddresses, Sizes};
use crate::dataplane::attach::Hook;
use crate::dataplane::attach::links::Links;
use crate::dataplane::attach::standing::misplaced;
use crate::dataplane::pin::{PinError, PinRoot};
use crate::dataplane::probe::{self, kube_proxy};
use crate::dataplane::{load, sys};
use crate::devices::desired::{Desired, Wishes, desired};
use crate::devices::inventory::Inventory;
use crate::devices::select::Selection;
use crate::devices::{netlink, rules, told};

/// How a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weight {
    /// As it should be.
    Ok,
    /// Works, but somebody should know.
    Note,
    /// Fairlead cannot run.
    Missing,
}

/// What was found.
#[derive(Debug, Default)]
struct Report {
    findings: Vec<(Weight, String)>,
}

impl Report {
    fn add(&mut self, weight: Weight, text: impl Into<String>) {
        self.findings.push((weight, text.into()));
    }

    fn can_run(&self) -> bool {
        self.findings.iter().all(|(weight, _)| *weight != Weight::Missing || mutant!("rule-100"))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (weight, text) in &self.findings {
            let word = match weight {
                Weight::Ok => "ok",
                Weight::Note => "note",
                Weight::Missing => "MISSING",
            };
            writeln!(f, "{word:<8} {text}")?;
        }
        Ok(())
    }
}

pub(super) fn main(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let sizes = Sizes::new(&args.sizes)?;
    let pins = PinRoot::new(args.pins.pin_path)?;
    let mut report = Report::default();
    kernel(&mut report);
    if rights(&mut report) {
        programs(&mut report);
        proxies(&mut report);
    }
    bpffs(&mut report, &pins);
    let devices = devices(&mut report);
    if sys::is_root() && devices.as_ref().is_some_and(|found| found.devices.values().any(|d| d.flat && d.programs)) {
        verifier(&mut report, load::FLAT_OBJECT, "the programs of devices without an Ethernet header");
    }
    if let Some(devices) = &devices {
        neighbours(&mut report, &pins, devices);
    }
    reply_rules(&mut report);
    sysctl::check(&mut report, &pins, devices.as_ref());
    let ipv6 = probe::has_ipv6();
    let memory = memory::table(&load::sized_shapes(&sizes, ipv6)?);
    let verdict = if report.can_run() { "Fairlead can run here." } else { "Fairlead cannot run here: see MISSING." };
    let devices = devices.map(|devices| device_table(&devices)).unwrap_or_default();
    print(&format!("{report}\n{devices}\n{memory}\n{verdict}\n"))?;
    Ok(if report.can_run() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kernel(report: &mut Report) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    report.add(Weight::Ok, format!("kernel {}", release.as_deref().unwrap_or("of unknown version").trim()));
    let ipv6 = if probe::has_ipv6() { "IPv4 and IPv6" } else { "IPv4 only: IPv6 is off, its maps hold one entry" };
    report.add(Weight::Ok, ipv6);
}

/// What `run` needs, by the numbers of `include/uapi/linux/capability.h`.
const CAPABILITIES: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// Does for the last two.
const CAP_SYS_ADMIN: u32 = 21;

fn rights(report: &mut Report) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_capabilities(&status);
    if missing.is_empty() {
        report.add(Weight::Ok, "rights to load and attach programs");
    } else {
        report.add(Weight::Missing, format!("{}: run as root", missing.join(", ")));
    }
    missing.is_empty()
}

fn missing_capabilities(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let has = |bit: u32| effective & 1 << bit != 0;
    let missing = |bit: u32| !(has(bit) || bit > CAP_SYS_ADMIN && has(CAP_SYS_ADMIN));
    CAPABILITIES.into_iter().filter(|(bit, _)| missing(*bit)).map(|(_, name)| name).collect()
}

fn programs(report: &mut Report) {
    let features = match probe::features() {
        Ok(features) => features,
        Err(error) => {
            report
                .add(Weight::Missing, format!("the kernel loads no program ({error}); it needs CONFIG_BPF_SYSCALL=y"));
            return;
        }
    };
    let mut feature = |there: bool, name: &str, without: &str| {
        if there { report.add(Weight::Ok, name) } else { report.add(Weight::Note, format!("no {name}: {without}")) }
    };
    feature(features.tcx, "tcx links (Linux 6.6)", "programs are attached as clsact filters");
    feature(features.fib_source, "BPF_FIB_LOOKUP_SRC (6.7)", "preferred sources come from the map of devices");
    verifier(report, load::OBJECT, "the programs");
}

fn verifier(report: &mut Report, object: &[u8], which: &str) {
    match load::verify(object) {
        Ok(()) => report.add(Weight::Ok, format!("the verifier accepts {which}")),
        Err(error) => report.add(Weight::Missing, format!("{which} do not load: {error}")),
    }
}

fn proxies(report: &mut Report) {
    match kube_proxy::stands() {
        Ok(false) => report.add(Weight::Ok, "no rules of kube-proxy"),
        Ok(true) => report.add(
            Weight::Note,
            "kube-proxy's rules stand: connections that began under them are left to them until they are gone",
        ),
        Err(error) => report.add(Weight::Note, format!("cannot look for kube-proxy's rules: {error}")),
    }
}

fn bpffs(report: &mut Report, pins: &PinRoot) {
    match pins.place() {
        Ok(place) => report.add(Weight::Ok, format!("{place} for pins under {}", pins.path().display())),
        Err(error) => report.add(Weight::Missing, error.to_string()),
    }
    match pins.require() {
        Ok(()) => {
            let holder = match pins.try_lock() {
                Err(PinError::Busy { .. }) => "an agent is running",
                _ => "no agent is running",
            };
            report.add(Weight::Ok, format!("maps are pinned under {}; {holder}", pins.versioned().display()));
        }
        Err(PinError::Nothing { .. }) => report.add(Weight::Ok, "nothing is pinned yet"),
        Err(error) => report.add(Weight::Note, error.to_string()),
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        report.add(Weight::Note, "the kernel has no BTF of its own (CONFIG_DEBUG_INFO_BTF); Fairlead needs none");
    }
}

/// The rules that lead marked replies, and whoever else reads their bits.
fn reply_rules(report: &mut Report) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let rules = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(async { Ok(rules::read(&netlink::questions()?).await?) }));
    match rules {
        Ok(rules) => {
            for rule in &rules.own {
                report.add(Weight::Ok, format!("rule for replies: {rule}"));
            }
            for rule in rules.rivals(&rules.own) {
                report.add(Weight::Note, format!("another rule reads the bits of --reply-mark: {rule}"));
            }
        }
        Err(error) => report.add(Weight::Note, super::chain(&error)),
    }
}

/// The devices as they would be served without `--devices`; netlink answers an ordinary user too.
fn devices(report: &mut Report) -> Option<Desired> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let events = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(async { Ok(netlink::read_all(&netlink::questions()?).await?) }));
    match events {
        Ok(events) => {
            let mut inventory = Inventory::default();
            inventory.replace(events);
            let nodeport_addresses = NodePortAddresses::Primary;
            let wishes = Wishes { selection: Selection::default(), nodeport_addresses, pods: None, replies: None };
            Some(desired(&inventory, &wishes))
        }
        Err(error) => {
            report.add(Weight::Missing, format!("the devices cannot be read: {}", super::chain(&error)));
            None
        }
    }
}

/// Foreign programs on the devices that would be served, and those on the wrong side of ours where it is attached.
fn neighbours(report: &mut Report, pins: &PinRoot, devices: &Desired) {
    let Ok(links) = Links::new(pins) else { return };
    for (index, device) in devices.devices.iter().filter(|(_, device)| device.programs) {
        for hook in Hook::ALL {
            // Without rights nobody is told.
            let standing = links.standing(*index, hook, &device.filters).unwrap_or_default();
            let wrong = misplaced(&standing, hook);
            for program in standing.iter().filter(|program| !program.own) {
                let side = match (wrong.contains(program), hook) {
                    (true, Hook::Ingress) => {
                        "conflict, before Fairlead's: what it redirects or takes never comes to it"
                    }
                    (true, Hook::Egress) => "conflict, behind Fairlead's: it sees translated packets on one side only",
                    (false, _) => "somebody else's program",
                };
                report.add(Weight::Note, format!("{} {}: {program}: {side}", device.name, hook.name()));
            }
        }
    }
}

fn device_table(devices: &Desired) -> String {
    let mut table = Table::new(&["DEVICE", "ROLE", "PROGRAMS", "WHY"]);
    for told in told::of(devices) {
        let programs = match devices.devices.get(&told.ifindex) {
            Some(device) if device.programs => "yes",
            Some(_) => "its ports'",
            None => "no",
        };
        table.row(vec![told.name, told.role, programs.to_owned(), told.why]);
    }
    let root = if sys::is_root() { "" } else { "(without rights, foreign filters are not seen)\n" };
    format!("{table}{root}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_rights_are_named() {
        assert_eq!(missing_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"), [""; 0]);
        assert_eq!(missing_capabilities("CapEff:\t0000000000001000\n"), ["CAP_PERFMON", "CAP_BPF"]);
        assert_eq!(missing_capabilities("CapEff:\t000000c000001000\n"), [""; 0], "those of the pod");
        assert_eq!(missing_capabilities("CapEff:\t0000000000200000\n"), ["CAP_NET_ADMIN"]);
        assert_eq!(missing_capabilities("").len(), 3);
    }

    #[test]
    fn only_what_is_missing_stops_it() {
        let mut report = Report::default();
        report.add(Weight::Note, "a");
        assert!(report.can_run());
        report.add(Weight::Missing, "b");
        assert!(!report.can_run());
        assert_eq!(report.to_string(), "note     a\nMISSING  b\n");
    }
}
