//! The checksum of layer 4 after a change of addresses and ports, in one helper call as a rule.
//!
//! What the field holds depends on what the kernel knows of the packet, and a program cannot ask for that:
//!
//! | `ip_summed` | the field holds | so it changes by |
//! |---|---|---|
//! | `CHECKSUM_PARTIAL` | the pseudo header's sum; the device adds the rest | the addresses |
//! | any other | the checksum | addresses and ports |
//! | `CHECKSUM_COMPLETE` | the checksum, and `skb->csum` the sum of the packet | both, and `skb->csum` by what does not cancel |
//!
//! `bpf_l4_csum_replace` without `BPF_F_PSEUDO_HDR` leaves a partial field alone and changes any other
//! (net/core/utils.c, inet_proto_csum_replace_by_diff). So it is given the whole difference; a field that is what it
//! was is a partial one.

use proxy_common::Family;

use crate::ctx::tc::{HelperError, Skb};

/// Differences as one's complement sums in 32 bits, of words as they stand in memory.
#[derive(Clone, Copy)]
pub(crate) struct Change {
    /// Of both addresses.
    pub(crate) addresses: u32,
    /// Of both ports.
    pub(crate) ports: u32,
}

/// Brings the checksum at `at` up to date and returns what the field is to hold: a partial one is not written yet.
#[inline(always)]
pub(crate) fn settle<F: Family>(skb: &Skb, at: u32, udp: bool, change: Change) -> Result<u16, HelperError> {
    let change = if mutant!("no-checksum") { Change { addresses: change.addresses ^ 1, ..change } } else { change };
    let before: u16 = skb.at(at).ok_or(HelperError)?;
    if udp && before == 0 && !mutant!("no-zero-checksum") {
        // UDP without a checksum keeps none (RFC 768): nothing cancels the change, but for the IPv4 header's own.
        let unsettled =
            if F::IS_V6 { fold(u64::from(change.addresses) + u64::from(change.ports)) } else { change.ports };
        skb.add_to_complete_checksum(unsettled);
        return Ok(0);
    }
    let total = fold16(u64::from(change.addresses) + u64::from(change.ports));
    if total == 0 || total == u16::MAX {
        return settle_apart::<F>(skb, at, udp, change);
    }
    skb.replace_checksum(at, u32::from(total), udp)?;
    let after: u16 = skb.at(at).ok_or(HelperError)?;
    if after != before {
        if !F::IS_V6 {
            // The IPv4 header's own checksum cancels the addresses; that of layer 4 has cancelled them once more.
            skb.add_to_complete_checksum(!change.addresses);
        }
        return Ok(after);
    }
    Ok(fold16(u64::from(before) + u64::from(change.addresses)))
}

/// The two differences cancel, so the field tells nothing: each is applied by itself.
#[inline(always)]
fn settle_apart<F: Family>(skb: &Skb, at: u32, udp: bool, change: Change) -> Result<u16, HelperError> {
    skb.replace_pseudo_checksum(at, change.addresses, udp)?;
    if F::IS_V6 {
        // The helper assumes an IPv4 header, whose checksum cancels the addresses.
        skb.add_to_complete_checksum(change.addresses);
    }
    skb.replace_checksum(at, change.ports, udp)?;
    skb.at(at).ok_or(HelperError)
}

/// A one's complement sum in 32 bits.
#[inline(always)]
pub(crate) const fn fold(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    (sum + (sum >> 32)) as u32
}

/// A one's complement sum in 16 bits.
#[inline(always)]
pub(crate) const fn fold16(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
