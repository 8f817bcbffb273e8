//! `deploy/` as a cluster gets it: rendered, and its pods run as a kubelet would have them run.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{Namespace, agent::find_binary, netns};
use k8s_openapi::api::core::v1::{Container, PodSpec, Volume};
use serde::Deserialize as _;
use serde_json::Value;

use crate::{controlplane::build, image};

/// Where a pod finds its ServiceAccount.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where the program lies that takes the image's place.
const PROGRAM: &str = "/fairlead";

/// The objects of a folder of `deploy`, as `kubectl apply -k` sends them.
pub fn render(folder: &str) -> Result<Vec<Value>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(folder);
    // envtest's folder brings kubectl along; else it is built from the package that kubectl calls.
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(|dir| PathBuf::from(dir).join("kubectl"));
    let mut command = match assets.filter(|kubectl| kubectl.is_file()) {
        Some(kubectl) => {
            let mut command = Command::new(kubectl);
            command.arg("kustomize");
            command
        }
        None => Command::new(build::KUSTOMIZE.program()?),
    };
    let text = netns::run(command.arg(&dir))?;
    let documents = text.split("\n---\n").map(serde_saphyr::from_str::<Value>);
    documents.collect::<Result<_, _>>().with_context(|| format!("what {} renders to", dir.display()))
}

/// What a kubelet knows of the node that a pod runs on.
#[derive(Debug)]
pub struct Kubelet {
    /// The node's name.
    pub node: String,
    /// The node's network namespace.
    pub netns: Namespace,
    /// A folder for what pods see.
    pub dir: PathBuf,
    /// What stands in place of `/sys/fs/bpf`: a folder on a BPF file system.
    pub bpf: PathBuf,
    /// Token and CA of the pod's ServiceAccount.
    pub account: Account,
    /// ConfigMaps by name.
    pub config_maps: BTreeMap<String, BTreeMap<String, String>>,
    /// The ClusterIP and port of Service `default/kubernetes`.
    pub kubernetes: (String, u16),
}

/// The credentials of a ServiceAccount.
#[derive(Clone, Debug)]
pub struct Account {
    /// Its token.
    pub token: String,
    /// The CA of the API server.
    pub ca: String,
    /// Its namespace.
    pub namespace: String,
}

impl Kubelet {
    /// The container of this name, ready to be started: with its image, arguments, environment, mounts and capabilities.
    pub fn container(&self, pod: &PodSpec, name: &str) -> Result<Command> {
        let mut containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
        let container = containers.find(|c| c.name == name).with_context(|| format!("no container {name}"))?;
        ensure!(pod.host_network == Some(true), "only pods of the node's network can be run here");
        let mut command = self.netns.command(pod_runner()?);
        let root = self.dir.join(format!("{name}-root"));
        command.arg(&root);
        let program = match image::archive() {
            Some(archive) => image::unpack(&archive, &root)?,
            None => {
                plain(&root)?;
                // The program of a test is linked against the libraries of this machine.
                command.args(["--mount-ro", "/usr:/usr"]);
                vec![PROGRAM.to_owned()]
            }
        };
        self.mounts(pod, container, &mut command)?;
        let env = self.env(pod, container)?;
        for (name, value) in &env {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        let security = container.security_context.clone().unwrap_or_default();
        ensure!(security.read_only_root_filesystem == Some(true), "the root of {name} is not read-only");
        if security.privileged == Some(true) {
            command.arg("--privileged");
        } else {
            let capabilities = security.capabilities.unwrap_or_default();
            ensure!(capabilities.drop == Some(vec!["ALL".to_owned()]), "{name} keeps capabilities that nobody named");
            ensure!(security.allow_privilege_escalation == Some(false), "{name} may get more rights");
            for capability in capabilities.add.iter().flatten() {
                command.args(["--cap", capability]);
            }
        }
        command.arg("--").args(program).args(container.args.iter().flatten().map(|arg| expand(arg, &env)));
        command.stdin(Stdio::null());
        Ok(command)
    }

    fn mounts(&self, pod: &PodSpec, container: &Container, command: &mut Command) -> Result<()> {
        for mount in container.volume_mounts.iter().flatten() {
            let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name);
            let volume = volume.with_context(|| format!("no volume {}", mount.name))?;
            let option = if mount.read_only == Some(true) { "--mount-ro" } else { "--mount" };
            command.arg(option).arg(format!("{}:{}", self.volume(volume)?.display(), mount.mount_path));
        }
        let Account { token, ca, namespace } = &self.account;
        let files = [("token", token), ("ca.crt", ca), ("namespace", namespace)];
        let account = self.files("account", files.map(|(name, text)| (name.to_owned(), text.clone())).into())?;
        command.arg("--mount-ro").arg(format!("{}:{SERVICE_ACCOUNT}", account.display()));
        Ok(())
    }

    fn volume(&self, volume: &Volume) -> Result<PathBuf> {
        match (&volume.host_path, &volume.config_map) {
            (Some(path), _) if path.path == "/sys/fs/bpf" => Ok(self.bpf.clone()),
            // A place of the test's own stands for it.
            (Some(path), _) if path.type_.as_deref() == Some("DirectoryOrCreate") => {
                self.files(&path.path.replace('/', "-"), BTreeMap::new())
            }
            (None, Some(map)) => {
                let name = &map.name;
                let data = self.config_maps.get(name).with_context(|| format!("no ConfigMap {name}"))?;
                self.files(name, data.clone())
            }
            _ => bail!("volume {} is of a kind that cannot be had here", volume.name),
        }
    }

    fn files(&self, name: &str, files: BTreeMap<String, String>) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        for (file, text) in files {
            fs::write(dir.join(&file), text).with_context(|| format!("cannot write {file}"))?;
        }
        Ok(dir)
    }

    /// The container's own variables come before those that the kubelet adds of Services.
    fn env(&self, pod: &PodSpec, container: &Container) -> Result<BTreeMap<String, String>> {
        let mut env = BTreeMap::from([
            ("KUBERNETES_SERVICE_HOST".to_owned(), self.kubernetes.0.clone()),
            ("KUBERNETES_SERVICE_PORT".to_owned(), self.kubernetes.1.to_string()),
        ]);
        ensure!(pod.service_account_name.is_some(), "the pod has no ServiceAccount of its own");
        for var in container.env.iter().flatten() {
            let from = var.value_from.clone().unwrap_or_default();
            let value = match (&var.value, from.field_ref, from.config_map_key_ref) {
                (Some(value), _, _) => value.clone(),
                (None, Some(field), _) if field.field_path == "spec.nodeName" => self.node.clone(),
                (None, None, Some(key)) => {
                    let value = self.config_maps.get(&key.name).and_then(|map| map.get(&key.key));
                    value.cloned().with_context(|| format!("no {} in ConfigMap {}", key.key, key.name))?
                }
                _ => bail!("variable {} comes from where nothing can be had here", var.name),
            };
            env.insert(var.name.clone(), value);
        }
        Ok(env)
    }
}

/// In place of the image's files: the program that was built for the tests.
fn plain(root: &Path) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
    for lib in ["lib", "lib64"] {
        let link = root.join(lib);
        if !link.is_symlink() {
            std::os::unix::fs::symlink(format!("usr/{lib}"), &link)?;
        }
    }
    let program = find_binary()?;
    let place = root.join(PROGRAM.trim_start_matches('/'));
    // By another process: what another thread starts meanwhile would hold the file open for writing, and it could not be run.
    netns::run(Command::new("cp").arg(&program).arg(&place)).map(drop)
}

/// `$(NAME)` of an argument.
fn expand(arg: &str, env: &BTreeMap<String, String>) -> String {
    env.iter().fold(arg.to_owned(), |arg, (name, value)| arg.replace(&format!("$({name})"), value))
}

fn pod_runner() -> Result<PathBuf> {
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/fairlead-pod");
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("fairlead-pod")));
    let found = beside.into_iter().chain([agent]).find(|path| path.is_file());
    found.context("fairlead-pod is not built: `cargo build -p fairlead-lab --bins`")
}

/// The pod of a DaemonSet.
pub fn pod_of(objects: &[Value]) -> Result<PodSpec> {
    let set = objects.iter().find(|object| object["kind"] == "DaemonSet").context("no DaemonSet")?;
    PodSpec::deserialize(&set["spec"]["template"]["spec"]).context("the DaemonSet's pod")
}
