//! What the lists of `fairlead` say, as scripts read them.

use anyhow::{Context as _, Result};
use fairlead_lab::Agent;
use serde_json::Value;

/// The rows of `fairlead services`, `endpoints`, `affinity` or `devices`.
pub fn rows(agent: &Agent, what: &str) -> Result<Vec<Value>> {
    let text = agent.fairlead(&[what, "--output", "json"])?;
    serde_json::from_str(&text).with_context(|| format!("no array of rows: {text}"))
}

/// The row of a device.
pub fn device(agent: &Agent, name: &str) -> Result<Option<Value>> {
    Ok(rows(agent, "devices")?.into_iter().find(|row| row["name"] == name))
}
