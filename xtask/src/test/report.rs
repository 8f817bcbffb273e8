//! The table of tiers, and the closing line that CI reads.

use std::collections::BTreeSet;
use std::time::Duration;

use super::libtest::{Case, Counts};
use super::tier::Tier;

/// Failed tests that the report names, of each tier.
const MOST_NAMES: usize = 20;

/// Characters of a reason that the report shows.
const LONGEST_REASON: usize = 300;

/// How a tier ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Passed,
    Failed,
    /// It cannot run here.
    NotRun,
    /// It cannot run here, but had to.
    Required,
}

/// One line of the table.
pub(super) struct Row {
    pub(super) tier: Tier,
    pub(super) status: Status,
    pub(super) counts: Counts,
    pub(super) elapsed: Duration,
    /// Why it did not run, or what failed.
    pub(super) notes: Vec<String>,
}

impl Row {
    /// A tier that cannot run here counts as one skipped; one that had to run, as one failed.
    pub(super) fn not_run(tier: Tier, reason: String, required: bool) -> Self {
        println!("\n=== {} === not run: {reason}", tier.name());
        let (status, counts) = if required {
            (Status::Required, Counts { failed: 1, ..Counts::default() })
        } else {
            (Status::NotRun, Counts { skipped: 1, ..Counts::default() })
        };
        Self { tier, status, counts, elapsed: Duration::ZERO, notes: vec![reason] }
    }

    pub(super) fn failed(&self) -> bool {
        matches!(self.status, Status::Failed | Status::Required)
    }
}

/// Each case that a kernel could not run has passed on another one, or it has failed: else nobody sees that it runs nowhere.
/// A case of the same name in another program says nothing of it.
pub(super) fn nobody_ran(rows: &mut [Row]) {
    let passed: BTreeSet<Case> = rows.iter().flat_map(|row| row.counts.ran.iter().cloned()).collect();
    for row in rows {
        let counts = &mut row.counts;
        for (Case { program, name }, why) in &counts.not_run {
            // Behind a kernel's name, where it is that of another one.
            let bare = name.rsplit_once(' ').map_or(&**name, |(_, bare)| bare);
            if !passed.contains(&Case { program, name: bare.to_owned() }) {
                counts.skipped = counts.skipped.saturating_sub(1);
                counts.failed += 1;
                counts.failures.push(name.clone());
                counts.reasons.push((name.clone(), format!("nobody has run it: {why}")));
                row.status = Status::Failed;
            }
        }
    }
}

pub(super) fn print(rows: &[Row]) {
    print!("{}", render(rows));
}

fn render(rows: &[Row]) -> String {
    let mut total = Counts::default();
    let mut out = format!(
        "\n{:<11} {:<18} {:>7} {:>7} {:>8} {:>8}\n",
        "tier", "status", "passed", "failed", "skipped", "seconds"
    );
    for row in rows {
        total.add(&row.counts);
        let status = match row.status {
            Status::Passed => "passed",
            Status::Failed => "FAILED",
            Status::NotRun => "not run",
            Status::Required => "REQUIRED, NOT RUN",
        };
        let Counts { passed, failed, skipped, .. } = row.counts;
        let seconds = row.elapsed.as_secs_f64();
        let name = row.tier.name();
        out.push_str(&format!("{name:<11} {status:<18} {passed:>7} {failed:>7} {skipped:>8} {seconds:>8.1}\n"));
    }
    for row in rows {
        for line in &row.notes {
            out.push_str(&format!("{}: {line}\n", row.tier.name()));
        }
        for (Case { name, .. }, why) in &row.counts.not_run {
            out.push_str(&format!("{}: {name} not run here: {why}\n", row.tier.name()));
        }
        for name in row.counts.failures.iter().take(MOST_NAMES) {
            let reason: String = row.counts.reason(name).unwrap_or_default().chars().take(LONGEST_REASON).collect();
            let reason = if reason.is_empty() { reason } else { format!(": {reason}") };
            out.push_str(&format!("{}: {name}{reason}\n", row.tier.name()));
        }
        if let Some(more) = row.counts.failures.len().checked_sub(MOST_NAMES).filter(|more| *more > 0) {
            out.push_str(&format!("{}: and {more} more, named above\n", row.tier.name()));
        }
    }
    out + &format!("\n{} passed, {} failed, {} skipped\n", total.passed, total.failed, total.skipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tier: Tier, status: Status, passed: u32, failed: u32) -> Row {
        let failures = (0..failed).map(|n| format!("case_{n}")).collect();
        let counts = Counts { passed, failed, failures, ..Counts::default() };
        Row { tier, status, counts, elapsed: Duration::from_millis(1500), notes: Vec::new() }
    }

    #[test]
    fn the_last_line_is_the_sum_of_the_table() {
        let rows = [
            row(Tier::Unit, Status::Passed, 10, 0),
            row(Tier::Packet, Status::Failed, 4, 2),
            Row::not_run(Tier::Kernels, "no qemu".into(), false),
        ];
        let text = render(&rows);
        assert_eq!(text.lines().last(), Some("14 passed, 2 failed, 1 skipped"));
        assert!(text.contains("packet: case_1"), "{text}");
        assert!(text.contains("kernels: no qemu"), "{text}");
    }

    #[test]
    fn a_failure_is_named_with_its_reason() {
        let mut failed = row(Tier::Netns, Status::Failed, 0, 2);
        failed.counts.reasons.push(("case_1".to_owned(), "nobody answered".to_owned()));
        let text = render(&[failed]);
        assert!(text.contains("netns: case_0\nnetns: case_1: nobody answered\n"), "{text}");
    }

    #[test]
    fn a_long_list_of_failures_is_cut_and_counted() {
        let text = render(&[row(Tier::Netns, Status::Failed, 0, 23)]);
        assert!(text.contains("netns: case_19\nnetns: and 3 more, named above\n"), "{text}");
        assert!(!text.contains("case_20"), "{text}");
    }

    #[test]
    fn what_no_kernel_could_run_has_failed() {
        let case = |program, name: &str| Case { program, name: name.to_owned() };
        let lacks = |name: &str| (case("netns", name), "needs a bond".to_owned());
        let mut rows = [row(Tier::Netns, Status::Passed, 3, 0), row(Tier::Kernels, Status::Passed, 2, 0)];
        rows[0].counts.ran = vec![case("netns", "tcx")];
        rows[0].counts.not_run = ["wires::a", "wires::b"].map(lacks).into();
        rows[0].counts.skipped = 2;
        rows[1].counts.ran = vec![case("netns", "wires::a")];
        rows[1].counts.not_run = ["6.1 tcx", "6.1 wires::b"].map(lacks).into();
        rows[1].counts.skipped = 2;
        nobody_ran(&mut rows);
        assert!(rows.iter().all(|row| row.failed() && (row.counts.failed, row.counts.skipped) == (1, 1)));
        let text = render(&rows);
        assert!(text.contains("netns: wires::b: nobody has run it: needs a bond\n"), "{text}");
        assert!(!text.contains("netns: wires::a: nobody") && !text.contains("6.1 tcx: nobody"), "{text}");
    }

    #[test]
    fn a_case_of_the_same_name_in_another_program_is_another_one() {
        let says = |program, tier, lines: &[&str]| {
            let mut row = row(tier, Status::Passed, 0, 0);
            row.counts.program = program;
            lines.iter().for_each(|line| row.counts.read(line));
            row
        };
        let ok = "test masquerade::a ... ok";
        let mut rows = [
            says("packets", Tier::Packet, &[ok]),
            says("netns", Tier::Netns, &["not run here: masquerade::a: needs a bond", ok]),
            says("matrix", Tier::Matrix, &[ok]),
        ];
        nobody_ran(&mut rows);
        assert_eq!(rows.each_ref().map(Row::failed), [false, true, false]);
    }

    #[test]
    fn a_required_tier_that_cannot_run_has_failed() {
        let row = Row::not_run(Tier::Netns, "needs root".into(), true);
        assert!(row.failed());
        assert!(render(&[row]).contains("0 passed, 1 failed, 0 skipped"));
    }

    #[test]
    fn a_tier_that_may_be_left_out_has_not_failed() {
        assert!(!Row::not_run(Tier::Netns, "needs root".into(), false).failed());
    }
}
