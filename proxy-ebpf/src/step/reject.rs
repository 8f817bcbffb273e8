//! The answer to a packet that cannot be served: a TCP RST (RFC 9293 §3.10.7.1), else an ICMP port unreachable
//! (RFC 792, RFC 4443 §3.1), made of the packet itself and sent back where it came from.
//!
//! kube-proxy answers TCP by ICMP as well (rule 62); an ICMPv6 error that arrives while `connect()` holds the socket
//! is not heard before the SYN is repeated a second later, a RST is.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{Config, Direction, FlowKey, tc_index};
use proxy_common::{Family, Outcome, V4, V6, algo::timeout};

use super::rewrite::{self, Rewrite};
use crate::ctx::PacketCtx;
use crate::ctx::tc::{self, FLAT, HelperError, Skb};
use crate::hook::Leave;
use crate::packet::{ACK, ETHERNET, FIN, RST, SYN};
use crate::{config, maps};

/// TTL and hop limit of an answer: `IPDEFTTL`.
const TTL: u8 = 64;
/// Length of a TCP header without options.
const TCP_LEN: u32 = 20;
/// Length of an ICMP header.
const ICMP_LEN: u32 = 8;
/// Room for the quoted packet: the longest IPv4 header and 8 bytes, or an IPv6 header with extension headers.
const QUOTE: usize = 120;
/// ICMP header and quote in one buffer.
const ICMP_ROOM: usize = QUOTE + ICMP_LEN as usize;
/// ICMP and ICMPv6.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Answers, or says why not. `outcome` is the reject that is due.
#[inline(always)]
pub(crate) fn answer<F: Answer>(skb: &Skb, key: &FlowKey<F>, l4: u32, outcome: Outcome) -> (Outcome, Leave) {
    if !take_token() {
        return (Outcome::DropRejectLimit, Leave::NEXT);
    }
    match F::build(skb, key, l4) {
        BUILT => {}
        UNANSWERABLE => return (Outcome::DropUnanswerable, Leave::NEXT),
        _ => return (Outcome::DropHelper, Leave::NEXT),
    }
    skb.set_tc_index(tc_index::REPLY);
    let ifindex = skb.ifindex();
    let inward = key.dir == Direction::Out as u8;
    (outcome, Leave::redirected(if inward { tc::redirect_in(ifindex) } else { tc::redirect_out(ifindex) }))
}

/// The packet has become its answer.
const BUILT: u32 = 0;
/// It must not be answered.
const UNANSWERABLE: u32 = 1;
/// A helper refused.
const FAILED: u32 = 2;

/// One token of this CPU's bucket, filled at the configured rate and holding one second's worth.
#[inline(always)]
fn take_token() -> bool {
    let rate = u64::from(config::get().map_or(Config::REJECT_PER_SEC, |c| c.reject_per_sec));
    let Some(bucket) = maps::reject_bucket() else { return false };
    let now = tc::now_ns();
    // SAFETY: this CPU's own bucket.
    unsafe {
        let earned = now.wrapping_sub((*bucket).filled_ns) / 1_000 * rate / 1_000_000;
        if earned > 0 {
            let tokens = (*bucket).tokens + earned;
            (*bucket).tokens = if tokens > rate { rate } else { tokens };
            (*bucket).filled_ns = now;
        }
        if (*bucket).tokens == 0 {
            return mutant!("rule-62-limit");
        }
        (*bucket).tokens -= 1;
    }
    true
}

/// What differs between the families' answers.
pub(crate) trait Answer: Rewrite {
    /// Writes the IP header of an answer.
    fn write_ip(skb: &Skb, key: &FlowKey<Self>, proto: u8, payload: u32) -> Result<(), HelperError>;
    /// True for addresses nobody may be answered at, and for ICMP errors.
    fn is_unanswerable(skb: &Skb, key: &FlowKey<Self>, l4: u32) -> bool;
    /// Protocol, type and code of "port unreachable".
    const UNREACHABLE: (u8, u8, u8);
    /// True if the ICMP checksum covers the addresses (RFC 4443 §2.3).
    const ICMP_PSEUDO_HEADER: bool;
    /// Makes the packet its answer, as a global subprogram.
    fn build(skb: &Skb, key: &FlowKey<Self>, l4: u32) -> u32;
}

#[inline(always)]
fn build<F: Answer>(skb: &Skb, key: &FlowKey<F>, l4: u32) -> u32 {
    if F::is_unanswerable(skb, key, l4) {
        return UNANSWERABLE;
    }
    let made =
        if key.proto == timeout::TCP && !mutant!("rule-62") { reset(skb, key, l4) } else { unreachable(skb, key, l4) };
    // Without Ethernet nothing is turned round for the device that the packet leaves by.
    let stays = FLAT && key.dir == Direction::Out as u8;
    match made.and_then(|()| if stays { Ok(()) } else { rewrite::turn_round(skb) }) {
        Ok(()) => BUILT,
        Err(HelperError) => FAILED,
    }
}

#[inline(always)]
fn reset<F: Answer>(skb: &Skb, key: &FlowKey<F>, l4: u32) -> Result<(), HelperError> {
    let tcp: [u8; TCP_LEN as usize] = skb.load(l4).ok_or(HelperError)?;
    let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let flags = tcp[13];
    let (seq, ack, flags) = if flags & ACK != 0 {
        ([tcp[8], tcp[9], tcp[10], tcp[11]], [0; 4], RST)
    } else {
        let headers = l4 - ETHERNET - F::HEADER_LEN + u32::from(tcp[12] >> 4) * 4;
        let payload = F::payload_len(skb).ok_or(HelperError)?.wrapping_sub(headers);
        let len = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        ([0; 4], seq.wrapping_add(len).to_be_bytes(), RST | ACK)
    };
    let (from, to) = (key.dport.to_be_bytes(), key.sport.to_be_bytes());
    let mut header = [
        from[0], from[1], to[0], to[1], seq[0], seq[1], seq[2], seq[3], ack[0], ack[1], ack[2], ack[3], 0x50, flags, 0,
        0, 0, 0, 0, 0,
    ];
    let sum = tc::checksum(&header, pseudo_header(key, timeout::TCP, TCP_LEN)?);
    [header[16], header[17]] = fold(sum);
    skb.resize(ETHERNET + F::HEADER_LEN + TCP_LEN)?;
    F::write_ip(skb, key, timeout::TCP, TCP_LEN)?;
    skb.store(ETHERNET + F::HEADER_LEN, &header, true)
}

#[inline(always)]
fn unreachable<F: Answer>(skb: &Skb, key: &FlowKey<F>, l4: u32) -> Result<(), HelperError> {
    let (proto, kind, code) = F::UNREACHABLE;
    let wanted = (l4 - ETHERNET + 8).min(QUOTE as u32).min(skb.len().wrapping_sub(ETHERNET));
    // 1 + (n − 1) & 127 is n for every length that fits, in a form whose bounds the verifier sees.
    let quoted = 1 + (wanted.wrapping_sub(1) & 127);
    let mut message = [0u8; ICMP_ROOM];
    message[0] = kind;
    message[1] = if mutant!("rule-62-kind") { code ^ 1 } else { code };
    skb.load_behind(ETHERNET, &mut message, ICMP_LEN, quoted)?;
    let len = ICMP_LEN + quoted;
    let seed = if F::ICMP_PSEUDO_HEADER { pseudo_header(key, proto, len)? } else { 0 };
    [message[2], message[3]] = fold(tc::checksum(&message, seed));
    skb.resize(ETHERNET + F::HEADER_LEN + len)?;
    F::write_ip(skb, key, proto, len)?;
    skb.store_some(ETHERNET + F::HEADER_LEN, &message, len)
}

/// Sum of the pseudo header of an answer: the key's addresses change places, which changes no sum.
#[inline(always)]
fn pseudo_header<F: Family>(key: &FlowKey<F>, proto: u8, len: u32) -> Result<u32, HelperError> {
    let tail = [0, 0, (len >> 8) as u8, len as u8, 0, 0, 0, proto];
    let sum = tc::checksum_of(&key.src, 0);
    Ok(tc::checksum(&tail, tc::checksum_of(&key.dst, sum)))
}

/// A 32-bit one's complement sum as the checksum field's two bytes.
#[inline(always)]
const fn fold(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

impl Answer for V4 {
    const UNREACHABLE: (u8, u8, u8) = (ICMP, 3, 3);
    const ICMP_PSEUDO_HEADER: bool = false;

    #[inline(always)]
    fn write_ip(skb: &Skb, key: &FlowKey<Self>, proto: u8, payload: u32) -> Result<(), HelperError> {
        let (s, d) = (key.dst.octets, key.src.octets);
        let total = ((Self::HEADER_LEN + payload) as u16).to_be_bytes();
        let mut header = [
            0x45, 0, total[0], total[1], 0, 0, 0x40, 0, TTL, proto, 0, 0, s[0], s[1], s[2], s[3], d[0], d[1], d[2],
            d[3],
        ];
        [header[10], header[11]] = fold(tc::checksum(&header, 0));
        skb.store(ETHERNET, &header, true)
    }

    #[inline(always)]
    fn is_unanswerable(skb: &Skb, key: &FlowKey<Self>, l4: u32) -> bool {
        // RFC 1122 §3.2.2: never to a multicast, broadcast or unspecified source, never to an ICMP error.
        let first = key.src.octets[0];
        if first >= 224 || first == 0 {
            return true;
        }
        key.proto == ICMP && skb.load::<u8>(l4).is_none_or(|kind| matches!(kind, 3 | 4 | 5 | 11 | 12))
    }

    #[inline(always)]
    fn build(skb: &Skb, key: &FlowKey<Self>, l4: u32) -> u32 {
        build_v4(skb.as_ptr(), key, l4)
    }
}

impl Answer for V6 {
    const UNREACHABLE: (u8, u8, u8) = (ICMPV6, 1, 4);
    const ICMP_PSEUDO_HEADER: bool = true;

    #[inline(always)]
    fn write_ip(skb: &Skb, key: &FlowKey<Self>, proto: u8, payload: u32) -> Result<(), HelperError> {
        let len = (payload as u16).to_be_bytes();
        skb.store(ETHERNET, &[0x60, 0, 0, 0, len[0], len[1], proto, TTL], true)?;
        skb.store(ETHERNET + 8, &key.dst, true)?;
        skb.store(ETHERNET + 24, &key.src, true)
    }

    #[inline(always)]
    fn is_unanswerable(skb: &Skb, key: &FlowKey<Self>, l4: u32) -> bool {
        // RFC 4443 §2.4 (e): never to a multicast or unspecified source, never to an ICMPv6 error (types below 128).
        if key.src.octets[0] == 0xff || key.src == Self::UNSPECIFIED {
            return true;
        }
        key.proto == ICMPV6 && skb.load::<u8>(l4).is_none_or(|kind| kind < 128)
    }

    #[inline(always)]
    fn build(skb: &Skb, key: &FlowKey<Self>, l4: u32) -> u32 {
        build_v6(skb.as_ptr(), key, l4)
    }
}

macro_rules! subprogram {
    ($name:ident, $family:ty) => {
        /// Verified by itself, with its own stack.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff, key: *const FlowKey<$family>, l4: u32) -> u32 {
            if key.is_null() {
                return FAILED;
            }
            // SAFETY: not null, and the verifier checks the caller's memory against the type's size.
            build::<$family>(&Skb::new(skb), unsafe { &*key }, l4 & 0xfff)
        }
    };
}

subprogram!(build_v4, V4);
subprogram!(build_v6, V6);
