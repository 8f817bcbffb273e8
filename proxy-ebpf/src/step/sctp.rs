//! SCTP's checksum, which covers the ports and no address (RFC 9260 §6.8): it changes where a port does.

use proxy_common::Outcome;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::algo::crc32c;

use super::rewrite::{Rewrite, pair};
use crate::ctx::tc::{HelperError, Skb};
use crate::packet::ETHERNET;

/// Offset of the checksum within the common header (RFC 9260 §3.1).
const CHECKSUM: u32 = 8;

/// Brings the checksum up to date with what the flow makes of the ports. A field of zero is one that a device will fill in.
#[inline(always)]
fn settle<F: Rewrite>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, l4: u32) -> Outcome {
    match change(skb, key, found, l4) {
        Ok(()) => Outcome::Request,
        Err(HelperError) => Outcome::DropHelper,
    }
}

#[inline(always)]
fn change<F: Rewrite>(skb: &Skb, key: &FlowKey<F>, found: &Flow<F>, l4: u32) -> Result<(), HelperError> {
    let ports = pair(key.sport, key.dport) ^ pair(found.sport, found.dport);
    if ports == 0 || mutant!("rule-16-checksum") {
        return Ok(());
    }
    let length = F::payload_len(skb).ok_or(HelperError)? + ETHERNET + F::HEADER_LEN - l4;
    let held: u32 = skb.at(l4 + CHECKSUM).ok_or(HelperError)?;
    if held == 0 {
        return Ok(());
    }
    skb.write(l4 + CHECKSUM, held ^ sctp_change(ports, length))
}

subprograms! {
    /// [`settle`] of a family, as a global subprogram: not within the one that rewrites, whose stack is large.
    Settle: Rewrite => settle(skb; l4: u32) as sctp_v4, sctp_v6
}

/// A global subprogram: no other protocol carries its instructions.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sctp_change(ports: u32, length: u32) -> u32 {
    crc32c::change(ports, length as u16, |a, b| sctp_times(a, b))
}

/// Another: its loop is walked by the verifier once, and not where each is called.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sctp_times(a: u32, b: u32) -> u32 {
    crc32c::times(a, b)
}
