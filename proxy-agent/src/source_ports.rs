//! Which source ports masqueraded connections may take: none that the kernel gives to the node's own sockets, and no
//! NodePort. Pure.

use std::fmt;
use std::ops::RangeInclusive;

/// Ports, from the first to the last.
pub type Span = RangeInclusive<u16>;

/// Below stand services with names of their own.
const FIRST: u16 = 1_024;

/// As many as masquerade should have.
pub const ENOUGH: u32 = 4_096;

/// What is taken from the node's own range where that leaves too few.
pub const RESERVED: Span = 61_000..=65_535;
/// The range that the API server allocates NodePorts from by default.
pub const NODE_PORTS: Span = 30_000..=32_767;

/// Ports in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// The first.
    pub first: u16,
    /// How many.
    pub count: u16,
}

/// The two longest rows of ports that are free, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourcePorts {
    /// The first.
    pub low: Row,
    /// The second; empty if there is only one.
    pub high: Row,
}

impl SourcePorts {
    /// What is left of all ports. `local` is `net.ipv4.ip_local_port_range`, `reserved` are the ports in it that the kernel
    /// does not give out; of these only [`RESERVED`] is used, because others are some program's.
    pub fn free(local: &Span, reserved: &Ports, node_ports: &Span) -> Self {
        let ours = reserved.holds(&RESERVED);
        let kernels = |port: u16| local.contains(&port) && !(ours && RESERVED.contains(&port));
        let mut rows: Vec<Row> = Vec::new();
        let mut last = None;
        for port in (FIRST..=u16::MAX).filter(|port| !kernels(*port) && !node_ports.contains(port)) {
            match rows.last_mut().filter(|_| last == port.checked_sub(1)) {
                Some(row) => row.count += 1,
                None => rows.push(Row { first: port, count: 1 }),
            }
            last = Some(port);
        }
        rows.sort_by_key(|row| std::cmp::Reverse(row.count));
        rows.truncate(2);
        rows.sort_by_key(|row| row.first);
        let mut rows = rows.into_iter();
        Self { low: rows.next().unwrap_or_default(), high: rows.next().unwrap_or_default() }
    }

    /// How many.
    pub const fn count(&self) -> u32 {
        self.low.count as u32 + self.high.count as u32
    }
}

impl fmt::Display for SourcePorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [self.low, self.high].into_iter().filter(|row| row.count != 0);
        let rows: Vec<_> = rows.map(|row| span_text(&(row.first..=row.first + (row.count - 1)))).collect();
        f.write_str(if rows.is_empty() { "none" } else { "" })?;
        f.write_str(&rows.join(" and "))
    }
}

/// A set of ports, as `net.ipv4.ip_local_reserved_ports` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Box<[bool]>);

impl Default for Ports {
    fn default() -> Self {
        Self(vec![false; usize::from(u16::MAX) + 1].into())
    }
}

impl Ports {
    /// Reads `8080,9148-9150`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut ports = Self::default();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            ports.set(&(first.trim().parse().ok()?..=last.trim().parse().ok()?), true);
        }
        Some(ports)
    }

    /// True if all of these are in it.
    pub fn holds(&self, span: &Span) -> bool {
        self.0[indices(span)].iter().all(|held| *held)
    }

    /// Adds or removes ports.
    pub fn set(&mut self, span: &Span, held: bool) {
        self.0[indices(span)].fill(held);
    }

    /// What `added` brought to it goes again, unless it was in `before`.
    pub fn take_back(&mut self, added: &Span, before: &Self) {
        for at in indices(added) {
            self.0[at] &= before.0[at];
        }
    }
}

fn indices(span: &Span) -> RangeInclusive<usize> {
    usize::from(*span.start())..=usize::from(*span.end())
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<Span> = Vec::new();
        for port in (0..=u16::MAX).filter(|port| self.0[usize::from(*port)]) {
            match rows.last_mut().filter(|row| Some(*row.end()) == port.checked_sub(1)) {
                Some(row) => *row = *row.start()..=port,
                None => rows.push(port..=port),
            }
        }
        f.write_str(&rows.iter().map(span_text).collect::<Vec<_>>().join(","))
    }
}

/// `61000-65535`, or one number.
pub fn span_text(span: &Span) -> String {
    if span.start() == span.end() { span.start().to_string() } else { format!("{}-{}", span.start(), span.end()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(local: Span, reserved: &str, node_ports: Span) -> String {
        SourcePorts::free(&local, &Ports::parse(reserved).unwrap(), &node_ports).to_string()
    }

    #[test]
    fn what_neither_the_kernel_nor_nodeports_take_is_free() {
        assert_eq!(free(32_768..=60_999, "", 30_000..=32_767), "1024-29999 and 61000-65535");
        assert_eq!(free(1_024..=65_535, "", 30_000..=32_767), "none");
        assert_eq!(free(1_024..=65_535, "8080,61000-65535", 30_000..=32_767), "61000-65535");
        assert_eq!(free(1_024..=65_535, "8000-9000", 30_000..=32_767), "none", "somebody else's");
        assert_eq!(free(1_024..=65_535, "60000-62000,62001-65535", 30_000..=32_767), "61000-65535", "in two parts");
        assert_eq!(free(32_768..=65_535, "", 30_000..=32_767), "1024-29999");
        assert_eq!(
            free(10_000..=20_000, "", 30_000..=32_767),
            "20001-29999 and 32768-65535",
            "the longest two of three"
        );
        assert_eq!(free(1_024..=65_534, "", 30_000..=32_767), "65535");
        assert_eq!(free(40_000..=40_000, "", 1_024..=39_999), "40001-65535");
    }

    #[test]
    fn they_are_counted_to_the_last() {
        let all = SourcePorts::free(&(0..=0), &Ports::default(), &(0..=0));
        assert_eq!((all.low, all.high, all.count()), (Row { first: 1_024, count: 64_512 }, Row::default(), 64_512));
    }

    #[test]
    fn a_list_of_ports_reads_as_it_is_written() {
        for text in ["", "8080", "8080,9148-9150", "0,65535", "61000-65535"] {
            assert_eq!(Ports::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Ports::parse("9149,9148,9150\n").unwrap().to_string(), "9148-9150");
        assert_eq!(Ports::parse("8080-x"), None);
        assert_eq!(Ports::parse("70000"), None);
    }

    #[test]
    fn what_was_added_goes_and_what_was_there_before_stays() {
        let before = Ports::parse("8080,61005").unwrap();
        let mut now = before.clone();
        now.set(&RESERVED, true);
        now.set(&(9_000..=9_001), true);
        assert_eq!(now.to_string(), "8080,9000-9001,61000-65535");
        now.take_back(&RESERVED, &before);
        assert_eq!(now.to_string(), "8080,9000-9001,61005", "and what others added meanwhile");
    }
}
