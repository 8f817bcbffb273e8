//! An address that ClusterIPs come from and that no Service has: nobody hears of a packet to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use fairlead_lab::{AgentOptions, Ask, Outcome, Proto, server::wait_until};

use crate::cell::{Cell, Cluster, PATIENCE};

#[test]
fn an_unallocated_address_of_a_service_cidr_is_dropped() {
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    if let Err(error) = dropped(&cluster) {
        panic!("{error:#}\n{}", cluster.agent_log_tail());
    }
}

fn dropped(cluster: &Cluster) -> Result<()> {
    let client = &cluster.lab.client.ns;
    let addrs: [IpAddr; 2] =
        [Ipv4Addr::new(10, 96, 250, 1).into(), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xfa01).into()];
    let asks = addrs
        .map(|addr| Ask::new(Proto::Udp, SocketAddr::new(addr, 80)).timeout(std::time::Duration::from_millis(100)));
    let counted = |ask: &Ask| {
        let before = cluster.outcomes();
        let outcome = ask.once(client).map(|attempt| attempt.outcome);
        outcome.is_ok_and(|outcome| outcome == Outcome::Timeout)
            && cluster.outcomes_since(&before).contains("drop_unallocated")
    };
    ensure!(!asks.iter().any(counted), "dropped without a ServiceCIDR");
    let text = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16, 'fd00:10:96::/112']}\n";
    cluster.manifests.write("service-cidr", text)?;
    for ask in &asks {
        ensure!(wait_until(PATIENCE, || counted(ask)), "{}: not dropped", ask.to);
    }
    cluster.manifests.remove("service-cidr")?;
    for ask in &asks {
        ensure!(wait_until(PATIENCE, || !counted(ask)), "{}: dropped although its network is gone", ask.to);
    }
    Ok(())
}
