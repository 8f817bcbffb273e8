//! The command line as clap sees it: syntax only. What the values mean is decided in [`crate::config`].
//!
//! The doc comment of each field is its `--help`; only flags that work are listed here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use proxy_common::abi::{Config as Settings, sizes};

use crate::telemetry::LogFormat;

/// Fairlead: Kubernetes Services by eBPF, in place of kube-proxy
#[derive(Debug, Parser)]
#[command(name = "fairlead", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load the programs, follow Services, endpoints and devices, and keep the maps in step
    ///
    /// Ends on SIGTERM or SIGINT and leaves programs, maps and attachments in the kernel: Services keep working, and
    /// the next start takes over. `fairlead cleanup` removes everything.
    ///
    /// Exit codes: 0 stopped by a signal, 1 failed while running, 2 wrong usage.
    Run(Box<RunArgs>),
    /// Show the Services in the kernel's maps, one line per address and port, and what of Services is not served
    ///
    /// What is not served, and why, is what the agent says in a file under /run/fairlead. If no agent runs, it is what
    /// the last one said, with a note on standard error.
    Services(ShowArgs),
    /// Show the endpoints in the kernel's maps, with the Service port that each serves
    Endpoints(ShowArgs),
    /// Show the flows in the kernel's maps, one line per connection
    Flows(ShowArgs),
    /// Show which endpoint each client keeps, where a Service asks for session affinity
    Affinity(ShowArgs),
    /// Show the node's devices: the role of each and why, and the programs on it
    Devices(ShowArgs),
    /// Say whether this kernel can run Fairlead, what is missing, and what the maps cost
    ///
    /// Changes nothing. Exit codes: 0 it can, 1 it can not.
    Check(CheckArgs),
    /// Mount the BPF file system that the pins lie on, if nobody has yet
    ///
    /// For an init container whose mount is shared with the host: pins must outlive the pod.
    Mount(MountArgs),

    /// Detach and unpin everything that Fairlead made, and say what was removed
    Cleanup(PinArgs),
}

/// Where the pins are.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// Directory of the pinned maps, programs and links, on a BPF file system
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/fairlead")]
    pub pin_path: PathBuf,
}

/// Options of `fairlead mount`.
#[derive(Clone, Debug, Args)]
pub struct MountArgs {
    /// Where the pins are
    #[command(flatten)]
    pub pins: PinArgs,
    /// Also set the entries of /proc/sys that `run` needs, where its own container may not
    #[arg(long)]
    pub sysctls: bool,
}

/// Options of the commands that show maps.
#[derive(Clone, Debug, Args)]
pub struct ShowArgs {
    /// Where the pins are
    #[command(flatten)]
    pub pins: PinArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Output formats of the commands that show maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Aligned columns
    Table,
    /// The same, with more columns where there are more
    Wide,
    /// JSON: an array with an object for each row
    Json,
    /// YAML: the same array
    Yaml,
}

/// Options of `fairlead check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Where the pins are
    #[command(flatten)]
    pub pins: PinArgs,
    /// Sizes whose memory is to be computed
    #[command(flatten)]
    pub sizes: SizeArgs,
}

/// Options of `fairlead run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Where Services come from
    #[command(flatten)]
    pub source: SourceArgs,
    /// Name of this node, as in EndpointSlices' `nodeName`; the host name where it is not given
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Devices to serve: patterns (`eth*`, `!docker0`) and roles (`eth1=uplink`), separated by commas
    ///
    /// Without a pattern every device is served by the role that its kind, addresses, routes and master give it. A
    /// pattern limits Fairlead to the devices it matches (`*` any text, `?` one character); `!` in front excludes.
    /// NAME=ROLE overrides the role found: uplink, pod, bridge-port, bridge, tunnel, or none. `lo` is a device like any
    /// other: without it, processes of the node do not reach NodePorts of its own.
    #[arg(long, value_name = "PATTERN|NAME=ROLE", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Where the pins are
    #[command(flatten)]
    pub pins: PinArgs,
    /// Addresses of this node that answer NodePorts: networks, `primary`, or `all`
    ///
    /// `primary` is the first InternalIP of each family in this node's Node object, or else its first ExternalIP. With
    /// manifests that have no such Node, it is the address that the default route with the lowest metric starts from. An
    /// address family without a network in the list answers on all of its addresses, and so does one without a primary
    /// address. Loopback addresses never answer.
    #[arg(long, value_name = "CIDR|primary|all", value_delimiter = ',', default_value = "primary")]
    pub nodeport_addresses: Vec<String>,
    /// Who is a pod of this node, and what is done to others
    #[command(flatten)]
    pub clients: ClientArgs,
    /// Set entries of /proc/sys that are needed; `false` leaves all alone
    ///
    /// What was set is logged, listed by `fairlead check` and restored by `fairlead cleanup`.
    #[arg(
        long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
        require_equals = true, action = clap::ArgAction::Set
    )]
    pub manage_sysctls: bool,
    /// Where /healthz and /livez are answered: an address, or one with a port; empty for nowhere
    ///
    /// `0.0.0.0` means every address of both families, as with kube-proxy.
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "0.0.0.0:10256", help_heading = "Health and metrics")]
    pub healthz_bind_address: String,

    /// Where /metrics is answered: an address, or one with a port; empty for nowhere
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "127.0.0.1:10249", help_heading = "Health and metrics")]
    pub metrics_bind_address: String,

    /// End, with an Event at the Node, where the address of /healthz or of /metrics cannot be listened on
    ///
    /// Without it, listening is tried again every five seconds.
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set,
        help_heading = "Health and metrics"
    )]
    pub bind_address_hard_fail: bool,

    /// How programs are attached
    #[arg(long, value_enum, default_value_t = AttachMode::Auto)]
    pub attach: AttachMode,
    /// Several uplinks
    #[command(flatten)]
    pub replies: ReplyArgs,
    /// Map sizes
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Timeouts
    #[command(flatten)]
    pub timeouts: TimeoutArgs,
    /// RSTs and ICMP errors that Fairlead answers with, per second and CPU
    #[arg(long, value_name = "N", default_value_t = Settings::REJECT_PER_SEC, help_heading = "Limits")]
    pub rejects_per_second: u32,
    /// Load this eBPF object in place of the built-in one; its maps must have the same layouts
    ///
    /// Devices whose packets have no Ethernet header keep the built-in programs.
    #[arg(long, value_name = "FILE", help_heading = "Development")]
    pub ebpf_object: Option<PathBuf>,
    /// Log filter: a level, or MODULE=LEVEL separated by commas
    #[arg(long, env = "FAIRLEAD_LOG", value_name = "FILTER", default_value = "info", help_heading = "Logging")]
    pub log: String,
    /// Log format
    #[arg(long, value_enum, default_value_t = LogFormat::Text, help_heading = "Logging")]
    pub log_format: LogFormat,
}

/// Who is a pod of this node, and what is done to others. Flags that kube-proxy has too carry its names.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Clients")]
pub struct ClientArgs {
    /// How pods of this node are told from other clients, whose source is exchanged on the way to a ClusterIP
    ///
    /// `pod-device` where nothing else is said, `cluster-cidr` where --cluster-cidr is given.
    #[arg(long, value_enum, value_name = "MODE")]
    pub detect_local_mode: Option<DetectLocalMode>,
    /// Networks of the cluster's pods; of each family the first counts
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,
    /// The bridge of pods, for --detect-local-mode=bridge
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// How names of pods' devices begin, for --detect-local-mode=prefix
    #[arg(long, value_name = "TEXT")]
    pub pod_interface_name_prefix: Option<String>,
    /// Exchange the source of every request to a ClusterIP
    #[arg(
        long, value_name = "BOOL", default_value_t = false, default_missing_value = "true", num_args = 0..=1,
        require_equals = true, action = clap::ArgAction::Set
    )]
    pub masquerade_all: bool,
    /// The API server's range of NodePorts: no exchanged source takes a port of it
    #[arg(long, value_name = "LOW-HIGH", default_value = "30000-32767")]
    pub service_node_port_range: String,
}

/// Where replies leave a node of several uplinks.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Several uplinks")]
pub struct ReplyArgs {
    /// Bits of skb->mark by which replies leave by the uplink that their requests came in by, such as 0x1000
    ///
    /// One bit serves the uplink of the default route, n bits that and 2^n - 2 others. Nobody else on the node may use
    /// them. Without it, replies take the way that the node's routes say, as with kube-proxy.
    #[arg(long, value_name = "MASK")]
    pub reply_mark: Option<String>,
    /// Priority of the rules that read these bits; the number before it is taken, too
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub reply_mark_priority: u32,
}

/// How pods of this node are told from other clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DetectLocalMode {
    /// They send on a device that is found to be a pod's, or a port of a bridge of pods
    PodDevice,
    /// Their address lies in --cluster-cidr
    #[value(alias = "ClusterCIDR")]
    ClusterCidr,
    /// Their address lies in spec.podCIDRs of this node's Node object
    #[value(alias = "NodeCIDR")]
    NodeCidr,
    /// They send on --pod-bridge-interface
    #[value(alias = "BridgeInterface")]
    Bridge,
    /// They send on a device whose name begins with --pod-interface-name-prefix
    #[value(alias = "InterfaceNamePrefix")]
    Prefix,
    /// They are not told apart: no source is exchanged on the way to a ClusterIP, and a Local policy holds for pods too
    None,
}

/// Where Services come from: without either, the API of the cluster whose pod this is.
#[derive(Clone, Debug, Args)]
pub struct SourceArgs {
    /// Follow the Kubernetes API that this kubeconfig names; without it and --manifests, that of the cluster around
    /// this pod, by its service account
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,
    /// Follow a folder of YAML manifests (Services, EndpointSlices, Endpoints, the Node, ServiceCIDRs) instead of an API
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// The API server's URL, in place of the kubeconfig's or of the cluster's Service that nobody serves yet
    #[arg(long, value_name = "URL")]
    pub api_server: Option<String>,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AttachMode {
    /// tcx links where the kernel has them (6.6), behind a foreign clsact egress filter through clsact, else clsact
    Auto,
    /// tcx links only
    Tcx,
    /// clsact filters only
    Clsact,
}

/// Map sizes, in entries.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Map sizes (entries)")]
pub struct SizeArgs {
    /// Addresses × ports of Services, per family
    #[arg(long, value_name = "N", default_value_t = sizes::SERVICES)]
    pub max_services: u32,
    /// ClusterIPs, per family
    #[arg(long, value_name = "N", default_value_t = sizes::CLUSTER_IPS)]
    pub max_cluster_ips: u32,
    /// Service ports, over both families
    #[arg(long, value_name = "N", default_value_t = sizes::PORTS)]
    pub max_ports: u32,
    /// Places of endpoints in runs, per family; a port being changed takes its old and its new run
    #[arg(long, value_name = "N", default_value_t = sizes::SLOTS)]
    pub max_slots: u32,
    /// Endpoints, one per Service port and endpoint, over both families
    #[arg(long, value_name = "N", default_value_t = sizes::LIVE)]
    pub max_endpoints: u32,
    /// Entries of established flows, per family; a connection takes two
    #[arg(long, value_name = "N", default_value_t = sizes::FLOWS)]
    pub max_flows: u32,
    /// Entries of half-open flows, per family; the oldest give way
    #[arg(long, value_name = "N", default_value_t = sizes::NEW)]
    pub max_half_open_flows: u32,
    /// Addresses of this node, per family
    #[arg(long, value_name = "N", default_value_t = sizes::NODE_ADDRS)]
    pub max_node_addrs: u32,
    /// Clients of Services with session affinity, per Service port and family; the oldest give way
    #[arg(long, value_name = "N", default_value_t = sizes::AFFINITY)]
    pub max_affinity: u32,
    /// Source ranges of load balancers, per Service port and family
    #[arg(long, value_name = "N", default_value_t = sizes::SRC_RANGES)]
    pub max_source_ranges: u32,
    /// Devices that carry programs
    #[arg(long, value_name = "N", default_value_t = sizes::DEVICES)]
    pub max_devices: u32,
}

/// Timeouts of idle flows. Flags that kube-proxy has too carry its names.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Timeouts (such as 30s, 5m or 24h0m0s)")]
pub struct TimeoutArgs {
    /// Idle TCP connections
    #[arg(long, value_name = "DURATION", default_value = "24h")]
    pub conntrack_tcp_timeout_established: String,
    /// TCP connections that one side has closed
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    pub conntrack_tcp_timeout_close_wait: String,
    /// TCP connections that both sides have closed
    #[arg(long, value_name = "DURATION", default_value = "120s")]
    pub conntrack_tcp_timeout_time_wait: String,
    /// TCP connections that were reset
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    pub conntrack_tcp_timeout_close: String,
    /// Idle UDP flows that were answered
    #[arg(long, value_name = "DURATION", default_value = "120s")]
    pub conntrack_udp_timeout_stream: String,
    /// Idle flows of other protocols
    #[arg(long, value_name = "DURATION", default_value = "600s")]
    pub conntrack_generic_timeout: String,
    /// Age at which an unanswered flow gives up its tuple
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub half_open_timeout: String,
    /// Pause between two sweeps over the flows
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub sweep_interval: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_says_what_it_does() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn wrong_usage_has_exit_code_2() {
        let code = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap_err().exit_code();
        assert_eq!(code("fairlead"), 2);
        assert_eq!(code("fairlead run --manifests a --kubeconfig b"), 2);
        assert_eq!(code("fairlead run --manifests a --socket-lb all"), 2, "a flag without its feature is not taken");
        assert!(Cli::try_parse_from(["fairlead", "run", "--manifests", "a"]).is_ok());
        assert_eq!(code("fairlead run --manifests a --bind-address-hard-fail=perhaps"), 2);
    }

    #[test]
    fn a_switch_is_written_as_kube_proxys_are() {
        for (flag, expected) in [("", false), ("=true", true), ("=false", false)] {
            let flag = format!("--bind-address-hard-fail{flag}");
            let line = ["fairlead", "run", "--manifests", "a", &flag];
            let Command::Run(args) = Cli::try_parse_from(line).unwrap().command else { panic!("it is run") };
            assert_eq!(args.bind_address_hard_fail, expected || flag.ends_with("fail"), "{flag}");
        }
    }
}
