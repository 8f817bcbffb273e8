//! Runs a `kube-apiserver` and an `etcd` that are already there (the folder that `KUBEBUILDER_ASSETS` names).

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use fairlead_lab::Namespace;
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use super::{ETCD_PORT, READY_WITHIN, SERVER, SERVICE_CIDRS, spawn};

/// One line for each request: who, what, and how it was answered.
const AUDIT_POLICY: &str =
    "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n";

/// Fails where the folder lacks a program.
pub(super) fn check(folder: &Path) -> Result<()> {
    for name in ["etcd", "kube-apiserver"] {
        let path = folder.join(name);
        if !path.is_file() {
            bail!(
                "KUBEBUILDER_ASSETS is {}, and {} is missing: put it there, or unset the variable to build with Go",
                folder.display(),
                path.display()
            );
        }
    }
    Ok(())
}

/// Starts both and returns once the API server's certificate is there and its kubeconfigs are written.
pub(super) fn start(
    folder: &Path,
    netns: &Namespace,
    dir: &Path,
    audit: Option<&Path>,
    log: impl Fn() -> Result<File>,
) -> Result<Vec<Child>> {
    let tokens = Tokens::load(&dir.join("tokens.csv"))?;
    let certs = dir.join("certs");
    let etcd_url = format!("http://127.0.0.1:{ETCD_PORT}");
    let mut etcd = netns.command(folder.join("etcd"));
    etcd.arg(format!("--data-dir={}", dir.join("etcd").display()))
        .arg(format!("--listen-client-urls={etcd_url}"))
        .arg(format!("--advertise-client-urls={etcd_url}"))
        .args(["--listen-peer-urls=http://127.0.0.1:0", "--log-level=warn", "--unsafe-no-fsync"]);

    let key = certs.join("apiserver.key");
    let mut server = netns.command(folder.join("kube-apiserver"));
    server
        .arg(format!("--etcd-servers={etcd_url}"))
        .arg(format!("--bind-address={}", SERVER.ip()))
        .arg(format!("--advertise-address={}", SERVER.ip()))
        .arg(format!("--secure-port={}", SERVER.port()))
        .arg(format!("--cert-dir={}", certs.display()))
        .arg(format!("--service-cluster-ip-range={SERVICE_CIDRS}"))
        .arg(format!("--token-auth-file={}", tokens.path))
        .arg(format!("--service-account-key-file={}", key.display()))
        .arg(format!("--service-account-signing-key-file={}", key.display()))
        .args([
            "--authorization-mode=RBAC",
            // As kubeadm and every distribution has it: proxies and CNIs are privileged.
            "--allow-privileged=true",
            "--service-account-issuer=https://kubernetes.default.svc",
            // No controller makes the default ServiceAccounts that this plugin would wait for.
            "--disable-admission-plugins=ServiceAccount",
            // The API forbids loopback addresses in the endpoints of the Service "kubernetes".
            "--endpoint-reconciler-type=none",
            // Also how long a stop waits for watches that nobody ends.
            "--request-timeout=5s",
        ]);
    if let Some(audit) = audit {
        let policy = dir.join("audit-policy.yaml");
        fs::write(&policy, AUDIT_POLICY).with_context(|| format!("cannot write {}", policy.display()))?;
        server.arg(format!("--audit-policy-file={}", policy.display()));
        server.arg(format!("--audit-log-path={}", audit.display()));
    }

    let mut processes = Vec::new();
    for command in [&mut etcd, &mut server] {
        command.stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        // Our own program asks for this itself.
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
        unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGTERM).map_err(Into::into)) };
        processes.push(spawn(command)?);
    }
    wait_for(&certs.join("apiserver.crt"))?;
    tokens.write_kubeconfig(&dir.join("admin.kubeconfig"), &certs, &tokens.admin)?;
    tokens.write_kubeconfig(&dir.join("proxy.kubeconfig"), &certs, &tokens.proxy)?;
    Ok(processes)
}

fn wait_for(path: &Path) -> Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    while !path.exists() {
        if Instant::now() > deadline {
            bail!("kube-apiserver did not write {} within {READY_WITHIN:?}", path.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The same identities as those of the Go program.
struct Tokens {
    path: String,
    admin: String,
    proxy: String,
}

impl Tokens {
    fn load(path: &Path) -> Result<Self> {
        if !path.exists() {
            let text = format!(
                "{},admin,admin,system:masters\n{},system:kube-proxy,system:kube-proxy\n",
                random_token()?,
                random_token()?
            );
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut tokens = text.lines().filter_map(|line| line.split(',').next()).map(str::to_owned);
        match (tokens.next(), tokens.next()) {
            (Some(admin), Some(proxy)) => Ok(Self { path: path.display().to_string(), admin, proxy }),
            _ => bail!("{} lacks a token; remove it", path.display()),
        }
    }

    fn write_kubeconfig(&self, path: &Path, certs: &Path, token: &str) -> Result<()> {
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{SERVER}"),
                "certificate-authority": certs.join("apiserver.crt"),
            }}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        // JSON is YAML.
        fs::write(path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn random_token() -> Result<String> {
    let mut random = [0_u8; 16];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).context("cannot read /dev/urandom")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
