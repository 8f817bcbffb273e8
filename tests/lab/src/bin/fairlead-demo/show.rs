//! Terminal output: plain lines, with a little colour where a person is looking.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
};

/// Where the demo writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Screen {
    colours: bool,
}

const BOLD: &str = "1";
const DIM: &str = "2";
const GREEN: &str = "32";
const RED: &str = "31";
const CYAN: &str = "36";

impl Screen {
    /// Standard output; coloured if it is a terminal and `NO_COLOR` is not set.
    pub(crate) fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        Self { colours }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn line(self, text: &str) {
        let mut out = std::io::stdout().lock();
        // A reader that went away (`| head`) is no failure of the demo.
        writeln!(out, "{text}").and_then(|()| out.flush()).ok();
    }

    /// The first line.
    pub(crate) fn title(self, text: &str) {
        self.line(&self.paint(BOLD, text));
    }

    /// A step begins.
    pub(crate) fn step(self, text: &str) {
        self.line(&format!("\n{} {}", self.paint(CYAN, "==>"), self.paint(BOLD, text)));
    }

    /// Something that was seen.
    pub(crate) fn saw(self, text: &str) {
        self.line(&format!("    {text}"));
    }

    /// Background, not result.
    pub(crate) fn note(self, text: &str) {
        for line in text.lines() {
            self.line(&format!("    {}", self.paint(DIM, line)));
        }
    }

    /// A result that is as it should be.
    pub(crate) fn passed(self, text: &str) {
        self.line(&format!("    {} {text}", self.paint(GREEN, "ok")));
    }

    /// A result that is not.
    pub(crate) fn failed(self, text: &str) {
        self.line(&format!("    {} {text}", self.paint(RED, "FAILED")));
    }

    /// Who answered how often, as bars.
    pub(crate) fn shares(self, counts: &BTreeMap<String, usize>) {
        let total = counts.values().sum::<usize>().max(1);
        for (name, count) in counts {
            let bar = "#".repeat((count * 40).div_ceil(total));
            self.line(&format!("      {name:<8}{count:>6}  {}", self.paint(GREEN, &bar)));
        }
    }
}
