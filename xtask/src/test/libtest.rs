//! What Rust's test programs print, counted.

/// A test and the program that it stands in: several programs have cases of the same name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Case {
    pub(super) program: &'static str,
    pub(super) name: String,
}

/// Numbers of tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// The program that prints now, where tests may be of one name.
    pub(super) program: &'static str,
    pub(super) passed: u32,
    pub(super) failed: u32,
    pub(super) skipped: u32,
    /// Names of those that failed.
    pub(super) failures: Vec<String>,
    /// The first words of each panic, behind the name of the test whose thread it was.
    pub(super) reasons: Vec<(String, String)>,
    /// The panic whose message is in the next line.
    pub(super) panicked: Option<String>,
    /// Those that passed.
    pub(super) ran: Vec<Case>,
    /// One whose line something else has broken: its result stands on a line of its own.
    pub(super) broken: Option<String>,
    /// Those that found that this kernel cannot run them, and why. libtest takes them for passed.
    pub(super) not_run: Vec<(Case, String)>,
    /// Those of them that no summary has counted yet.
    pub(super) uncounted: u32,
}

/// Begins the line of a test that cannot run on this kernel.
const NOT_RUN: &str = "not run here: ";

impl Counts {
    /// Takes one line of output into account.
    pub(super) fn read(&mut self, line: &str) {
        if let Some(name) = self.panicked.take() {
            self.reasons.push((name, line.to_owned()));
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            let not_run = std::mem::take(&mut self.uncounted);
            self.passed += number_before(result, "passed").saturating_sub(not_run);
            self.failed += number_before(result, "failed");
            self.skipped += number_before(result, "ignored") + not_run;
        } else if let Some((name, why)) = line.strip_prefix(NOT_RUN).and_then(|rest| rest.split_once(": ")) {
            self.not_run.push((self.case(name.to_owned()), why.to_owned()));
            self.uncounted += 1;
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        } else if let Some((name, rest)) = line.strip_prefix("thread '").and_then(|rest| rest.split_once('\'')) {
            self.panicked = rest.contains(" panicked at ").then(|| name.to_owned());
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... ok")) {
            // Side by side, tests say it on lines of their own.
            self.passed_by(name.to_owned());
        } else if let Some((name, rest)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            self.broken = Some(name.to_owned()).filter(|_| !rest.starts_with("ignored"));
        } else if line == "ok"
            && let Some(name) = self.broken.take()
        {
            self.passed_by(name);
        }
    }

    const fn case(&self, name: String) -> Case {
        Case { program: self.program, name }
    }

    fn passed_by(&mut self, name: String) {
        let case = self.case(name);
        if !self.not_run.iter().any(|(other, _)| *other == case) {
            self.ran.push(case);
        }
    }

    /// Names of those that passed.
    pub(super) fn names(&self) -> Vec<&str> {
        self.ran.iter().map(|case| &*case.name).collect()
    }

    /// Why the test of this name failed first.
    pub(super) fn reason(&self, failure: &str) -> Option<&str> {
        self.reasons.iter().find(|(name, _)| name == failure).map(|(_, reason)| reason.as_str())
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// The number in front of a word: "ok. 5 passed; 0 failed".
fn number_before(result: &str, word: &str) -> u32 {
    let mut words = result.split([' ', ';']).filter(|part| !part.is_empty());
    let mut last = "";
    words
        .find_map(|part| {
            if part == word {
                Some(last.parse().unwrap_or(0))
            } else {
                last = part;
                None
            }
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_add_up() {
        let mut counts = Counts::default();
        counts.read("test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s");
        counts
            .read("test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        assert_eq!((counts.passed, counts.failed, counts.skipped), (17, 3, 1));
    }

    #[test]
    fn tests_are_named() {
        let mut counts = Counts::default();
        counts.read("test step::flow::rule_7 ... FAILED");
        counts.read("test step::flow::rule_8 ... ok");
        assert_eq!(counts.failures, ["step::flow::rule_7"]);
        assert_eq!(counts.names(), ["step::flow::rule_8"]);
    }

    #[test]
    fn what_a_test_writes_between_its_name_and_its_result_hides_neither() {
        let mut counts = Counts::default();
        for line in ["ok", "test a ... warning: something", "more", "ok", "ok", "test b ... ignored", "test c ... ok"] {
            counts.read(line);
        }
        assert_eq!(counts.names(), ["a", "c"]);
    }

    #[test]
    fn what_this_kernel_cannot_run_has_not_passed() {
        let mut counts = Counts::default();
        for line in ["test wires::a ... ", "not run here: wires::a: needs a bond", "ok", "test wires::b ... ok"] {
            counts.read(line);
        }
        // As several threads write it.
        for line in ["", "not run here: wires::c: needs netkit", "test wires::d ... ok", "test wires::c ... ok"] {
            counts.read(line);
        }
        counts.read("test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        assert_eq!((counts.passed, counts.skipped), (2, 2));
        let [first, second] = [("wires::a", "needs a bond"), ("wires::c", "needs netkit")];
        let case = |name: &str| Case { program: "", name: name.to_owned() };
        assert_eq!(counts.not_run, [first, second].map(|(name, why)| (case(name), why.to_owned())));
        assert_eq!(counts.names(), ["wires::b", "wires::d"]);
    }

    #[test]
    fn the_first_words_of_a_failed_test_are_kept() {
        let mut counts = Counts::default();
        counts.read("test chaos::named ... FAILED");
        counts.read("thread 'chaos::named' (4711) panicked at tests/chaos.rs:52:9:");
        counts.read("half an event: nobody answered");
        counts.read("thread 'chaos::named' (4711) panicked at tests/chaos.rs:60:5:");
        counts.read("[\"half an event\"]");
        counts.read("thread '<unnamed>' panicked at tests/other.rs:1:1:");
        counts.read("something else");
        assert_eq!(counts.reason("chaos::named"), Some("half an event: nobody answered"));
        assert_eq!(counts.reason("chaos"), None);
    }

    #[test]
    fn other_output_counts_nothing() {
        let mut counts = Counts::default();
        counts.read("running 5 tests");
        counts.read("7 passed, 1 failed");
        assert_eq!(counts, Counts::default());
    }
}
