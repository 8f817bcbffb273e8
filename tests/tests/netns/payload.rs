//! What the packets carry: checksums that a receiver really checks, and transfers of many segments.

use anyhow::{Result, ensure};
use fairlead_lab::{Ask, Host, Proto};

use crate::cell::{Cluster, Combo, answered};

matrix! {
    pitfall_p1_14_packets_carry_right_checksums_without_offload,
    large_transfers_arrive_whole,
}

/// Between namespaces checksums are usually left to a device that never computes them; here the sender does, the
/// programs must keep them right, and the receiver drops what is wrong.
pub(crate) fn pitfall_p1_14_packets_carry_right_checksums_without_offload(
    cluster: &Cluster,
    Combo { v6, proto }: Combo,
) -> Result<()> {
    let service = cluster.service("checksum");
    let ask = Ask::new(proto, service.vip(v6));
    let (client, pod) = (&cluster.lab.client, &cluster.lab.pods[0]);
    service.serve(&service.pods(&[0]), &client.ns, ask)?;
    client.offloads(false)?;
    pod.offloads(false)?;
    let asked = [client, pod].into_iter().try_for_each(|from| {
        // Odd and even lengths of payload.
        (0..8).try_for_each(|n| {
            let opened = ask.open(&from.ns)?;
            let attempt = opened.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", from.name))?.ask_bulk(n, n + 1);
            ensure!(attempt.outcome.answer().is_some(), "{} with {n} bytes of padding: {attempt}", from.name);
            Ok(())
        })
    });
    client.offloads(true)?;
    pod.offloads(true)?;
    asked
}

/// Segments of up to 64 kB pass the programs in one piece, and are cut behind them.
pub(crate) fn large_transfers_arrive_whole(cluster: &Cluster, Combo { v6, proto }: Combo) -> Result<()> {
    const SIZE: usize = 1 << 20;
    if proto == Proto::Udp {
        return Ok(());
    }
    let service = cluster.service("bulk");
    let ask = Ask::new(proto, service.vip(v6));
    service.serve(&service.pods(&[0]), &cluster.lab.client.ns, ask)?;
    let askers: [&Host; 4] = [&cluster.lab.client, &cluster.lab.pods[0], &cluster.lab.node, &cluster.lab.ext];
    for from in askers {
        let opened = ask.open(&from.ns)?;
        let mut conversation = opened.map_err(|outcome| anyhow::anyhow!("{}: {outcome}", from.name))?;
        for (up, down) in [(SIZE, 0), (0, SIZE), (SIZE, SIZE)] {
            let attempt = conversation.ask_bulk(up, down);
            // With many segments on their way TCP sends one again where an acknowledgement is a few milliseconds late.
            ensure!(
                attempt.outcome.answer_at_last().is_some(),
                "{}, {up} bytes up and {down} down: {attempt}",
                from.name
            );
        }
    }
    answered(&cluster.lab.client.ns, ask).map(drop)
}
