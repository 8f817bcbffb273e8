//! Pods wired by the plugins that container runtimes bring along.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{Lab, Proto, topology::BRIDGE};
use fairlead_tests::{
    cni::Chain,
    nodes::{Nodes, TARGET},
    rules::{Client, Endpoint, Node},
};
use serde_json::{Value, json};

/// Host ports of the node's pods, one after the other.
const HOST_PORT: u16 = 8100;

/// As `10-containerd-net.conflist` has it.
pub(super) fn bridge(lab: &Lab) -> Chain {
    let first = json!({
        "type": "bridge", "bridge": BRIDGE, "isGateway": true, "hairpinMode": true,
        "ipMasq": true, "ipMasqBackend": "nftables", "ipam": addresses(lab),
    });
    Chain { name: "bridged", plugins: vec![first, port_map()] }
}

/// As GKE and kindnet have it.
pub(super) fn ptp(lab: &Lab) -> Chain {
    let first = json!({"type": "ptp", "ipMasq": true, "ipMasqBackend": "nftables", "ipam": addresses(lab)});
    Chain { name: "point-to-point", plugins: vec![first, port_map()] }
}

fn port_map() -> Value {
    json!({"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}})
}

fn addresses(lab: &Lab) -> Value {
    let range = |v6: bool| json!([{"subnet": lab.pod_cidrs()[usize::from(v6)], "gateway": lab.gateway(v6)}]);
    json!({
        "type": "host-local", "dataDir": lab.dir().join(format!("addresses-{}", lab.number)),
        "ranges": [range(false), range(true)], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    })
}

/// After the cells: the host ports are answered beside the Services.
pub(crate) fn host_ports_answer(nodes: &Nodes) -> Result<()> {
    let client = Client::Outside(Node::A);
    for v6 in [false, true] {
        for proto in Proto::ALL {
            let to = SocketAddr::new(nodes.lab(Node::A).node.ip(v6), HOST_PORT);
            let attempt = nodes.ask(client, proto, to, 0).once(nodes.namespace(client))?;
            let wanted = Endpoint::Pod(Node::A).name();
            ensure!(attempt.outcome.server() == Some(wanted), "host port {to}/{proto}: {attempt}, not {wanted}");
        }
    }
    Ok(())
}

/// Adds every pod of both nodes.
pub(super) fn wire(nodes: &mut Nodes, chain: fn(&Lab) -> Chain) -> Result<()> {
    for lab in &mut nodes.labs {
        let chain = chain(lab);
        for table in ["iptables", "ip6tables"] {
            lab.node.ns.sysctl(&format!("net.bridge.bridge-nf-call-{table}"), "1")?;
        }
        let node = lab.node.ns.clone();
        for (n, pod) in lab.pods.iter_mut().chain([&mut lab.client]).enumerate() {
            // The work of the `loopback` plugin.
            pod.ns.ip_batch("link set lo up\n")?;
            let added = chain.add(&node, pod, HOST_PORT + n as u16, TARGET);
            pod.node_device = added.with_context(|| format!("{} at {}", pod.name, node.name()))?;
        }
        lab.wait_until_wired()?;
    }
    Ok(())
}
