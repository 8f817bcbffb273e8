//! How long an idle flow lives: nf_conntrack's defaults, as kube-proxy leaves them (rule 114).

use crate::{Family, abi::Flow};

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of SCTP.
pub const SCTP: u8 = 132;

/// Timeouts in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP with neither FIN nor RST; kube-proxy sets 24 h.
    pub tcp_established_secs: u32,
    /// TCP with one FIN; kube-proxy sets close-wait to 1 h.
    pub tcp_close_wait_secs: u32,
    /// TCP with both FINs (`nf_conntrack_tcp_timeout_time_wait`).
    pub tcp_time_wait_secs: u32,
    /// TCP after a RST (`nf_conntrack_tcp_timeout_close`).
    pub tcp_close_secs: u32,
    /// UDP with traffic both ways (`nf_conntrack_udp_timeout_stream`).
    pub udp_stream_secs: u32,
    /// Any other protocol (`nf_conntrack_generic_timeout`).
    pub other_secs: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_established_secs: 86_400,
            tcp_close_wait_secs: 3_600,
            tcp_time_wait_secs: 120,
            tcp_close_secs: 10,
            udp_stream_secs: 120,
            other_secs: 600,
        }
    }
}

impl Timeouts {
    /// How long this flow may stay idle, judged by its owner entry.
    pub const fn of<F: Family>(&self, proto: u8, owner: &Flow<F>) -> u32 {
        match proto {
            TCP if (owner.seen_client | owner.seen_server) & Flow::<F>::RST != 0 => self.tcp_close_secs,
            TCP if owner.is_closed() => self.tcp_time_wait_secs,
            TCP if (owner.seen_client | owner.seen_server) & Flow::<F>::FIN != 0 => self.tcp_close_wait_secs,
            TCP => self.tcp_established_secs,
            UDP => self.udp_stream_secs,
            _ => self.other_secs,
        }
    }
}
