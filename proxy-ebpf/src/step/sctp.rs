//! SCTP's checksum, which covers the ports and no address (RFC 9260 §6.8): it changes where a port does.

use proxy_common::algo::crc32c;

use super::rewrite::Rewrite;
use crate::ctx::tc::{HelperError, Skb};
use crate::packet::ETHERNET;

/// Offset of the checksum within the common header (RFC 9260 §3.1).
const CHECKSUM: u32 = 8;

/// Brings the checksum up to date with a change of the ports (exclusive or of the words as they stand in the packet). A
/// field of zero is one that a device will fill in.
#[inline(always)]
pub(crate) fn settle<F: Rewrite>(skb: &Skb, l4: u32, ports: u32) -> Result<(), HelperError> {
    if ports == 0 {
        return Ok(());
    }
    let length = F::payload_len(skb).ok_or(HelperError)? + ETHERNET + F::HEADER_LEN - l4;
    let held: u32 = skb.at(l4 + CHECKSUM).ok_or(HelperError)?;
    if held == 0 {
        return Ok(());
    }
    skb.write(l4 + CHECKSUM, held ^ sctp_change(ports, length))
}

/// A global subprogram: verified once, and no other protocol carries its instructions.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sctp_change(ports: u32, length: u32) -> u32 {
    crc32c::change(ports, length as u16)
}
