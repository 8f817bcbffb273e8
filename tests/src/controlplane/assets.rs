//! Runs a `kube-apiserver` and an `etcd` that are already there (the folder that `KUBEBUILDER_ASSETS` names).

use std::{
    fs::{self, File},
    io::Read as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use fairlead_lab::Namespace;

use super::{
    ETCD_PORT, READY_WITHIN, SERVER, SERVICE_CIDRS,
    process::{Log, Process, spend_memory},
};

/// One line for each request: who, what, and how it was answered.
const AUDIT_POLICY: &str =
    "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n";

/// Starts both and returns once the API server's certificate is there and its kubeconfigs are written.
pub(super) fn start(
    folder: &Path,
    netns: &Namespace,
    dir: &Path,
    audit: Option<&Path>,
    log: &Log,
) -> Result<Vec<Process>> {
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

    let processes = [&mut etcd, &mut server]
        .into_iter()
        .map(|command| {
            spend_memory(command);
            Process::start(command, log, None)
        })
        .collect::<Result<_>>()?;
    wait_for(&certs.join("apiserver.crt"))?;
    tokens.write_kubeconfigs(dir, &certs)?;
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

/// The same identities as those of the Go program: user, group and kubeconfig.
const IDENTITIES: [(&str, &str, &str); 3] = [
    ("admin", ",system:masters", "admin.kubeconfig"),
    ("system:kube-proxy", "", "proxy.kubeconfig"),
    ("system:kube-controller-manager", "", "controller-manager.kubeconfig"),
];

/// Their bearer tokens, in their order.
struct Tokens {
    path: String,
    tokens: Vec<String>,
}

impl Tokens {
    fn load(path: &Path) -> Result<Self> {
        if !path.exists() {
            let line = |(user, group, _)| Ok(format!("{},{user},{user}{group}\n", random_token()?));
            let text = IDENTITIES.into_iter().map(line).collect::<Result<String>>()?;
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let tokens: Vec<_> = text.lines().filter_map(|line| line.split(',').next()).map(str::to_owned).collect();
        if tokens.len() != IDENTITIES.len() {
            bail!("{} lacks a token; remove it", path.display());
        }
        Ok(Self { path: path.display().to_string(), tokens })
    }

    fn write_kubeconfigs(&self, dir: &Path, certs: &Path) -> Result<()> {
        for ((_, _, name), token) in IDENTITIES.iter().zip(&self.tokens) {
            let config = serde_json::json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "test",
                "clusters": [{"name": "test", "cluster": {
                    "server": format!("https://{SERVER}"),
                    "certificate-authority": certs.join("apiserver.crt"),
                }}],
                "users": [{"name": "test", "user": {"token": token}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            });
            let path = dir.join(name);
            // JSON is YAML.
            fs::write(&path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

fn random_token() -> Result<String> {
    let mut random = [0_u8; 16];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).context("cannot read /dev/urandom")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
