//! The configuration after validation: what the flags mean. No I/O happens here.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use proxy_common::algo::timeout::Timeouts;
use tracing_subscriber::EnvFilter;

use crate::args::{AttachMode, ReplyArgs, RunArgs, SizeArgs, SourceArgs, TimeoutArgs};
use crate::dataplane::pin::PinRoot;
use crate::devices::replies::ReplyMark;
use crate::devices::select::Selection;
use crate::model::IpFamily;
use crate::plan::node_ports::is_primary;
use crate::source_ports::Span;
use crate::telemetry::{self, LogFormat};

mod clients;

pub use clients::{LocalDevices, LocalPods, first_of_each_family};

/// A value that cannot be used. Printed as it is, with exit code 2.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("--{flag} {value}: {problem}")]
pub struct Invalid {
    /// Flag, without dashes.
    pub flag: &'static str,
    /// What was given.
    pub value: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl Invalid {
    pub(crate) fn new(flag: &'static str, value: impl ToString, problem: impl ToString) -> Self {
        Self { flag, value: value.to_string(), problem: problem.to_string() }
    }
}

/// Where Services come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The API that a kubeconfig names.
    Kubeconfig(PathBuf),
    /// A folder of manifests.
    Manifests(PathBuf),
    /// The API of the cluster that this pod runs in.
    InCluster,
}

/// kube-proxy's ports.
const HEALTHZ_PORT: u16 = 10_256;
const METRICS_PORT: u16 = 10_249;

/// Which addresses of the node answer NodePorts (rule 85).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's primary address of each family.
    Primary,
    /// Every address but loopback.
    All,
    /// Addresses inside these networks; a family without a network in the list answers on all (rule 86).
    Networks(Vec<IpNet>),
}

impl NodePortAddresses {
    fn parse(values: &[String]) -> Result<Self, Invalid> {
        const FLAG: &str = "nodeport-addresses";
        match values {
            [one] if one == "primary" => return Ok(Self::Primary),
            [one] if one == "all" => return Ok(Self::All),
            _ => {}
        }
        let mut networks = Vec::new();
        for value in values {
            if value == "primary" || value == "all" {
                return Err(Invalid::new(FLAG, values.join(","), format!("`{value}` must stand alone")));
            }
            let net = value.parse::<IpNet>().map_err(|_| {
                Invalid::new(FLAG, value, "neither a network such as 192.0.2.0/24 nor `primary` nor `all`")
            })?;
            networks.push(net);
        }
        if networks.is_empty() { Ok(Self::All) } else { Ok(Self::Networks(networks)) }
    }

    /// True if a family's NodePorts are answered on all of its addresses, whichever these are.
    pub fn takes_all(&self, family: IpFamily) -> bool {
        match self {
            Self::All => true,
            Self::Primary => false,
            Self::Networks(networks) => {
                let mut own = networks.iter().filter(|net| IpFamily::of(&net.addr()) == family).peekable();
                own.peek().is_none() || own.any(|net| net.prefix_len() == 0 && !mutant!("rule-87"))
            }
        }
    }

    /// True if NodePorts are answered at this address of the node. `primary` are the node's primary addresses; an
    /// unknown one leaves its family to all addresses, as in kube-proxy (rules 85 and 86).
    pub fn accepts(&self, addr: IpAddr, primary: &[IpAddr]) -> bool {
        if (addr.is_loopback() && !mutant!("rule-88")) || addr.is_unspecified() {
            return false;
        }
        let same_family = |other: &IpAddr| other.is_ipv4() == addr.is_ipv4();
        match self {
            Self::All => true,
            Self::Primary => is_primary(addr, primary) || mutant!("rule-85-all"),
            Self::Networks(networks) => {
                let mut own = networks.iter().filter(|net| same_family(&net.addr())).peekable();
                own.peek().is_none() && !mutant!("rule-86") || own.any(|net| net.contains(&addr))
            }
        }
    }
}

/// Map sizes, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `SERVICES_V4/6`.
    pub services: u32,
    /// `CLUSTER_IPS_V4/6`.
    pub cluster_ips: u32,
    /// `PORTS`, `PORT_STATS`, `NAMES`.
    pub ports: u32,
    /// `SLOTS_V4/6`.
    pub slots: u32,
    /// `LIVE`.
    pub endpoints: u32,
    /// `FLOWS_V4/6`.
    pub flows: u32,
    /// `NEW_V4/6`.
    pub half_open: u32,
    /// `NODE_ADDRS_V4/6`.
    pub node_addrs: u32,
    /// `AFFINITY_V4/6`.
    pub affinity: u32,
    /// `SRC_RANGES_V4/6`.
    pub source_ranges: u32,
    /// `DEVICES`.
    pub devices: u32,
}

impl Sizes {
    /// Sizes from flags. None may be 0, and none so large that a map's bytes overflow the kernel's 32-bit sums.
    pub fn new(args: &SizeArgs) -> Result<Self, Invalid> {
        const LARGEST: u32 = 1 << 26;
        let check = |flag: &'static str, n: u32| match n {
            0 => Err(Invalid::new(flag, n, "a map holds at least one entry")),
            n if n > LARGEST => Err(Invalid::new(flag, n, format!("at most {LARGEST} entries"))),
            n => Ok(n),
        };
        Ok(Self {
            services: check("max-services", args.max_services)?,
            cluster_ips: check("max-cluster-ips", args.max_cluster_ips)?,
            ports: check("max-ports", args.max_ports)?,
            slots: check("max-slots", args.max_slots)?,
            endpoints: check("max-endpoints", args.max_endpoints)?,
            flows: check("max-flows", args.max_flows)?,
            half_open: check("max-half-open-flows", args.max_half_open_flows)?,
            node_addrs: check("max-node-addrs", args.max_node_addrs)?,
            affinity: check("max-affinity", args.max_affinity)?,
            source_ranges: check("max-source-ranges", args.max_source_ranges)?,
            devices: check("max-devices", args.max_devices)?,
        })
    }
}

/// Everything that `fairlead run` needs to know.
#[derive(Debug)]
pub struct Config {
    /// Where Services come from.
    pub source: Source,
    /// URL that takes the place of the API server's.
    pub api_server: Option<String>,
    /// This node's name; `None`: the host name.
    pub node_name: Option<String>,
    /// Which devices are served.
    pub devices: Selection,
    /// Where the pins are.
    pub pins: PinRoot,
    /// Which addresses answer NodePorts.
    pub nodeport_addresses: NodePortAddresses,
    /// Who is a pod of this node.
    pub local_pods: LocalPods,
    /// Whether every request to a ClusterIP is masqueraded.
    pub masquerade_all: bool,
    /// Ports that may be NodePorts.
    pub node_port_range: Span,
    /// Whether entries of /proc/sys may be set.
    pub manage_sysctls: bool,
    /// Where health is answered.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are answered.
    pub metrics: Option<SocketAddr>,
    /// An address of these that cannot be listened on ends the agent.
    pub hard_fail: bool,
    /// How programs are attached.
    pub attach: AttachMode,
    /// The mark of replies on a node of several uplinks.
    pub reply_mark: Option<ReplyMark>,
    /// Map sizes.
    pub sizes: Sizes,
    /// Timeouts of established flows.
    pub timeouts: Timeouts,
    /// Timeout of half-open flows.
    pub half_open_secs: u32,
    /// Pause between two sweeps.
    pub sweep_interval: Duration,
    /// Answers per second and CPU.
    pub rejects_per_sec: u32,
    /// The object in place of the built-in one.
    pub ebpf_object: Option<PathBuf>,
    /// Log filter.
    pub log: EnvFilter,
    /// Log format.
    pub log_format: LogFormat,
}

impl TryFrom<RunArgs> for Config {
    type Error = Invalid;

    fn try_from(args: RunArgs) -> Result<Self, Invalid> {
        // Destructured, so that a flag nobody reads does not compile cleanly.
        let RunArgs {
            source,
            node_name,
            devices,
            pins,
            nodeport_addresses,
            clients,
            manage_sysctls,
            healthz_bind_address,
            metrics_bind_address,
            bind_address_hard_fail,
            attach,
            replies,
            sizes,
            timeouts,
            rejects_per_second,
            ebpf_object,
            log,
            log_format,
        } = args;
        let (timeouts, half_open_secs, sweep_interval) = parse_timeouts(&timeouts)?;
        Ok(Self {
            api_server: parse_api_server(&source)?,
            source: parse_source(source)?,
            node_name: node_name.map(parse_node_name).transpose()?,
            devices: Selection::parse(&devices)?,
            pins: PinRoot::new(pins.pin_path)?,
            nodeport_addresses: NodePortAddresses::parse(&nodeport_addresses)?,
            local_pods: LocalPods::parse(&clients)?,
            masquerade_all: clients.masquerade_all,
            node_port_range: clients::parse_node_port_range(&clients.service_node_port_range)?,
            manage_sysctls,
            healthz: parse_bind_address("healthz-bind-address", &healthz_bind_address, HEALTHZ_PORT)?,
            metrics: parse_bind_address("metrics-bind-address", &metrics_bind_address, METRICS_PORT)?,
            hard_fail: bind_address_hard_fail,
            attach,
            reply_mark: parse_reply_mark(&replies)?,
            sizes: Sizes::new(&sizes)?,
            timeouts,
            half_open_secs,
            sweep_interval,
            rejects_per_sec: rejects_per_second,
            ebpf_object,
            log: telemetry::parse_filter(&log).map_err(|e| Invalid::new("log", &log, e))?,
            log_format,
        })
    }
}

fn parse_source(args: SourceArgs) -> Result<Source, Invalid> {
    match (args.kubeconfig, args.manifests) {
        (Some(file), None) => Ok(Source::Kubeconfig(file)),
        (None, Some(dir)) => Ok(Source::Manifests(dir)),
        (None, None) => Ok(Source::InCluster),
        (Some(file), Some(_)) => Err(Invalid::new("kubeconfig", file.display(), "excludes --manifests")),
    }
}

/// Priorities below the kernel's own last rules, with room for one before.
const RULE_PRIORITIES: std::ops::RangeInclusive<u32> = 2..=32_765;

fn parse_reply_mark(args: &ReplyArgs) -> Result<Option<ReplyMark>, Invalid> {
    let Some(text) = &args.reply_mark else { return Ok(None) };
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let wrong = |problem: &str| Err(Invalid::new("reply-mark", text, problem));
    let Ok(mask) = number else { return wrong("no number of 32 bits, such as 0x1000") };
    if mask == 0 {
        return wrong("has no bit");
    }
    let bits = mask >> mask.trailing_zeros();
    if bits & (bits + 1) != 0 || bits > 0xff {
        return wrong("up to 8 bits side by side are taken, such as 0x1000 or 0x3000");
    }
    let priority = args.reply_mark_priority;
    if !RULE_PRIORITIES.contains(&priority) {
        let (first, last) = RULE_PRIORITIES.into_inner();
        return Err(Invalid::new("reply-mark-priority", priority, format!("{first} to {last} are taken")));
    }
    Ok(Some(ReplyMark { mask, priority }))
}

fn parse_api_server(args: &SourceArgs) -> Result<Option<String>, Invalid> {
    const FLAG: &str = "api-server";
    let Some(url) = &args.api_server else { return Ok(None) };
    if args.manifests.is_some() {
        return Err(Invalid::new(FLAG, url, "--manifests asks no API server"));
    }
    let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    match host {
        Some(host) if !host.is_empty() => Ok(Some(url.clone())),
        _ => Err(Invalid::new(FLAG, url, "not a URL such as https://192.0.2.1:6443")),
    }
}

/// Nothing, an address, or one with a port.
fn parse_bind_address(flag: &'static str, text: &str, port: u16) -> Result<Option<SocketAddr>, Invalid> {
    if text.is_empty() && !mutant!("rule-121-off") {
        return Ok(None);
    }
    let addr = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, port)));
    addr.map(Some).map_err(|_| {
        Invalid::new(flag, text, format!("neither an address nor one with a port, such as 0.0.0.0:{port}"))
    })
}

/// The API lower-cases nothing: a Node is called as the kubelet registered it, which is a lower-case DNS name.
fn parse_node_name(name: String) -> Result<String, Invalid> {
    let fits = !name.is_empty()
        && name.len() <= 253
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
    if fits { Ok(name) } else { Err(Invalid::new("node-name", name, "not a lower-case DNS name")) }
}

fn parse_timeouts(args: &TimeoutArgs) -> Result<(Timeouts, u32, Duration), Invalid> {
    let timeouts = Timeouts {
        tcp_established_secs: secs("conntrack-tcp-timeout-established", &args.conntrack_tcp_timeout_established)?,
        tcp_close_wait_secs: secs("conntrack-tcp-timeout-close-wait", &args.conntrack_tcp_timeout_close_wait)?,
        tcp_time_wait_secs: secs("conntrack-tcp-timeout-time-wait", &args.conntrack_tcp_timeout_time_wait)?,
        tcp_close_secs: secs("conntrack-tcp-timeout-close", &args.conntrack_tcp_timeout_close)?,
        udp_stream_secs: secs("conntrack-udp-timeout-stream", &args.conntrack_udp_timeout_stream)?,
        other_secs: secs("conntrack-generic-timeout", &args.conntrack_generic_timeout)?,
    };
    let half_open = secs("half-open-timeout", &args.half_open_timeout)?;
    let sweep = secs("sweep-interval", &args.sweep_interval)?;
    Ok((timeouts, half_open, Duration::from_secs(sweep.into())))
}

fn secs(flag: &'static str, text: &str) -> Result<u32, Invalid> {
    let duration = parse_duration(text).map_err(|problem| Invalid::new(flag, text, problem))?;
    match u32::try_from(duration.as_secs()) {
        Ok(0) => Err(Invalid::new(flag, text, "at least 1s")),
        Ok(secs) if secs <= i32::MAX as u32 => Ok(secs),
        _ => Err(Invalid::new(flag, text, "more than 68 years")),
    }
}

/// Durations as Go writes them (`1h30m`, `90s`, `500ms`), because kube-proxy's flags take these.
fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    const SHAPE: &str = "not a duration such as 30s, 5m or 24h0m0s";
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return Err(SHAPE);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or(SHAPE)?;
        let n: u64 = rest[..digits].parse().map_err(|_| SHAPE)?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "h" => n.checked_mul(3_600).map(Duration::from_secs),
            "m" => n.checked_mul(60).map(Duration::from_secs),
            "s" => Some(Duration::from_secs(n)),
            "ms" => Some(Duration::from_millis(n)),
            _ => return Err(SHAPE),
        };
        total = unit.and_then(|d| total.checked_add(d)).ok_or("too long a duration")?;
        rest = &rest[letters..];
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    pub(super) fn config(flags: &str) -> Result<Config, Invalid> {
        let line = format!("fairlead run --manifests m {flags}");
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Run(args) => Config::try_from(*args),
            other => panic!("{other:?}"),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn defaults_are_the_shared_ones() {
        let config = config("--node-name n").unwrap();
        assert_eq!(config.timeouts, Timeouts::default());
        assert_eq!(config.half_open_secs, proxy_common::abi::Config::NEW_TIMEOUT_SECS);
        assert_eq!(config.nodeport_addresses, NodePortAddresses::Primary);
        assert_eq!(config.sizes.flows, proxy_common::abi::sizes::FLOWS);
        assert_eq!(config.source, Source::Manifests("m".into()));
        assert!(config.manage_sysctls && !config.masquerade_all);
        assert_eq!(config.node_port_range, 30_000..=32_767);
    }

    #[test]
    fn a_switch_is_set_as_kube_proxys_flags_are() {
        assert!(config("--masquerade-all").unwrap().masquerade_all);
        assert!(!config("--masquerade-all=false").unwrap().masquerade_all);
        assert!(!config("--manage-sysctls=false").unwrap().manage_sysctls);
    }

    #[test]
    fn without_a_source_the_cluster_around_is_asked() {
        let parse = |line: &str| match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Run(args) => Config::try_from(*args),
            other => panic!("{other:?}"),
        };
        let config = parse("fairlead run --api-server https://[2001:db8::1]:6443").unwrap();
        assert_eq!(config.source, Source::InCluster);
        assert_eq!(config.api_server.as_deref(), Some("https://[2001:db8::1]:6443"));
        assert_eq!(parse("fairlead run --api-server 192.0.2.1").unwrap_err().flag, "api-server");
    }

    #[test]
    fn durations_are_gos() {
        assert_eq!(parse_duration("24h0m0s"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_duration("1m500ms"), Ok(Duration::from_millis(60_500)));
        for bad in ["", "5", "h", "5x", "-1s", "1.5s", "s5"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert!(parse_duration("99999999999999999999h").is_err());
        assert!(parse_duration("9999999999999999h").is_err());
    }

    #[test]
    fn a_bad_value_names_flag_value_and_remedy() {
        for (flags, flag, value) in [
            ("--conntrack-tcp-timeout-established soon", "conntrack-tcp-timeout-established", "soon"),
            ("--sweep-interval 0s", "sweep-interval", "0s"),
            ("--max-flows 0", "max-flows", "0"),
            ("--max-slots 4000000000", "max-slots", "4000000000"),
            ("--nodeport-addresses 10.0.0.0", "nodeport-addresses", "10.0.0.0"),
            ("--nodeport-addresses primary,10.0.0.0/8", "nodeport-addresses", "primary,10.0.0.0/8"),
            ("--node-name Node_1", "node-name", "Node_1"),
            ("--devices eth0=wan", "devices", "eth0=wan"),
            ("--pin-path relative/dir", "pin-path", "relative/dir"),
            ("--log proxy_agent=loud", "log", "proxy_agent=loud"),
            ("--api-server https://192.0.2.1:6443", "api-server", "https://192.0.2.1:6443"),
        ] {
            let error = config(flags).unwrap_err();
            assert_eq!((error.flag, error.value.as_str()), (flag, value));
            assert!(!error.problem.is_empty());
        }
    }

    #[test]
    fn rule_85_primary_accepts_the_primary_addresses_only() {
        let primary = [ip("192.0.2.1")];
        assert!(NodePortAddresses::Primary.accepts(ip("192.0.2.1"), &primary));
        assert!(!NodePortAddresses::Primary.accepts(ip("192.0.2.2"), &primary));
        assert!(NodePortAddresses::Primary.accepts(ip("2001:db8::1"), &primary), "rule 86: none known of this family");
        assert!(NodePortAddresses::Primary.accepts(ip("192.0.2.2"), &[]), "rule 85: none known is all");
    }

    #[test]
    fn rule_86_a_family_without_networks_accepts_all() {
        let networks = NodePortAddresses::parse(&["10.0.0.0/8".into(), "192.0.2.7/32".into()]).unwrap();
        assert!(networks.accepts(ip("10.1.2.3"), &[]));
        assert!(networks.accepts(ip("192.0.2.7"), &[]));
        assert!(!networks.accepts(ip("192.0.2.8"), &[]));
        assert!(networks.accepts(ip("2001:db8::1"), &[]));
    }

    #[test]
    fn rule_87_a_network_of_all_addresses_takes_all_of_its_family() {
        let networks = |list: &[&str]| {
            NodePortAddresses::parse(&list.iter().map(|net| (*net).to_owned()).collect::<Vec<_>>()).unwrap()
        };
        for (list, v4, v6) in [
            (&["0.0.0.0/0", "192.0.2.0/24"][..], true, true),
            (&["192.0.2.0/24", "::/0"], false, true),
            (&["::/0"], true, true),
            (&["192.0.2.0/24", "2001:db8::/64"], false, false),
        ] {
            let (networks, families) = (networks(list), IpFamily::ALL);
            assert_eq!(families.map(|family| networks.takes_all(family)), [v4, v6], "{list:?}");
            assert_eq!(networks.accepts(ip("198.51.100.1"), &[]), v4, "{list:?}");
            assert_eq!(networks.accepts(ip("2001:db8:1::1"), &[]), v6, "{list:?}");
            assert!(networks.accepts(ip("192.0.2.9"), &[]) && networks.accepts(ip("2001:db8::9"), &[]), "{list:?}");
        }
    }

    #[test]
    fn rule_88_loopback_never_answers() {
        let all = NodePortAddresses::parse(&["0.0.0.0/0".into(), "::/0".into()]).unwrap();
        for choice in [NodePortAddresses::All, NodePortAddresses::Primary, all] {
            assert!(!choice.accepts(ip("127.0.0.1"), &[]), "{choice:?}");
            assert!(!choice.accepts(ip("::1"), &[]), "{choice:?}");
            assert!(choice.accepts(ip("192.0.2.1"), &[]), "{choice:?}");
        }
    }

    #[test]
    fn bind_addresses_take_kube_proxys_ports() {
        let parse =
            |text| parse_bind_address("healthz-bind-address", text, 10_256).map(|addr| addr.map(|a| a.to_string()));
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("0.0.0.0"), Ok(Some("0.0.0.0:10256".to_owned())));
        assert_eq!(parse("::"), Ok(Some("[::]:10256".to_owned())));
        assert_eq!(parse("127.0.0.1:1"), Ok(Some("127.0.0.1:1".to_owned())));
        assert_eq!(parse("[::1]:2"), Ok(Some("[::1]:2".to_owned())));
        assert!(parse(":10256").is_err() && parse("localhost:1").is_err());
    }
}
