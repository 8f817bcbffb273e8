//! The cluster's shape: namespaces, devices, addresses, routes, netfilter.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    janitor,
    manifest::{NODE_NAME, OTHER_NODE},
    netns::{self, Namespace},
    schedule,
    server::wait_until,
    tun::TunPair,
};

/// How pods are wired to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Calico-like: a veth and a host route per pod, gateway 169.254.1.1 answered by proxy ARP, `fe80::` for IPv6.
    Routed,
    /// bridge/flannel-like: veths are ports of `cni0`, which holds the gateway address.
    Bridge {
        /// Bridged packets pass netfilter too (`bridge-nf-call-iptables`; per namespace on kernels from 5.3).
        br_netfilter: bool,
    },
    /// Pods have a namespace and no device: somebody else wires them.
    Unwired,
}

/// What netfilter does in the node's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netfilter {
    /// No rules: connections are not tracked.
    None,
    /// Connections are tracked; packets of state INVALID are counted.
    Conntrack,
    /// Packets of state INVALID are counted and dropped, in input, forward and output.
    InvalidDrop,
}

/// Where packets travel without an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flat {
    /// Between the node and the external host.
    Uplink,
    /// Between pods of the node and those of others, beside the uplink: a tunnel's inner device, [`OVERLAY`].
    Overlay,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// How pods are wired.
    pub shape: Shape,
    /// Netfilter in the node.
    pub netfilter: Netfilter,
    /// `rp_filter` of the node's devices: 0 off, 1 strict, 2 loose.
    pub rp_filter: u8,
    /// Number of server pods: `pod-a`, `pod-b`, ….
    pub pods: u8,
    /// The node and the external host are neighbours on a switch that a second node may join: see [`Lab::join`].
    pub switch: bool,
    /// A pair of tun devices in place of the veths there, or beside them.
    pub flat: Option<Flat>,
    /// The lab's id; without one it belongs to this process and goes with it.
    pub id: Option<String>,
}

impl LabConfig {
    /// Three server pods; reverse path filter as Kubernetes nodes of that kind have it.
    pub fn new(shape: Shape, netfilter: Netfilter) -> Self {
        let rp_filter = match netfilter {
            Netfilter::None => 0,
            Netfilter::Conntrack => 1,
            Netfilter::InvalidDrop => 2,
        };
        Self { shape, netfilter, rp_filter, pods: 3, switch: false, flat: None, id: None }
    }
}

/// A namespace with one address of each family.
#[derive(Clone, Debug)]
pub struct Host {
    /// Short name: `node`, `client`, `pod-a`.
    pub name: String,
    /// Its namespace.
    pub ns: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Host {
    /// The address of one family.
    pub fn ip(&self, v6: bool) -> IpAddr {
        if v6 { self.v6.into() } else { self.v4.into() }
    }
}

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its namespace and addresses; its device there is `eth0`.
    pub host: Host,
    /// The other end of its veth, in the node.
    pub node_device: String,
}

impl std::ops::Deref for Pod {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Pod {
    /// Switches the checksum and segmentation offloads of its device. Off, each packet carries its own checksum, which
    /// the receiver checks: between namespaces that is otherwise never done.
    pub fn offloads(&self, on: bool) -> Result<()> {
        let value = if on { "on" } else { "off" };
        self.ns.output("ethtool", &["-K", "eth0", "tx", value]).map(drop)
    }
}

/// The node's device towards the external host, and the external host's towards the node.
pub const UPLINK: &str = "eth0";
/// The device of [`Flat::Overlay`], at both ends.
pub const OVERLAY: &str = "overlay";
/// Its MTU: an outer header has room beside it.
const OVERLAY_MTU: u16 = 1_400;
/// The bridge of [`Shape::Bridge`].
pub const BRIDGE: &str = "cni0";
/// Prefixes: pods of the first node.
pub const POD_CIDRS: [&str; 2] = ["10.244.1.0/24", "fd00:10:244:1::/64"];
/// Prefixes: pods of another node, see [`Lab::remote_pods`].
pub const REMOTE_CIDRS: [&str; 2] = ["10.244.2.0/24", "fd00:10:244:2::/64"];
/// Prefixes: Services.
pub const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/108"];
/// Prefixes: addresses that no host has, and that the external clients of a lab with a switch send to their nodes:
/// external IPs and load balancers'.
pub const EXTERNAL_CIDRS: [&str; 2] = ["198.51.100.0/24", "2001:db8:198::/48"];
/// The switch's own MAC address; see [`Lab::bridge_mac`].
const SWITCH_MAC: &str = "0a:58:c0:a8:32:01";
/// Every routed pod's gateway has this MAC address, as Calico's have.
const ROUTED_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// The link-local address that follows from [`ROUTED_MAC`].
const ROUTED_GATEWAY_V6: &str = "fe80::ecee:eeff:feee:eeee";

/// The whole cluster. Dropping it removes it.
#[derive(Debug)]
pub struct Lab {
    /// Prefix of all its names.
    pub id: String,
    /// What it was built from.
    pub config: LabConfig,
    /// Which node this is: 1, or 2 for one that joined.
    pub number: u8,
    /// The node, with its uplink addresses.
    pub node: Host,
    /// Server pods.
    pub pods: Vec<Pod>,
    /// A pod that only asks.
    pub client: Pod,
    /// The external host; the node's default route leads to it. It holds further addresses: see
    /// [`Lab::external_clients`] and [`Lab::remote_pods`].
    pub ext: Host,
    tun: Option<TunPair>,
    keep: bool,
}

impl Lab {
    /// Builds the cluster.
    pub fn new(config: LabConfig) -> Result<Self> {
        Self::make(config, None)
    }

    /// A second node with pods of its own, on the same switch. The two reach each other's pods, and the external host
    /// is shared: the first of its [clients](Self::external_clients) sends to Services by the first node, the other one
    /// by the second.
    pub fn join(&self, config: LabConfig) -> Result<Self> {
        anyhow::ensure!(self.config.switch && self.number == 1, "{} has no switch to join", self.id);
        Self::make(LabConfig { switch: true, ..config }, Some(self))
    }

    fn make(config: LabConfig, first: Option<&Self>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        require_tools()?;
        schedule::watch();
        let id = match &config.id {
            Some(id) => id.clone(),
            None => {
                janitor::arm()?;
                format!("{}{}", janitor::own_prefix(), COUNT.fetch_add(1, Ordering::Relaxed))
            }
        };
        let built = Self::build(&id, config, first);
        if built.is_err() {
            janitor::remove(&format!("{id}-")).ok();
        }
        built.with_context(|| format!("cannot build lab {id}"))
    }

    fn build(id: &str, config: LabConfig, first: Option<&Self>) -> Result<Self> {
        let number = if first.is_some() { 2 } else { 1 };
        let host = |name: &str, v4: Ipv4Addr, v6: Ipv6Addr| -> Result<Host> {
            Ok(Host { name: name.to_owned(), ns: Namespace::create(&format!("{id}-{name}"))?, v4, v6 })
        };
        let node = host("node", Ipv4Addr::new(192, 168, 50, 9 + number), uplink_v6(9 + u16::from(number)))?;
        let ext = match first {
            Some(first) => first.ext.clone(),
            None => host("ext", Ipv4Addr::new(192, 168, 50, 1), uplink_v6(1))?,
        };
        let client = new_pod(id, number, "client", 9)?;
        let pods = (0..config.pods)
            .map(|n| new_pod(id, number, &format!("pod-{}", char::from(b'a' + n)), 10 + n))
            .collect::<Result<Vec<_>>>()?;
        let mut lab = Self { id: id.to_owned(), config, number, node, pods, client, ext, tun: None, keep: false };
        lab.tun = lab.make_tun()?;
        lab.wire_uplink()?;
        lab.wire_node()?;
        if let Some(first) = first {
            lab.wire_neighbour(first)?;
            first.wire_neighbour(&lab)?;
        }
        for pod in lab.all_pods() {
            lab.wire_pod(pod)?;
        }
        lab.wait_until_wired()?;
        fs::create_dir_all(lab.dir()).with_context(|| format!("cannot make {}", lab.dir().display()))?;
        Ok(lab)
    }

    /// Server pods and the client.
    pub fn all_pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter().chain([&self.client])
    }

    /// The server pod of this name.
    pub fn pod(&self, name: &str) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.name == name)
    }

    /// Adds a pod to the running cluster. `n` is the last byte of its address: 20 and above are free.
    pub fn add_pod(&mut self, name: &str, n: u8) -> Result<&Pod> {
        let pod = new_pod(&self.id, self.number, name, n)?;
        self.wire_pod(&pod)?;
        self.pods.push(pod);
        self.wait_until_wired()?;
        Ok(&self.pods[self.pods.len() - 1])
    }

    /// The node's name, in manifests and for its agent.
    pub fn node_name(&self) -> &'static str {
        if self.number == 1 { NODE_NAME } else { OTHER_NODE }
    }

    /// The address that pods of the bridge shape have for their gateway.
    pub fn gateway(&self, v6: bool) -> IpAddr {
        if v6 { pod_v6(self.number, 1).into() } else { pod_v4(self.number, 1).into() }
    }

    /// The bridge's own MAC address. Left to itself a bridge takes the lowest of its ports', which changes as pods come
    /// and go and makes the pods' neighbour entries wrong; CNI plugins set one for that reason.
    fn bridge_mac(&self) -> String {
        format!("0a:58:0a:f4:{:02x}:01", self.number)
    }

    /// Prefixes of the node's pods.
    pub fn pod_cidrs(&self) -> [String; 2] {
        [format!("{}/24", pod_v4(self.number, 0)), format!("{}/64", pod_v6(self.number, 0))]
    }

    /// A directory that goes with the lab: manifests, logs.
    pub fn dir(&self) -> PathBuf {
        Path::new(janitor::TMP).join(format!("{}-files", self.id))
    }

    /// Where the agent of this lab pins its maps.
    pub fn pin_path(&self) -> PathBuf {
        Path::new(janitor::BPF_FS).join(format!("{}-pins", self.id))
    }

    /// Leaves the cluster up when the `Lab` is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Further addresses of the external host that play clients from anywhere.
    pub fn external_clients(v6: bool) -> [IpAddr; 2] {
        if v6 {
            [10, 11].map(|n| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, n)))
        } else {
            [10, 11].map(|n| IpAddr::V4(Ipv4Addr::new(203, 0, 113, n)))
        }
    }

    /// Further addresses of the external host that play pods of another node.
    pub fn remote_pods(v6: bool) -> [IpAddr; 2] {
        if v6 {
            [10, 11].map(|n| IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, n)))
        } else {
            [10, 11].map(|n| IpAddr::V4(Ipv4Addr::new(10, 244, 2, n)))
        }
    }

    /// The address that the node sends to pods of other nodes from.
    pub fn ip_towards_remote_pods(&self, v6: bool) -> IpAddr {
        match (self.config.flat, v6) {
            (Some(Flat::Overlay), false) => pod_v4(1, 0).into(),
            (Some(Flat::Overlay), true) => pod_v6(1, 0).into(),
            _ => self.node.ip(v6),
        }
    }

    fn make_tun(&self) -> Result<Option<TunPair>> {
        let device = match self.config.flat {
            None => return Ok(None),
            Some(Flat::Uplink) => UPLINK,
            Some(Flat::Overlay) => OVERLAY,
        };
        TunPair::new((&self.node.ns, device), (&self.ext.ns, device)).map(Some)
    }

    fn wire_uplink(&self) -> Result<()> {
        let (node, ext) = (&self.node, &self.ext);
        let far = if self.config.switch { format!("port-{}", self.number) } else { UPLINK.to_owned() };
        if self.config.flat != Some(Flat::Uplink) {
            let ends = [("name", UPLINK, node), ("name", &far, ext)];
            let [one, other] = ends.map(|(word, name, host)| [word, name, "netns", host.ns.name()]);
            let words = [&["link", "add"], &one[..], &["type", "veth", "peer"], &other[..]].concat();
            netns::run(std::process::Command::new("ip").args(words))?;
        }
        let mut lines = String::new();
        if self.number == 1 {
            lines += "link set lo up\n";
            if self.config.switch {
                lines += &format!("link add name {UPLINK} address {SWITCH_MAC} type bridge forward_delay 0\n");
            }
            lines += &format!(
                "link set {UPLINK} up\naddr add {}/24 dev {UPLINK}\naddr add {}/64 dev {UPLINK} nodad\n",
                ext.v4, ext.v6
            );
        }
        if self.config.switch {
            lines += &format!("link set {far} master {UPLINK}\nlink set {far} up\n");
        }
        for v6 in [false, true] {
            let own = Self::external_clients(v6);
            // The remote pods of a lab with one node are the external host's.
            let remote = if self.config.switch { &[][..] } else { &Self::remote_pods(v6) };
            let (length, nodad) = if v6 { (128, "nodad") } else { (32, "") };
            if self.number == 1 {
                for addr in own.iter().chain(remote) {
                    lines += &format!("addr add {addr}/{length} dev lo {nodad}\n");
                }
                lines += &format!("route add {} via {}\n", SERVICE_CIDRS[usize::from(v6)], node.ip(v6));
            }
            lines += &format!("route add {} via {}\n", self.pod_cidrs()[usize::from(v6)], node.ip(v6));
        }
        if self.config.flat == Some(Flat::Overlay) {
            lines += &overlay(2, &self.pod_cidrs(), "replace");
        }
        ext.ns.ip_batch(&lines)?;
        if self.config.switch { self.wire_clients() } else { Ok(()) }
    }

    /// One of the external clients sends to Services by this node, whatever the others do.
    fn wire_clients(&self) -> Result<()> {
        let table = (100 + u16::from(self.number)).to_string();
        for v6 in [false, true] {
            let family = if v6 { "-6" } else { "-4" };
            let client = Self::external_clients(v6)[usize::from(self.number - 1)].to_string();
            let via = self.node.ip(v6).to_string();
            self.ext.ns.output("ip", &[family, "rule", "add", "from", &client, "lookup", &table])?;
            for cidrs in [SERVICE_CIDRS, EXTERNAL_CIDRS] {
                let to = cidrs[usize::from(v6)];
                self.ext.ns.output("ip", &[family, "route", "add", to, "via", &via, "table", &table])?;
            }
        }
        Ok(())
    }

    /// The way to another node's pods.
    fn wire_neighbour(&self, other: &Self) -> Result<()> {
        let route = |v6: bool| format!("route add {} via {}\n", other.pod_cidrs()[usize::from(v6)], other.node.ip(v6));
        self.node.ns.ip_batch(&(route(false) + &route(true)))
    }

    fn wire_node(&self) -> Result<()> {
        let (node, ext) = (&self.node, &self.ext);
        for (key, value) in [
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv4.conf.all.rp_filter", &*self.config.rp_filter.to_string()),
            ("net.ipv4.conf.default.rp_filter", &*self.config.rp_filter.to_string()),
        ] {
            node.ns.sysctl(key, value)?;
        }
        let mut lines = format!(
            "link set lo up\nlink set {UPLINK} up\naddr add {}/24 dev {UPLINK}\naddr add {}/64 dev {UPLINK} nodad\n\
             route add default via {}\nroute add default via {}\n",
            node.v4, node.v6, ext.v4, ext.v6
        );
        if let Shape::Bridge { br_netfilter } = self.config.shape {
            lines += &format!(
                "link add name {BRIDGE} address {} type bridge forward_delay 0\nlink set {BRIDGE} up\n\
                 addr add {}/24 dev {BRIDGE}\naddr add {}/64 dev {BRIDGE} nodad\n",
                self.bridge_mac(),
                self.gateway(false),
                self.gateway(true)
            );
            let value = if br_netfilter { "1" } else { "0" };
            for table in ["iptables", "ip6tables"] {
                node.ns.sysctl(&format!("net.bridge.bridge-nf-call-{table}"), value)?;
            }
        }
        if self.config.flat == Some(Flat::Overlay) {
            lines += &overlay(1, &REMOTE_CIDRS.map(str::to_owned), "add");
        }
        node.ns.ip_batch(&lines)?;
        let verdict = match self.config.netfilter {
            Netfilter::None => return Ok(()),
            Netfilter::Conntrack => "",
            Netfilter::InvalidDrop => "drop",
        };
        let chains = ["input", "forward", "output"].map(|hook| {
            format!(
                "counter invalid_{hook} {{}}\nchain {hook} {{ type filter hook {hook} priority 0; \
                 ct state invalid counter name invalid_{hook} {verdict}\n }}\n"
            )
        });
        node.ns.nft(&format!("table inet lab {{\n{}}}\n", chains.concat()))
    }

    fn wire_pod(&self, pod: &Pod) -> Result<()> {
        let (device, node, ns) = (&pod.node_device, &self.node.ns, &pod.ns);
        if self.config.shape == Shape::Unwired {
            return Ok(());
        }
        netns::run(std::process::Command::new("ip").args([
            "link",
            "add",
            "name",
            device,
            "netns",
            node.name(),
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            ns.name(),
        ]))?;
        let (inside, outside) = match self.config.shape {
            Shape::Routed => {
                node.sysctl(&format!("net.ipv4.conf.{device}.proxy_arp"), "1")?;
                // Proxy ARP answers broadcasts after a random delay of up to 0.8 s; Calico switches it off too.
                node.sysctl(&format!("net.ipv4.neigh.{device}.proxy_delay"), "0")?;
                (
                    format!(
                        "addr add {}/32 dev eth0\nroute add 169.254.1.1 dev eth0 scope link\n\
                         route add default via 169.254.1.1 dev eth0\naddr add {}/128 dev eth0 nodad\n\
                         route add default via {ROUTED_GATEWAY_V6} dev eth0\n",
                        pod.v4, pod.v6
                    ),
                    format!(
                        "link set {device} address {ROUTED_MAC}\nlink set {device} up\n\
                         route add {}/32 dev {device} scope link\nroute add {}/128 dev {device}\n",
                        pod.v4, pod.v6
                    ),
                )
            }
            Shape::Bridge { .. } => (
                format!(
                    "addr add {}/24 dev eth0\nroute add default via {}\naddr add {}/64 dev eth0 nodad\n\
                     route add default via {}\n",
                    pod.v4,
                    self.gateway(false),
                    pod.v6,
                    self.gateway(true)
                ),
                format!("link set {device} master {BRIDGE}\nlink set {device} up\n"),
            ),
            Shape::Unwired => unreachable!("left to others above"),
        };
        ns.ip_batch(&format!("link set lo up\nlink set eth0 up\n{inside}"))?;
        node.ip_batch(&outside)
    }

    /// The kernel's own event handling activates a device some time after its peer came up; until then it drops what
    /// it is given to send. Who wires devices itself waits here too.
    pub fn wait_until_wired(&self) -> Result<()> {
        for host in self.all_pods().map(|pod| &pod.host).chain([&self.node, &self.ext]) {
            let mut listing = Ok(String::new());
            let wired = wait_until(Duration::from_secs(30), || {
                listing = host.ns.output("ip", &["-o", "link", "show"]);
                // Where the kernel has tunnels, every namespace has some of its own that nobody has set up.
                let waiting = |line: &str| !line.contains("lo:") && line.contains(",UP") && !is_active(line);
                !listing.as_ref().is_ok_and(|text| text.lines().any(waiting))
            });
            let listing = listing?;
            anyhow::ensure!(wired, "devices of {} are not up after 30 s:\n{listing}", host.name);
        }
        Ok(())
    }

    /// TCP segments that any host of the cluster has sent more than once, SYNs and answers included.
    pub fn segments_resent(&self) -> Result<u64> {
        let mut sum = 0;
        for host in self.all_pods().map(|pod| &pod.host).chain([&self.node, &self.ext]) {
            sum += host.ns.segments_resent()?;
        }
        Ok(sum)
    }

    /// Packets of state INVALID that the node's netfilter saw, in all its chains. 0 without netfilter.
    pub fn invalid_packets(&self) -> Result<u64> {
        if self.config.netfilter == Netfilter::None {
            return Ok(0);
        }
        let listing = self.node.ns.output("nft", &["list", "counters", "table", "inet", "lab"])?;
        let mut words = listing.split_ascii_whitespace();
        let mut sum = 0;
        while let Some(word) = words.next() {
            if word == "packets" {
                let count = words.next().unwrap_or_default();
                sum += count.parse::<u64>().with_context(|| format!("nft counter {count:?}"))?;
            }
        }
        Ok(sum)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for host in self.all_pods().map(|pod| &pod.host).chain([&self.node]) {
            host.ns.delete();
        }
        if self.number == 1 {
            self.ext.ns.delete();
        }
        // Both are absent after a run that never got that far.
        fs::remove_dir_all(self.dir()).ok();
        fs::remove_dir_all(self.pin_path()).ok();
    }
}

/// A pod's namespace and addresses; the last byte of its address is `n`.
fn new_pod(id: &str, number: u8, name: &str, n: u8) -> Result<Pod> {
    let ns = Namespace::create(&format!("{id}-{name}"))?;
    let host = Host { name: name.to_owned(), ns, v4: pod_v4(number, n), v6: pod_v6(number, n) };
    Ok(Pod { host, node_device: format!("veth-{name}") })
}

/// An address of the pods of a node.
const fn pod_v4(number: u8, n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, number, n)
}

/// The same of `fd00:10:244:N::/64`.
const fn pod_v6(number: u8, n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, number as u16, 0, 0, 0, n as u16)
}

/// A line of `ip -o link`: the device is up and has a queueing discipline that sends. A tun tells nothing of its state.
fn is_active(line: &str) -> bool {
    let up = line.contains("state UP") || line.contains("POINTOPOINT") && line.contains("LOWER_UP");
    up && !line.contains("qdisc noop ")
}

/// One end of the overlay: its own address is the first of its pods' network, and the others' are behind it.
fn overlay(number: u8, others: &[String; 2], how: &str) -> String {
    let (v4, v6) = (pod_v4(number, 0), pod_v6(number, 0));
    let [to_v4, to_v6] = others;
    format!(
        "link set {OVERLAY} mtu {OVERLAY_MTU} up\naddr add {v4}/32 dev {OVERLAY}\naddr add {v6}/128 dev {OVERLAY} nodad\n\
         route {how} {to_v4} dev {OVERLAY} src {v4}\nroute {how} {to_v6} dev {OVERLAY} src {v6}\n"
    )
}

/// An address of the uplink's network `fd00:192:168:50::/64`.
fn uplink_v6(n: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x192, 0x168, 0x50, 0, 0, 0, n)
}

/// Says what is missing before anything is built.
fn require_tools() -> Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root: run this as root (sudo)");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<_> = [("ip", "iproute2"), ("nft", "nftables"), ("conntrack", "conntrack")]
        .into_iter()
        .filter(|(tool, _)| !std::env::split_paths(&path).any(|dir| dir.join(tool).exists()))
        .map(|(tool, package)| format!("{tool} (package {package})"))
        .collect();
    anyhow::ensure!(missing.is_empty(), "missing tools: {}; `./x setup` installs them", missing.join(", "));
    Ok(())
}
