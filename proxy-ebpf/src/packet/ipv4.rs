//! IPv4 (RFC 791): the fixed header, options skipped, fragments told apart.

use proxy_common::abi::FlowKey;
use proxy_common::{Addr4, Address as _, V4};

use super::{ETHERNET, Fragment, Ip, Parse, Upper};
use crate::ctx::{PacketCtx, Plain};

#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version_ihl: u8,
    tos: u8,
    total_len_be: u16,
    id: u16,
    fragment_be: u16,
    ttl: u8,
    proto: u8,
    checksum: u16,
    src: Addr4,
    dst: Addr4,
}

// SAFETY: integers and octets, 20 bytes without padding.
unsafe impl Plain for Header {}
const _: () = assert!(size_of::<Header>() == 20);

/// "More fragments" (RFC 791 §3.1).
const MORE: u16 = 0x2000;
/// Fragment offset, in units of 8 bytes.
const OFFSET: u16 = 0x1fff;

impl Parse for V4 {
    const ICMP: u8 = 1;

    #[inline(always)]
    fn next<C: PacketCtx + ?Sized>(ctx: &C) -> Option<u8> {
        ctx.load_at::<u8, { ETHERNET + 9 }>()
    }

    #[inline(always)]
    fn fragment_id<C: PacketCtx + ?Sized>(ctx: &C, _: Upper) -> Option<u32> {
        ctx.load_at::<u16, { ETHERNET + 4 }>().map(u32::from)
    }

    #[inline(always)]
    fn ip<C: PacketCtx + ?Sized>(ctx: &C, key: &mut FlowKey<Self>) -> Option<Ip> {
        let header = ctx.load_at::<Header, ETHERNET>()?;
        let ihl = u32::from(header.version_ihl & 0x0f);
        if header.version_ihl >> 4 != 4 || ihl < 5 {
            return None;
        }
        let word = u16::from_be(header.fragment_be);
        let fragment = match (word & OFFSET, word & MORE) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        let next_offset = ETHERNET + ihl * 4;
        (key.src, key.dst) = (header.src, header.dst);
        Some(Ip { next: header.proto, next_offset, fragment })
    }

    #[inline(always)]
    fn addresses<C: PacketCtx + ?Sized>(ctx: &C) -> Option<(Addr4, Addr4)> {
        let [src, dst] = ctx.load_at::<[u32; 2], { ETHERNET + 12 }>()?;
        Some((Addr4::of_words([src, 0, 0, 0]), Addr4::of_words([dst, 0, 0, 0])))
    }

    #[inline(always)]
    fn destination<C: PacketCtx + ?Sized>(ctx: &C) -> Option<Addr4> {
        ctx.load_at::<Addr4, { ETHERNET + 16 }>()
    }

    #[inline(always)]
    fn upper<C: PacketCtx + ?Sized>(_: &C, ip: &Ip) -> Upper {
        Upper::new(ip.next, ip.next_offset, ip.fragment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Unread;
    use crate::packet::tests::{ip, read};

    /// Ethernet, an IPv4 header with this many words and this fragment word, then TCP 40000 → 80 SYN.
    fn frame(ihl: u8, fragment: u16, l4: &[u8]) -> Vec<u8> {
        let mut f = vec![0; 12];
        f.extend([0x08, 0x00, 0x40 | ihl, 0, 0, 0, 0, 1]);
        f.extend(fragment.to_be_bytes());
        f.extend([64, 6, 0, 0, 10, 0, 0, 1, 10, 96, 0, 1]);
        f.extend(vec![1; usize::from(ihl.saturating_sub(5)) * 4]);
        f.extend(l4);
        f
    }

    fn syn() -> Vec<u8> {
        let mut tcp = vec![0x9c, 0x40, 0, 80];
        tcp.extend([0; 8]);
        tcp.extend([0x50, 0x02, 0, 0, 0, 0, 0, 0]);
        tcp
    }

    #[test]
    fn options_move_the_ports() {
        for ihl in [5, 6, 15] {
            let frame = frame(ihl, 0, &syn());
            let (key, l4) = read::<V4>(&frame).unwrap();
            assert_eq!((key.sport, key.dport, l4.opens()), (40_000, 80, true), "ihl {ihl}");
            assert_eq!((key.src.octets, key.dst.octets), ([10, 0, 0, 1], [10, 96, 0, 1]));
            assert_eq!(l4.offset, 14 + u32::from(ihl) * 4);
        }
    }

    #[test]
    fn a_header_length_below_five_words_is_malformed() {
        assert_eq!(read::<V4>(&frame(4, 0, &syn())).unwrap_err(), Unread::Malformed);
        assert_eq!(read::<V4>(&frame(5, 0, &[])[..30]).unwrap_err(), Unread::Malformed);
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let first = frame(5, MORE, &syn());
        assert_eq!(ip::<V4>(&first).unwrap().fragment, Fragment::First);
        assert_eq!(read::<V4>(&first).unwrap().0.dport, 80);
        assert_eq!(read::<V4>(&frame(5, 185, &syn())).unwrap_err(), Unread::Fragment);
    }

    #[test]
    fn a_tcp_header_without_its_flags_is_truncated() {
        let cut = frame(5, 0, &syn()[..13]);
        assert_eq!(read::<V4>(&cut).unwrap_err(), Unread::Truncated);
    }
}
