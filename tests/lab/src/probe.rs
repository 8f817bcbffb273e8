//! A probe that asks every millisecond, whether or not earlier questions were answered.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{client::fresh_nonce, netns::Namespace, wire};

/// What a probe found.
#[derive(Clone, Debug)]
pub struct Found {
    /// When the first answer that was wanted came.
    pub at: Instant,
    /// When its question was sent.
    pub asked: Instant,
    /// Who answered.
    pub server: String,
    /// Questions asked until then.
    pub questions: usize,
}

/// Sends a datagram every millisecond, each from a port of its own if `fresh`, until `wanted` says yes to a server's
/// name. Fails when nothing wanted came within `limit`.
pub fn until_answer(
    ns: &Namespace,
    to: SocketAddr,
    fresh: bool,
    limit: Duration,
    wanted: impl Fn(&str) -> bool + Sync,
) -> Result<Found> {
    ns.run(|| {
        let start = Instant::now();
        let mut sockets = Vec::new();
        let mut asked = HashMap::new();
        let mut heard = Vec::new();
        let mut buffer = [0; 512];
        while start.elapsed() < limit {
            if sockets.is_empty() || fresh {
                // Old sockets answer no more questions than these within a probe's patience.
                if sockets.len() >= 256 {
                    sockets.remove(0);
                }
                sockets.push(open(to)?);
            }
            let nonce = fresh_nonce();
            asked.insert(nonce, Instant::now());
            if let Some(socket) = sockets.last() {
                // Not reachable yet is what a probe is for.
                socket.send_to(&wire::request(nonce, 0, 0), to).ok();
            }
            std::thread::sleep(Duration::from_millis(1));
            for socket in &sockets {
                while let Ok((count, _)) = socket.recv_from(&mut buffer) {
                    let Some((answer, nonce)) = wire::parse_answer(&buffer[..count]) else { continue };
                    if let (true, Some(&sent)) = (wanted(&answer.server), asked.get(&nonce)) {
                        let server = answer.server;
                        return Ok(Found { at: Instant::now(), asked: sent, server, questions: asked.len() });
                    }
                    heard.push(answer.server);
                }
            }
        }
        heard.dedup();
        bail!(
            "no wanted answer from {to}/UDP within {limit:?}, {} questions; others that answered: {heard:?}",
            asked.len()
        )
    })?
}

fn open(to: SocketAddr) -> Result<UdpSocket> {
    let any = if to.is_ipv6() { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).context("a probe needs a UDP socket")?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
