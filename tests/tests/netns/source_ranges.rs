//! `loadBalancerSourceRanges` with real sockets: who is in none of them hears nothing, at that address alone.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use fairlead_lab::{Ask, Outcome, client::SILENCE};

use crate::cell::{Cell, Cluster, Combo, answered, eventually};

#[test]
fn rule_21_only_clients_in_the_ranges_are_served() {
    Cell::named("routed_conntrack").run(ranged);
}

/// The load balancer's address of a family.
fn balancer(v6: bool) -> IpAddr {
    if v6 { [0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 1].into() } else { [198, 51, 100, 1].into() }
}

fn ranged(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    let service = cluster.service("ranged");
    let client = &cluster.lab.client;
    let direct = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &client.ns, direct)?;
    let put = |ranges: &[&str]| {
        let text = service.spec.yaml().replacen(
            "spec:\n",
            &format!(
                "spec:\n  loadBalancerSourceRanges: [{}]\n",
                ranges.iter().map(|r| format!("'{r}'")).collect::<Vec<_>>().join(", ")
            ),
            1,
        );
        let ingress = [false, true].map(|v6| format!("{{ip: '{}'}}", balancer(v6))).join(", ");
        let status = format!("status:\n  loadBalancer: {{ingress: [{ingress}]}}\n");
        cluster.manifests.write(&service.spec.name, &(text + &status))
    };
    let ask = Ask::new(proto, SocketAddr::new(balancer(v6), 80));
    let own = format!("{}/{}", client.ip(v6), if v6 { 128 } else { 32 });
    let silent =
        |what: &str| eventually(what, &client.ns, ask, |attempt| attempt.outcome == Outcome::Timeout).map(drop);
    put(&[&own, "203.0.113.0/24", "2001:db8:203::/48"])?;
    eventually("an answer to a client in the ranges", &client.ns, ask, |attempt| attempt.outcome.answer().is_some())?;
    put(&["203.0.113.0/24", "2001:db8:203::/48"])?;
    silent("silence to a client in none of the ranges")?;
    answered(&client.ns, direct)?;
    let before = cluster.outcomes();
    let attempt = ask.timeout(SILENCE).once(&client.ns)?;
    let counted = cluster.outcomes_since(&before);
    ensure!(attempt.outcome == Outcome::Timeout && counted.contains("drop_source_range"), "{attempt}, {counted}");
    // Ranges of the other family leave this one open, and so does one that holds everybody.
    put(&[if v6 { "203.0.113.0/24" } else { "2001:db8:203::/48" }])?;
    eventually("an answer without a range of the family", &client.ns, ask, |attempt| {
        attempt.outcome.answer().is_some()
    })?;
    put(&["203.0.113.0/24", "2001:db8:203::/48"])?;
    silent("silence again")?;
    put(&["203.0.113.0/24", "2001:db8:203::/48", "0.0.0.0/0", "::/0"])?;
    eventually("an answer to everybody", &client.ns, ask, |attempt| attempt.outcome.answer().is_some())?;
    Ok(())
}
