//! IPv6 (RFC 8200): the fixed header, and the walk over extension headers to layer 4.

use proxy_common::{Addr6, V6};

use super::{ETHERNET, Fragment, Ip, Parse, Upper};
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
    src: Addr6,
    dst: Addr6,
}

// SAFETY: integers and octets, 40 bytes without padding.
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
    #[inline(always)]
    fn ip<C: PacketCtx + ?Sized>(ctx: &C) -> Option<Ip<Self>> {
        let header = ctx.load_at::<Header, ETHERNET>()?;
        if header.version_class >> 4 != 6 {
            return None;
        }
        let next_offset = ETHERNET + 40;
        Some(Ip { src: header.src, dst: header.dst, next: header.next, next_offset, fragment: Fragment::Whole })
    }

    #[inline(always)]
    fn upper<C: PacketCtx + ?Sized>(ctx: &C, ip: &Ip<Self>) -> Option<Upper> {
        let mut upper = Upper { proto: ip.next, offset: ip.next_offset, fragment: Fragment::Whole };
        for _ in 0..CHAIN {
            let length = match upper.proto {
                HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY => {
                    let head: [u8; 2] = ctx.load(upper.offset)?;
                    upper.proto = head[0];
                    (u32::from(head[1]) + 1) * 8
                }
                AUTHENTICATION => {
                    let head: [u8; 2] = ctx.load(upper.offset)?;
                    upper.proto = head[0];
                    (u32::from(head[1]) + 2) * 4
                }
                FRAGMENT => {
                    let head: [u8; 4] = ctx.load(upper.offset)?;
                    upper.proto = head[0];
                    let word = u16::from_be_bytes([head[2], head[3]]);
                    if word & 0xfff8 != 0 {
                        upper.fragment = Fragment::Later;
                        return Some(upper);
                    }
                    if word & 1 != 0 {
                        upper.fragment = Fragment::First;
                    }
                    8
                }
                _ => return Some(upper),
            };
            upper.offset += length;
        }
        match upper.proto {
            HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY | AUTHENTICATION | FRAGMENT => None,
            _ => Some(upper),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{L4, NoL4};

    fn frame(next: u8, behind: &[&[u8]]) -> Vec<u8> {
        let mut f = vec![0; 12];
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, next, 64]);
        f.extend([1; 16]);
        f.extend([2; 16]);
        behind.iter().for_each(|part| f.extend_from_slice(part));
        f
    }

    const UDP: [u8; 8] = [0x9c, 0x40, 0, 53, 0, 8, 0, 0];

    fn parse(frame: &[u8]) -> Result<L4, NoL4> {
        L4::parse(frame, &V6::ip(frame).unwrap())
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
        assert_eq!(parse(&frame(FRAGMENT, &[&later, &UDP])), Err(NoL4::Fragment));
        // An atomic fragment (RFC 6946) is a whole packet.
        let atomic = [17, 0, 0, 0, 0, 0, 0, 9];
        let f = frame(FRAGMENT, &[&atomic, &UDP]);
        assert_eq!(V6::upper(f.as_slice(), &V6::ip(f.as_slice()).unwrap()).unwrap().fragment, Fragment::Whole);
    }

    #[test]
    fn a_chain_that_is_cut_off_or_endless_is_truncated() {
        let hop = [HOP_BY_HOP, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(parse(&frame(HOP_BY_HOP, &[&hop[..]; 6])), Err(NoL4::Truncated));
        assert_eq!(parse(&frame(HOP_BY_HOP, &[&hop[..1]])), Err(NoL4::Truncated));
    }
}
