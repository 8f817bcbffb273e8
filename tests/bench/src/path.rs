//! The path that is measured: client pod → node → server pod, each a network namespace, joined by routed veths.

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{Lab, LabConfig, Namespace, Netfilter, Pod, Shape, packet::Mac, topology::UPLINK};
use nix::sys::socket::{setsockopt, sockopt};
use proxy_common::abi::Role;

use crate::{
    plane::Port,
    services::{ENDPOINTS, Plan, TARGET},
};

/// How long a packet may take through an idle path.
const PATIENCE: Duration = Duration::from_secs(2);

/// The path.
#[derive(Debug)]
pub struct Path {
    /// The namespaces.
    pub lab: Lab,
    /// Sockets of the endpoints, one for each address; nobody reads them while packets are counted.
    sockets: Vec<(SocketAddr, UdpSocket)>,
}

impl Path {
    /// Builds it: `pod-a` holds every endpoint under test, `pod-b` is no Service's.
    pub fn new() -> Result<Self> {
        let lab = Lab::new(LabConfig { pods: 2, ..LabConfig::new(Shape::Routed, Netfilter::None) })?;
        let mut path = Self { lab, sockets: Vec::new() };
        path.add_endpoints()?;
        for (pod, addrs) in
            [(&path.lab.pods[0], path.endpoints()), (&path.lab.pods[1], vec![path.other(false), path.other(true)])]
        {
            for addr in addrs {
                path.sockets.push((SocketAddr::new(addr, TARGET), sink(&pod.ns, SocketAddr::new(addr, TARGET))?));
            }
        }
        Ok(path)
    }

    /// Further addresses of `pod-a`, as if they were as many pods.
    fn add_endpoints(&self) -> Result<()> {
        let pod = &self.lab.pods[0];
        let (mut inside, mut outside) = (String::new(), String::new());
        for addr in self.endpoints().iter().filter(|addr| **addr != IpAddr::V4(pod.v4) && **addr != IpAddr::V6(pod.v6))
        {
            let (length, nodad) = if addr.is_ipv6() { (128, " nodad") } else { (32, "") };
            inside += &format!("addr add {addr}/{length} dev eth0{nodad}\n");
            outside += &format!("route add {addr}/{length} dev {}\n", pod.node_device);
        }
        pod.ns.ip_batch(&inside)?;
        self.lab.node.ns.ip_batch(&outside)
    }

    /// Every endpoint's address, both families.
    pub fn endpoints(&self) -> Vec<IpAddr> {
        let pod = &self.lab.pods[0];
        let (v4, v6) = (pod.v4.octets(), pod.v6.octets());
        let mut addrs = vec![pod.ip(false), pod.ip(true)];
        for n in 100..100 + ENDPOINTS - 1 {
            let (mut four, mut six) = (v4, v6);
            four[3] = n;
            six[15] = n;
            addrs.extend([IpAddr::from(four), IpAddr::from(six)]);
        }
        addrs
    }

    /// The endpoints of one family, with their port.
    pub fn targets(&self, v6: bool) -> Vec<SocketAddr> {
        let own = self.endpoints().into_iter().filter(|addr| addr.is_ipv6() == v6);
        own.map(|addr| SocketAddr::new(addr, TARGET)).collect()
    }

    /// An address that no Service has.
    pub fn other(&self, v6: bool) -> IpAddr {
        self.lab.pods[1].ip(v6)
    }

    /// What the programs are to serve, with this many Services.
    pub fn plan(&self, services: u32) -> Plan {
        let node = [self.lab.node.ip(false), self.lab.node.ip(true)];
        Plan { services, endpoints: self.endpoints(), node: node.to_vec() }
    }

    /// The node's devices.
    pub fn devices(&self) -> Result<Vec<Port>> {
        let node = &self.lab.node;
        let mut ports = vec![device(&node.ns, UPLINK, Role::Uplink, (Some(node.ip(false)), Some(node.ip(true))))?];
        for pod in self.lab.all_pods() {
            ports.push(device(&node.ns, &pod.node_device, Role::Pod, (Some(node.ip(false)), Some(node.ip(true))))?);
        }
        Ok(ports)
    }

    /// The client pod.
    pub const fn client(&self) -> &Pod {
        &self.lab.client
    }

    /// A connected socket of the client.
    pub fn connect(&self, to: SocketAddr) -> Result<UdpSocket> {
        let any = SocketAddr::new(self.client().ip(to.is_ipv6()), 0);
        let socket = self
            .client()
            .ns
            .run(|| {
                let socket = UdpSocket::bind(any)?;
                socket.connect(to)?;
                Ok::<_, std::io::Error>(socket)
            })?
            .with_context(|| format!("cannot connect to {to}"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    /// One datagram there and one back: after that the flow is established. Returns the endpoint that answered.
    pub fn confirm(&self, socket: &UdpSocket) -> Result<SocketAddr> {
        for (_, sink) in &self.sockets {
            sink.set_nonblocking(true)?;
            // Empties it of what earlier slices left.
            while sink.recv(&mut [0; 8]).is_ok() {}
        }
        socket.send(b"hello").context("sending the first datagram")?;
        let begun = std::time::Instant::now();
        while begun.elapsed() < PATIENCE {
            for (addr, sink) in &self.sockets {
                if let Ok((_, peer)) = sink.recv_from(&mut [0; 8]) {
                    sink.send_to(b"there", peer).with_context(|| format!("answering {peer}"))?;
                    let mut answer = [0; 8];
                    let n = socket.recv(&mut answer).with_context(|| format!("no answer from {addr} arrived"))?;
                    ensure!(&answer[..n] == b"there", "{addr} answered {:?}", &answer[..n]);
                    return Ok(*addr);
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("{:?} reached no server within {PATIENCE:?}", socket.peer_addr())
    }

    /// Packets that the servers' devices have received.
    pub fn received(&self) -> Result<u64> {
        self.lab.pods.iter().map(|pod| received(&pod.ns, "eth0")).sum()
    }
}

/// A socket that is never read; what does not fit into its small buffer is dropped, which costs the same each time.
fn sink(ns: &Namespace, addr: SocketAddr) -> Result<UdpSocket> {
    let socket = ns.run(|| UdpSocket::bind(addr))?.with_context(|| format!("cannot listen on {addr}"))?;
    setsockopt(&socket, sockopt::RcvBuf, &2_048)?;
    Ok(socket)
}

fn device(ns: &Namespace, name: &str, role: Role, source: (Option<IpAddr>, Option<IpAddr>)) -> Result<Port> {
    let (ifindex, mac) = ns.run(|| {
        let ifindex = nix::net::if_::if_nametoindex(name).with_context(|| format!("no device {name}"))?;
        Ok::<_, anyhow::Error>((ifindex, mac_of(name)?))
    })??;
    Ok(Port { name: name.to_owned(), ifindex, mac: mac.0, role, source })
}

/// The MAC address of a device of the calling thread's namespace. `/sys` shows another namespace's devices here.
fn mac_of(name: &str) -> Result<Mac> {
    for address in nix::ifaddrs::getifaddrs().context("cannot list addresses")? {
        if address.interface_name == name
            && let Some(link) = address.address.as_ref().and_then(|addr| addr.as_link_addr())
            && let Some(mac) = link.addr()
        {
            return Ok(Mac(mac));
        }
    }
    bail!("{name} has no MAC address")
}

fn received(ns: &Namespace, name: &str) -> Result<u64> {
    let text = ns.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?.context("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{name}:")));
    let packets = line.and_then(|line| line.split_ascii_whitespace().nth(1)).and_then(|n| n.parse().ok());
    packets.with_context(|| format!("no counters of {name} in {}", ns.name()))
}
