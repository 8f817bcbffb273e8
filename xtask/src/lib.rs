//! Everything that is done to this repository: cargo xtask --help.
