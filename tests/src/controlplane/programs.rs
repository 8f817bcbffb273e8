//! Where the programs of a control plane come from.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::build;

/// What a folder named by `KUBEBUILDER_ASSETS` must hold. Envtest's own has the first two.
pub(super) const NAMES: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-proxy"];

/// A folder with programs.
#[derive(Clone, Debug)]
pub(super) enum Programs {
    /// Our own builds; etcd and kube-apiserver are one program there.
    Built(PathBuf),
    /// The folder that `KUBEBUILDER_ASSETS` names.
    Assets(PathBuf),
}

impl Programs {
    /// Finds them, or builds them.
    pub(super) fn find() -> Result<Self> {
        match std::env::var_os("KUBEBUILDER_ASSETS") {
            Some(folder) => {
                let folder = PathBuf::from(folder);
                check(&folder)?;
                Ok(Self::Assets(folder))
            }
            None => build::programs(build::CONTROL_PLANE).map(Self::Built),
        }
    }

    /// The program of this name.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Built(folder) | Self::Assets(folder) => folder.join(name),
        }
    }
}

/// Fails where the folder lacks a program.
fn check(folder: &Path) -> Result<()> {
    let missing: Vec<_> = NAMES.into_iter().filter(|name| !folder.join(name).is_file()).collect();
    if !missing.is_empty() {
        bail!(
            "KUBEBUILDER_ASSETS is {}, which lacks {}: put there those of the same release, or unset the variable to \
             build all of them with Go",
            folder.display(),
            missing.join(" and ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_program_that_a_folder_lacks_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for name in &NAMES[..2] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let error = check(folder.path()).unwrap_err().to_string();
        assert!(error.contains("lacks kube-controller-manager and kube-proxy:"), "{error}");
        for name in &NAMES[2..] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        check(folder.path()).unwrap();
    }
}
