//! Log set-up: `tracing` to standard error, constant messages with fields, as text or as JSON lines.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Shape of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line per event, for people
    Text,
    /// One JSON object per line, for collectors
    Json,
}

/// Parses a filter such as `info` or `info,proxy_agent::devices=debug`.
pub fn parse_filter(directives: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(directives)
}

/// Installs the log for the whole process.
///
/// # Errors
/// If a log was installed before.
pub fn init(filter: EnvFilter, format: LogFormat) -> Result<(), tracing_subscriber::util::TryInitError> {
    use tracing_subscriber::util::SubscriberInitExt;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_names_modules_and_levels() {
        assert!(parse_filter("info,proxy_agent::devices=debug").is_ok());
        let error = parse_filter("proxy_agent=loud").unwrap_err().to_string();
        assert!(error.contains("level"), "{error}");
    }
}
