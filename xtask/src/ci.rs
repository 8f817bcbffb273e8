//! `ci`: all checks in one run, with one closing line.

use anyhow::Result;

use crate::{lint, setup, test};

pub(crate) fn run() -> Result<()> {
    setup::run(&setup::Args::for_ci())?;
    // A style error must not hide what the tests would say.
    let lint = lint::run(lint::Args::default());
    if let Err(error) = &lint {
        eprintln!("x: lint: {error:#}");
    }
    test::run(&test::Args::for_ci())?;
    lint
}
