//! Entries of /proc/sys that the agent reads and, unless `--manage-sysctls=false`, sets. What it set stands in a file, so
//! that `fairlead check` can list it and `fairlead cleanup` restore it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dataplane::pin::PinRoot;
use crate::dataplane::sys;
use crate::run_file::RunFile;
use crate::source_ports::{ENOUGH, NODE_PORTS, Ports, RESERVED, SourcePorts, Span, span_text};

const RANGE: &str = "net/ipv4/ip_local_port_range";
const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";
/// Whether a packet from one of the node's own addresses may come in on `lo`: the answer of a Service at such an address
/// to a process of the node does. IPv6 has no such check.
const ACCEPT_LOCAL: &str = "net/ipv4/conf/lo/accept_local";
const ACCEPT_LOCAL_ALL: &str = "net/ipv4/conf/all/accept_local";
/// What kernels start with.
const DEFAULT_RANGE: Span = 32_768..=60_999;

/// An entry that was set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// Below /proc/sys.
    pub entry: String,
    /// What it said before.
    pub before: String,
    /// What was added to it, if it is a list; else what it was set to.
    pub added: String,
}

impl Set {
    /// Its name as `sysctl` has it.
    pub fn name(&self) -> String {
        self.entry.replace('/', ".")
    }

    /// What was done to it.
    pub fn change(&self) -> String {
        let Self { entry, before, added } = self;
        if entry == RESERVED_PORTS { format!("{added} added") } else { format!("{added} in place of {before}") }
    }

    /// How it was undone.
    pub fn undone(&self) -> String {
        let (name, Self { entry, before, added }) = (self.name(), self);
        if entry == RESERVED_PORTS {
            format!("took {added} out of {name} again")
        } else {
            format!("set {name} from {added} to {before} again")
        }
    }
}

/// The file: what was set, and in which network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    netns: u64,
    set: Vec<Set>,
}

/// The entries of this network namespace, and the file about them.
#[derive(Clone, Debug)]
pub struct Sysctls {
    root: PathBuf,
    record: RunFile<Record>,
    netns: u64,
}

impl Sysctls {
    /// Those of the agent with these pins.
    pub fn of(pins: &PinRoot) -> io::Result<Self> {
        Ok(Self { root: "/proc/sys".into(), record: RunFile::of(pins, "sysctls.json"), netns: sys::netns_inode()? })
    }

    fn read(&self, entry: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.root.join(entry))?.trim().to_owned())
    }

    /// The ports that the kernel gives to the node's sockets, and those among them that it keeps back.
    pub fn local_ports(&self) -> (Span, Ports) {
        let range = self.read(RANGE).ok().and_then(|text| parse_range(&text)).unwrap_or(DEFAULT_RANGE);
        let reserved = self.read(RESERVED_PORTS).ok().and_then(|text| Ports::parse(&text)).unwrap_or_default();
        (range, reserved)
    }

    /// The ports that masquerade may use. Too few and allowed to, it reserves some for it: then also what was set.
    pub fn source_ports(&self, node_ports: &Span, manage: bool) -> (SourcePorts, Option<io::Result<Set>>) {
        let (range, reserved) = self.local_ports();
        let free = SourcePorts::free(&range, &reserved, node_ports);
        if !manage || free.count() >= ENOUGH || reserved.holds(&RESERVED) {
            return (free, None);
        }
        let set = self.reserve(&reserved);
        let (range, reserved) = self.local_ports();
        (SourcePorts::free(&range, &reserved, node_ports), Some(set))
    }

    fn reserve(&self, held: &Ports) -> io::Result<Set> {
        let mut next = held.clone();
        next.set(&RESERVED, true);
        let set = Set { entry: RESERVED_PORTS.to_owned(), before: held.to_string(), added: span_text(&RESERVED) };
        self.put(&set, &next.to_string())?;
        Ok(set)
    }

    /// True if answers of the node's own addresses come in on `lo`.
    pub fn accepts_local(&self) -> bool {
        [ACCEPT_LOCAL, ACCEPT_LOCAL_ALL].iter().any(|entry| self.read(entry).is_ok_and(|value| value != "0"))
    }

    /// Lets them in. Returns what was set.
    pub fn accept_local(&self) -> io::Result<Set> {
        let set = Set { entry: ACCEPT_LOCAL.to_owned(), before: self.read(ACCEPT_LOCAL)?, added: "1".to_owned() };
        self.put(&set, "1")?;
        Ok(set)
    }

    /// Sets all that an agent would set. Returns what was not so already.
    pub fn prepare(&self) -> io::Result<Vec<Set>> {
        let mut done = Vec::new();
        if !self.accepts_local() {
            done.push(self.accept_local()?);
        }
        if let (_, Some(set)) = self.source_ports(&NODE_PORTS, true) {
            done.push(set?);
        }
        Ok(done)
    }

    fn put(&self, set: &Set, value: &str) -> io::Result<()> {
        // The file first: an agent that dies in between has set nothing that nobody knows of.
        let mut record = self.read_record()?.unwrap_or_default();
        if !record.set.iter().any(|known| known.entry == set.entry) {
            record.set.push(set.clone());
        }
        self.record.write(&Record { netns: self.netns, set: record.set })?;
        fs::write(self.root.join(&set.entry), value)
    }

    /// What was set and not restored yet.
    pub fn set(&self) -> io::Result<Vec<Set>> {
        Ok(self.read_record()?.map(|record| record.set).unwrap_or_default())
    }

    /// Takes back what was set; what others have set since stays. Returns it.
    pub fn restore(&self) -> io::Result<Vec<Set>> {
        let Some(record) = self.read_record()? else { return Ok(Vec::new()) };
        for set in &record.set {
            if set.entry != RESERVED_PORTS {
                if self.read(&set.entry)? == set.added {
                    fs::write(self.root.join(&set.entry), &set.before)?;
                }
                continue;
            }
            let (Some(before), Some(added)) = (Ports::parse(&set.before), parse_span(&set.added)) else {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!("{}: what was set is no list of ports", set.entry),
                ));
            };
            let mut ports = Ports::parse(&self.read(&set.entry)?).unwrap_or_default();
            ports.take_back(&added, &before);
            // An empty write would say nothing; a line of its own empties the list.
            fs::write(self.root.join(&set.entry), format!("{ports}\n"))?;
        }
        self.record.remove()?;
        Ok(record.set)
    }

    /// The file; what another network namespace's agent wrote is not for here.
    fn read_record(&self) -> io::Result<Option<Record>> {
        Ok(self.record.read()?.map(|(record, _)| record).filter(|record| record.netns == self.netns))
    }

    /// Where the file is.
    pub fn record(&self) -> &Path {
        self.record.path()
    }
}

/// Two numbers, as `ip_local_port_range` has them.
pub fn parse_range(text: &str) -> Option<Span> {
    let mut numbers = text.split_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

fn parse_span(text: &str) -> Option<Span> {
    let (first, last) = text.split_once('-')?;
    Some(first.parse().ok()?..=last.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files in place of /proc/sys.
    fn sysctls(dir: &Path, range: &str, reserved: &str) -> Sysctls {
        let sysctls = Sysctls { root: dir.join("proc"), record: RunFile::at(dir.join("run/sysctls.json")), netns: 7 };
        fs::create_dir_all(sysctls.root.join("net/ipv4")).unwrap();
        fs::write(sysctls.root.join(RANGE), range).unwrap();
        fs::write(sysctls.root.join(RESERVED_PORTS), reserved).unwrap();
        sysctls
    }

    #[test]
    fn a_range_is_two_numbers() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(parse_range("32768"), None);
    }

    #[test]
    fn enough_ports_are_left_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let sysctls = sysctls(dir.path(), "32768\t60999\n", "\n");
        let (ports, set) = sysctls.source_ports(&NODE_PORTS, true);
        assert_eq!((ports.to_string().as_str(), set.is_none()), ("1024-29999 and 61000-65535", true));
        assert!(!sysctls.record().exists());
    }

    #[test]
    fn too_few_are_made_enough_once_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let sysctls = sysctls(dir.path(), "1024\t65535\n", "8080\n");
        let (ports, set) = sysctls.source_ports(&NODE_PORTS, false);
        assert_eq!((ports.count(), set.is_none()), (0, true), "--manage-sysctls=false leaves all alone");
        let (ports, set) = sysctls.source_ports(&NODE_PORTS, true);
        assert_eq!((ports.to_string().as_str(), set.unwrap().unwrap().before.as_str()), ("61000-65535", "8080"));
        assert_eq!(sysctls.read(RESERVED_PORTS).unwrap(), "8080,61000-65535");
        assert!(sysctls.source_ports(&NODE_PORTS, true).1.is_none());
        // Somebody else adds one, and somebody takes ours away: what was there before is still known.
        fs::write(sysctls.root.join(RESERVED_PORTS), "9090,61000").unwrap();
        sysctls.source_ports(&NODE_PORTS, true).1.unwrap().unwrap();
        assert_eq!(sysctls.set().unwrap().len(), 1);
        assert_eq!(sysctls.restore().unwrap()[0].added, "61000-65535");
        assert_eq!(sysctls.read(RESERVED_PORTS).unwrap(), "9090");
        assert!(sysctls.restore().unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_set_is_told_and_what_is_free_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let sysctls = sysctls(dir.path(), "1024\t62000\n", "");
        fs::remove_file(sysctls.root.join(RESERVED_PORTS)).unwrap();
        fs::create_dir(sysctls.root.join(RESERVED_PORTS)).unwrap();
        let (ports, set) = sysctls.source_ports(&NODE_PORTS, true);
        assert_eq!(ports.to_string(), "62001-65535");
        set.unwrap().unwrap_err();
    }

    #[test]
    fn what_comes_from_the_nodes_own_addresses_is_let_in_and_shut_out_again() {
        let dir = tempfile::tempdir().unwrap();
        let sysctls = sysctls(dir.path(), "32768\t60999\n", "8080\n");
        let entry = sysctls.root.join(ACCEPT_LOCAL);
        assert!(!sysctls.accepts_local());
        sysctls.accept_local().unwrap_err();
        fs::create_dir_all(entry.parent().unwrap()).unwrap();
        fs::write(&entry, "0\n").unwrap();
        assert!(!sysctls.accepts_local());
        assert_eq!(sysctls.accept_local().unwrap().change(), "1 in place of 0");
        assert!(sysctls.accepts_local());
        assert_eq!(sysctls.set().unwrap()[0].name(), "net.ipv4.conf.lo.accept_local");
        sysctls.restore().unwrap();
        assert_eq!((sysctls.accepts_local(), fs::read_to_string(&entry).unwrap().as_str()), (false, "0"));
        // Who has set it since has a reason.
        sysctls.accept_local().unwrap();
        fs::write(&entry, "2\n").unwrap();
        sysctls.restore().unwrap();
        assert_eq!(fs::read_to_string(&entry).unwrap(), "2\n");
    }

    #[test]
    fn another_namespaces_record_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let here = sysctls(dir.path(), "1024\t65535\n", "");
        here.source_ports(&NODE_PORTS, true).1.unwrap().unwrap();
        let there = Sysctls { netns: 8, ..here.clone() };
        assert!(there.restore().unwrap().is_empty() && here.record().exists());
    }
}
