//! Real plugins of the Container Network Interface, as a container runtime calls them for a pod.
//!
//! They are the Go module in `tests/cni`, built once per state of its sources.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Namespace, Pod};
use serde_json::{Value, json};

use crate::controlplane::build;

/// The folder with the plugins, built if need be.
pub fn plugins() -> Result<PathBuf> {
    build::programs(build::CNI)
}

/// A chain of plugins, as a file of `/etc/cni/net.d` has it.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// Configurations, the one that makes the device first.
    pub plugins: Vec<Value>,
}

impl Chain {
    /// Adds the pod to the network of a node, with this host port for the port of its server, and returns the name of the
    /// node's device for it. The pod's addresses are those that it has in the lab.
    pub fn add(&self, node: &Namespace, pod: &Pod, host_port: u16, port: u16) -> Result<String> {
        let folder = plugins()?;
        let mut result: Option<Value> = None;
        for plugin in &self.plugins {
            let mut config = plugin.clone();
            config["cniVersion"] = json!("1.0.0");
            config["name"] = json!(self.name);
            config["args"] = json!({"cni": {"ips": [pod.v4, pod.v6]}});
            if config["capabilities"]["portMappings"] == true {
                let of = |protocol: &str| json!({"hostPort": host_port, "containerPort": port, "protocol": protocol});
                config["runtimeConfig"] = json!({"portMappings": [of("tcp"), of("udp")]});
            }
            if let Some(previous) = &result {
                config["prevResult"] = previous.clone();
            }
            result = Some(call(&folder, node, pod, &config)?);
        }
        let result = result.context("a chain without plugins")?;
        let interfaces = result["interfaces"].as_array().context("no interfaces in the result")?;
        // The node's end of the veth is the one that is in no sandbox and no bridge.
        let bridge = self.plugins[0]["bridge"].as_str();
        let own = interfaces
            .iter()
            .find(|one| one["sandbox"].as_str().is_none_or(str::is_empty) && one["name"].as_str() != bridge);
        let name = own.and_then(|one| one["name"].as_str());
        name.map(str::to_owned).with_context(|| format!("no device of the node in {result}"))
    }
}

/// Calls one plugin with ADD.
fn call(folder: &Path, node: &Namespace, pod: &Pod, config: &Value) -> Result<Value> {
    let kind = config["type"].as_str().context("a plugin without a type")?;
    let mut command = node.command(folder.join(kind));
    command
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", pod.ns.name())
        .env("CNI_NETNS", pod.ns.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run plugin {kind}"))?;
    let mut stdin = child.stdin.take().context("the plugin has no standard input")?;
    // A plugin that ends early says why below.
    stdin.write_all(config.to_string().as_bytes()).ok();
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("waiting for plugin {kind}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "plugin {kind} failed for {}: {said}{complaint}\nwith {config}", pod.name);
    serde_json::from_str(&said).with_context(|| format!("plugin {kind} said {said:?}"))
}
