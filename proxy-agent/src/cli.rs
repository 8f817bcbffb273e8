//! The commands beside `run`, and the only modules that print to people.

mod affinity;
mod check;
mod cleanup;
mod devices;
mod endpoints;
mod flows;
mod mount;
mod services;
mod table;

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;

use crate::args::{Command, Output, ShowArgs};
use crate::config::Invalid;
use crate::dataplane::bpf::{Access, BpfDataplane};
use crate::dataplane::pin::PinRoot;
use crate::dataplane::{Dataplane, Snapshot};
use table::Table;

/// Prints an error in one line.
pub fn complain(message: &str) {
    // If standard error is closed there is nobody left to tell.
    _ = writeln!(io::stderr(), "fairlead: {message}");
}

/// An error and its causes in one line. Many errors quote their cause; what is quoted is not said twice.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

/// Runs a command; the exit code says how it went.
pub fn main(command: Command) -> ExitCode {
    let result = match command {
        Command::Run(args) => return crate::run::main(*args),
        Command::Services(args) => services::main(&args),
        Command::Endpoints(args) => endpoints::main(&args),
        Command::Flows(args) => flows::main(&args),
        Command::Affinity(args) => affinity::main(&args),
        Command::Devices(args) => devices::main(&args),
        Command::Check(args) => check::main(args),
        Command::Mount(args) => mount::main(args),
        Command::Cleanup(args) => cleanup::main(args),
    };
    match result {
        Ok(code) => code,
        Err(error) if error.is::<Invalid>() => {
            complain(&error.to_string());
            ExitCode::from(2)
        }
        // `fairlead flows | head`
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Writes to standard output.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints rows as the user wants them.
fn show<R: Serialize + Row>(rows: &[R], output: Output) -> anyhow::Result<ExitCode> {
    match output {
        Output::Json | Output::Yaml => document(rows, output)?,
        Output::Table => print(&table(rows).to_string())?,
        Output::Wide => print(&wide(rows).to_string())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints rows for a script.
fn document<R: Serialize>(rows: &[R], output: Output) -> anyhow::Result<()> {
    match output {
        Output::Yaml => print(&yaml(rows)?),
        _ => print(&format!("{}\n", serde_json::to_string_pretty(rows)?)),
    }
}

/// One line for each value, however long.
fn yaml<R: Serialize>(rows: &[R]) -> anyhow::Result<String> {
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    Ok(serde_saphyr::to_string_with_options(&rows, options)?)
}

fn table<R: Row>(rows: &[R]) -> Table {
    let mut table = Table::new(R::HEADER);
    rows.iter().for_each(|row| table.row(row.cells()));
    table
}

fn wide<R: Row>(rows: &[R]) -> Table {
    let mut table = Table::new(&[R::HEADER, R::WIDE].concat());
    rows.iter().for_each(|row| table.row([row.cells(), row.wide()].concat()));
    table
}

/// Something with a line in a table.
trait Row {
    /// Column names.
    const HEADER: &'static [&'static str];
    /// Further ones where there is room.
    const WIDE: &'static [&'static str] = &[];
    /// As many cells.
    fn cells(&self) -> Vec<String>;
    /// As many further ones.
    fn wide(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The pins that a command is to look at.
fn pins(args: &ShowArgs) -> anyhow::Result<PinRoot> {
    let pins = PinRoot::new(args.pins.pin_path.clone())?;
    pins.require()?;
    Ok(pins)
}

/// Reads the maps.
fn snapshot(pins: &PinRoot) -> anyhow::Result<Snapshot> {
    Ok(BpfDataplane::open(pins, Access::Read)?.dump()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_read_as_what_was_written() {
        let words = [
            "",
            "no",
            "on",
            "y",
            "null",
            "~",
            "1",
            "0x1f",
            "1e3",
            "12:30:45",
            "2026-01-01",
            "::",
            "::1",
            "fd00::1",
            "a: b",
            "# no comment",
            "- item",
            "it's \"quoted\"",
            " before",
            "after ",
            "a\nb",
            "a\tb\\c",
            "%x",
            "@x",
            "*",
            "&x",
            "!x",
            "[1]",
            "{}",
            "|",
            ">",
            "\u{e9}\u{1f980}",
            "10.0.0.1",
            "*:80/TCP",
        ];
        let long = "a reason of many words, ".repeat(9);
        let rows = serde_json::json!([
            {"name": "eth0", "ifindex": 2, "pods": false, "none": null, "conflicts": [], "words": words.as_slice(), "long": long},
            {"name": "eth1", "nested": [{"id": u64::MAX, "own": true}, {"id": 0, "own": false}], "empty": {}},
        ]);
        let text = yaml(rows.as_array().unwrap()).unwrap();
        assert_eq!(serde_saphyr::from_str::<serde_json::Value>(&text).unwrap(), rows, "{text}");
        assert!(
            text.starts_with("- ") && text.contains("\n  nested:\n  - id: 18446744073709551615\n    own: true\n"),
            "{text}"
        );
        for word in ["no", "on", "y", "null", "1", "12:30:45", "2026-01-01"] {
            assert!(!text.contains(&format!("- {word}\n")), "{word} is another type to some readers:\n{text}");
        }
        assert_eq!(yaml::<u8>(&[]).unwrap(), "[]\n");
    }

    #[test]
    fn a_cause_that_is_quoted_is_said_once() {
        let cause = io::Error::other("no room");
        let quoted = anyhow::Error::new(cause).context("cannot write: no room").context("the sweep failed");
        assert_eq!(chain(&quoted), "the sweep failed: cannot write: no room");
        let unquoted = anyhow::Error::new(io::Error::other("no room")).context("cannot write");
        assert_eq!(chain(&unquoted), "cannot write: no room");
    }
}
