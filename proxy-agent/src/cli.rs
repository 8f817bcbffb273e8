//! The commands beside `run`, and the only module that prints to people.

use std::io::Write;
use std::process::ExitCode;

use crate::args::Command;

/// Prints an error in one line.
pub fn complain(message: &str) {
    // If standard error is closed there is nobody left to tell.
    _ = writeln!(std::io::stderr(), "fairlead: {message}");
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

/// Runs a command.
pub fn main(command: Command) -> ExitCode {
    let _ = command;
    ExitCode::FAILURE
}
