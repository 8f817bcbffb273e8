//! How pods of this node are told from other clients: `--detect-local-mode` and what belongs to it (kube-proxy's rule 71).

use ipnet::IpNet;

use super::Invalid;
use crate::args::{ClientArgs, DetectLocalMode};
use crate::model::IpFamily;
use crate::source_ports::Span;

/// Who is a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalPods {
    /// Who sends on one of these devices.
    Devices(LocalDevices),
    /// Who has an address in one of these networks, at most one of each family.
    Networks(Vec<IpNet>),
    /// The same, with the networks of the own Node.
    OfNode,
    /// Nobody knows.
    Unknown,
}

/// Devices of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalDevices {
    /// Those that are found to be.
    Found,
    /// A bridge and its ports.
    Bridge(String),
    /// Those whose name, or whose master's name, begins so.
    Prefix(String),
}

impl LocalPods {
    /// What the flags say.
    pub(super) fn parse(args: &ClientArgs) -> Result<Self, Invalid> {
        const CIDRS: &str = "cluster-cidr";
        let mut networks = Vec::new();
        for text in &args.cluster_cidr {
            let problem = "no network such as 10.244.0.0/16";
            networks.push(text.parse::<IpNet>().map_err(|_| Invalid::new(CIDRS, text, problem))?.trunc());
        }
        let alone = if networks.is_empty() { DetectLocalMode::PodDevice } else { DetectLocalMode::ClusterCidr };
        let mode = args.detect_local_mode.unwrap_or(alone);
        let needed = |text: &Option<String>, flag| match text.as_deref() {
            Some(name) if !name.is_empty() => Ok(name.to_owned()),
            _ => Err(Invalid::new("detect-local-mode", mode_name(mode), format!("needs --{flag}"))),
        };
        Ok(match mode {
            DetectLocalMode::PodDevice => Self::Devices(LocalDevices::Found),
            DetectLocalMode::Bridge => {
                Self::Devices(LocalDevices::Bridge(needed(&args.pod_bridge_interface, "pod-bridge-interface")?))
            }
            DetectLocalMode::Prefix => {
                let flag = "pod-interface-name-prefix";
                Self::Devices(LocalDevices::Prefix(needed(&args.pod_interface_name_prefix, flag)?))
            }
            DetectLocalMode::ClusterCidr if networks.is_empty() => {
                return Err(Invalid::new("detect-local-mode", mode_name(mode), format!("needs --{CIDRS}")));
            }
            DetectLocalMode::ClusterCidr => Self::Networks(first_of_each_family(&networks)),
            DetectLocalMode::NodeCidr => Self::OfNode,
            DetectLocalMode::None => Self::Unknown,
        })
    }
}

/// Of several networks of a family the first counts, as with kube-proxy.
pub fn first_of_each_family(networks: &[IpNet]) -> Vec<IpNet> {
    let of = |family| {
        let mut own = networks.iter().filter(|net| IpFamily::of(&net.addr()) == family).copied();
        if mutant!("rule-71-first") { own.last() } else { own.next() }
    };
    IpFamily::ALL.into_iter().filter_map(of).collect()
}

fn mode_name(mode: DetectLocalMode) -> String {
    use clap::ValueEnum as _;
    mode.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// `30000-32767`, as the API server's flag has it.
pub(super) fn parse_node_port_range(text: &str) -> Result<Span, Invalid> {
    let bad = || Invalid::new("service-node-port-range", text, "no range of ports such as 30000-32767");
    let (first, last) = text.split_once('-').ok_or_else(bad)?;
    let (first, last): (u16, u16) = (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
    if first == 0 || first > last { Err(bad()) } else { Ok(first..=last) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;

    fn pods(flags: &str) -> Result<LocalPods, String> {
        config(flags).map(|config| config.local_pods).map_err(|error| error.to_string())
    }

    #[test]
    fn rule_71_the_flags_say_who_is_a_pod_of_this_node() {
        let networks = |list: &[&str]| Ok(LocalPods::Networks(list.iter().map(|net| net.parse().unwrap()).collect()));
        let devices = |devices| Ok(LocalPods::Devices(devices));
        for (flags, expected) in [
            ("", devices(LocalDevices::Found)),
            ("--detect-local-mode pod-device", devices(LocalDevices::Found)),
            ("--cluster-cidr 10.244.0.0/16", networks(&["10.244.0.0/16"])),
            ("--cluster-cidr 10.244.3.0/16,fd00::/8,10.0.0.0/8", networks(&["10.244.0.0/16", "fd00::/8"])),
            ("--detect-local-mode ClusterCIDR --cluster-cidr fd00::/8", networks(&["fd00::/8"])),
            ("--detect-local-mode none --cluster-cidr 10.0.0.0/8", Ok(LocalPods::Unknown)),
            ("--detect-local-mode NodeCIDR", Ok(LocalPods::OfNode)),
            (
                "--detect-local-mode BridgeInterface --pod-bridge-interface cni0",
                devices(LocalDevices::Bridge("cni0".to_owned())),
            ),
            (
                "--detect-local-mode InterfaceNamePrefix --pod-interface-name-prefix cali",
                devices(LocalDevices::Prefix("cali".to_owned())),
            ),
        ] {
            assert_eq!(pods(flags), expected, "{flags}");
        }
        for (flags, complaint) in [
            ("--detect-local-mode cluster-cidr", "--detect-local-mode cluster-cidr: needs --cluster-cidr"),
            ("--detect-local-mode bridge", "--detect-local-mode bridge: needs --pod-bridge-interface"),
            ("--detect-local-mode prefix", "--detect-local-mode prefix: needs --pod-interface-name-prefix"),
            ("--cluster-cidr 10.0.0.0", "--cluster-cidr 10.0.0.0: no network such as 10.244.0.0/16"),
        ] {
            assert_eq!(pods(flags), Err(complaint.to_owned()), "{flags}");
        }
    }

    #[test]
    fn a_range_of_node_ports_is_the_api_servers() {
        assert_eq!(parse_node_port_range("30000-32767"), Ok(30_000..=32_767));
        for bad in ["", "30000", "32767-30000", "0-10", "1-70000", "a-b"] {
            parse_node_port_range(bad).unwrap_err();
        }
    }
}
