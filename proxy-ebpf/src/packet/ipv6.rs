//! IPv6 (RFC 8200): the fixed header, and the walk over extension headers to layer 4.

use proxy_common::abi::FlowKey;
use proxy_common::{Addr6, Address as _, V6};

use super::{ETHERNET, Fragment, Ip, Parse, Upper, has_ports};
use crate::ctx::{PacketCtx, Plain};

#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version_class: u8,
    class_label: u8,
    label: u16,
    payload_len: u16,
    next: u8,
    hop_limit: u8,
    // Words and no arrays, which would be copied byte by byte.
    src0: u32,
    src1: u32,
    src2: u32,
    src3: u32,
    dst0: u32,
    dst1: u32,
    dst2: u32,
    dst3: u32,
}

// SAFETY: integers, 40 bytes without padding.
unsafe impl Plain for Header {}
const _: () = assert!(size_of::<Header>() == 40);

/// Hop-by-hop options, routing, destination options, authentication (RFC 8200 §4, RFC 4302), mobility (RFC 6275).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
/// Longest chain that is followed; RFC 8200 recommends each header at most once, which makes six.
const CHAIN: usize = 6;

impl Parse for V6 {
    const ICMP: u8 = 58;

    #[inline(always)]
    fn next<C: PacketCtx + ?Sized>(ctx: &C) -> Option<u8> {
        ctx.load_at::<u8, { ETHERNET + 6 }>()
    }

    #[inline(always)]
    fn fragment_id<C: PacketCtx + ?Sized>(ctx: &C, upper: Upper) -> Option<u32> {
        // A later fragment stands where its fragment header does; the first one's header stands before layer 4.
        let header = if upper.fragment() == Some(Fragment::Later) { upper.offset() } else { upper.offset() - 8 };
        ctx.load::<u32>(header + 4)
    }

    #[inline(always)]
    fn ip<C: PacketCtx + ?Sized>(ctx: &C, key: &mut FlowKey<Self>) -> Option<Ip> {
        let header = ctx.load_at::<Header, ETHERNET>()?;
        if header.version_class >> 4 != 6 {
            return None;
        }
        let next_offset = ETHERNET + 40;
        key.src = Addr6::of_words([header.src0, header.src1, header.src2, header.src3]);
        key.dst = Addr6::of_words([header.dst0, header.dst1, header.dst2, header.dst3]);
        Some(Ip { next: header.next, next_offset, fragment: Fragment::Whole })
    }

    #[inline(always)]
    fn addresses<C: PacketCtx + ?Sized>(ctx: &C) -> Option<(Addr6, Addr6)> {
        let [src, dst] = ctx.load_at::<[[u32; 4]; 2], { ETHERNET + 8 }>()?;
        Some((Addr6::of_words(src), Addr6::of_words(dst)))
    }

    #[inline(always)]
    fn destination<C: PacketCtx + ?Sized>(ctx: &C) -> Option<Addr6> {
        ctx.load_at::<[u32; 4], { ETHERNET + 24 }>().map(Addr6::of_words)
    }

    #[inline(always)]
    fn upper<C: PacketCtx + ?Sized>(ctx: &C, ip: &Ip) -> Upper {
        if has_ports(ip.next) {
            return Upper::new(ip.next, ip.next_offset, Fragment::Whole);
        }
        walk(ctx, ip.next, ip.next_offset)
    }
}

/// Follows extension headers. A function of its own: few packets have any.
#[inline(never)]
fn walk<C: PacketCtx + ?Sized>(ctx: &C, next: u8, offset: u32) -> Upper {
    let (mut proto, mut offset, mut fragment) = (next, offset, Fragment::Whole);
    for _ in 0..CHAIN {
        let length = match proto {
            HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY => {
                let Some([next, length]) = ctx.load::<[u8; 2]>(offset) else { return Upper::NONE };
                proto = next;
                (u32::from(length) + 1) * 8
            }
            AUTHENTICATION => {
                let Some([next, length]) = ctx.load::<[u8; 2]>(offset) else { return Upper::NONE };
                proto = next;
                (u32::from(length) + 2) * 4
            }
            FRAGMENT => {
                let Some([next, _, high, low]) = ctx.load::<[u8; 4]>(offset) else { return Upper::NONE };
                proto = next;
                let word = u16::from_be_bytes([high, low]);
                if word & 0xfff8 != 0 {
                    return Upper::new(proto, offset, Fragment::Later);
                }
                if word & 1 != 0 {
                    fragment = Fragment::First;
                }
                8
            }
            _ => return Upper::new(proto, offset, fragment),
        };
        offset += length;
    }
    match proto {
        HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY | AUTHENTICATION | FRAGMENT => Upper::NONE,
        _ => Upper::new(proto, offset, fragment),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::tests::{ip, read};
    use crate::packet::{L4, Unread};

    fn frame(next: u8, behind: &[&[u8]]) -> Vec<u8> {
        let mut f = vec![0; 12];
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, next, 64]);
        f.extend([1; 16]);
        f.extend([2; 16]);
        behind.iter().for_each(|part| f.extend_from_slice(part));
        f
    }

    const UDP: [u8; 8] = [0x9c, 0x40, 0, 53, 0, 8, 0, 0];

    fn parse(frame: &[u8]) -> Result<L4, Unread> {
        read::<V6>(frame).map(|(_, l4)| l4)
    }

    #[test]
    fn extension_headers_are_followed_to_the_ports() {
        let hop = [DESTINATION, 0, 1, 4, 0, 0, 0, 0];
        let options = [17, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let l4 = parse(&frame(HOP_BY_HOP, &[&hop, &options, &UDP])).unwrap();
        assert_eq!((l4.proto, l4.dport, l4.offset), (17, 53, 14 + 40 + 8 + 16));
        assert_eq!(parse(&frame(17, &[&UDP])).unwrap().offset, 54);
    }

    #[test]
    fn fragments_are_told_apart() {
        let first = [17, 0, 0, 1, 0, 0, 0, 9];
        assert_eq!(parse(&frame(FRAGMENT, &[&first, &UDP])).unwrap().dport, 53);
        let later = [17, 0, 0x05, 0xa8, 0, 0, 0, 9];
        assert_eq!(parse(&frame(FRAGMENT, &[&later, &UDP])), Err(Unread::Fragment));
        // An atomic fragment (RFC 6946) is a whole packet.
        let atomic = [17, 0, 0, 0, 0, 0, 0, 9];
        let f = frame(FRAGMENT, &[&atomic, &UDP]);
        assert_eq!(V6::upper(f.as_slice(), &ip::<V6>(&f).unwrap()).fragment(), Some(Fragment::Whole));
    }

    #[test]
    fn a_chain_that_is_cut_off_or_endless_is_truncated() {
        let hop = [HOP_BY_HOP, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(parse(&frame(HOP_BY_HOP, &[&hop[..]; 6])), Err(Unread::Truncated));
        assert_eq!(parse(&frame(HOP_BY_HOP, &[&hop[..1]])), Err(Unread::Truncated));
    }
}
