//! The image as `./x image` writes it: an OCI archive, read and unpacked as a container runtime does.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::netns;
use serde_json::Value;

/// Names the archive that pods are run from.
const VARIABLE: &str = "FAIRLEAD_IMAGE";

/// The archive to run pods from, where `FAIRLEAD_IMAGE` names one.
pub fn archive() -> Option<PathBuf> {
    env::var_os(VARIABLE).map(PathBuf::from)
}

/// Unpacks the image's files into `root`, which is made, and says what the image runs.
pub fn unpack(archive: &Path, root: &Path) -> Result<Vec<String>> {
    let layout = root.with_extension("layout");
    for dir in [&layout, root] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    untar(archive, &layout).with_context(|| format!("{VARIABLE} is {}", archive.display()))?;
    let index = read(&layout.join("index.json"))?;
    let manifest = read(&blob(&layout, &index["manifests"][0])?)?;
    let config = read(&blob(&layout, &manifest["config"])?)?;
    let runs_here = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    ensure!(config["architecture"] == runs_here && config["os"] == "linux", "an image for another machine: {config}");
    for layer in manifest["layers"].as_array().context("an image without layers")? {
        untar(&blob(&layout, layer)?, root)?;
    }
    fs::remove_dir_all(&layout).with_context(|| format!("cannot remove {}", layout.display()))?;
    let entrypoint =
        serde_json::from_value(config["config"]["Entrypoint"].clone()).context("the image's entrypoint")?;
    Ok(entrypoint)
}

/// The file that a descriptor names; its content must be what the digest says.
fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
    let digest = digest.with_context(|| format!("no digest in {descriptor}"))?;
    let path = layout.join("blobs/sha256").join(digest);
    let said = netns::run(Command::new("sha256sum").arg(&path))?;
    ensure!(said.starts_with(digest), "{} holds something else: {said}", path.display());
    let bytes = fs::metadata(&path)?.len();
    ensure!(descriptor["size"] == bytes, "{} has {bytes} bytes, the descriptor is {descriptor}", path.display());
    Ok(path)
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}

fn untar(archive: &Path, into: &Path) -> Result<()> {
    netns::run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(into)).map(drop)
}
