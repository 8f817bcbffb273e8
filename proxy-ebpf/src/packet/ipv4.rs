//! IPv4 (RFC 791): the fixed header, options skipped, fragments told apart.

use proxy_common::{Addr4, V4};

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
    #[inline(always)]
    fn ip<C: PacketCtx + ?Sized>(ctx: &C) -> Option<Ip<Self>> {
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
        Some(Ip { src: header.src, dst: header.dst, next: header.proto, next_offset, fragment })
    }

    #[inline(always)]
    fn upper<C: PacketCtx + ?Sized>(_: &C, ip: &Ip<Self>) -> Option<Upper> {
        Some(Upper { proto: ip.next, offset: ip.next_offset, fragment: ip.fragment })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{L4, NoL4};

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
            let ip = V4::ip(frame.as_slice()).unwrap();
            let l4 = L4::parse(frame.as_slice(), &ip).unwrap();
            assert_eq!((l4.sport, l4.dport, l4.opens()), (40_000, 80, true), "ihl {ihl}");
            assert_eq!(l4.offset, 14 + u32::from(ihl) * 4);
        }
    }

    #[test]
    fn a_header_length_below_five_words_is_malformed() {
        assert_eq!(V4::ip(frame(4, 0, &syn()).as_slice()), None);
        assert_eq!(V4::ip(&frame(5, 0, &[])[..30]), None);
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let first = frame(5, MORE, &syn());
        let ip = V4::ip(first.as_slice()).unwrap();
        assert_eq!(ip.fragment, Fragment::First);
        assert_eq!(L4::parse(first.as_slice(), &ip).unwrap().dport, 80);
        let later = frame(5, 185, &syn());
        let ip = V4::ip(later.as_slice()).unwrap();
        assert_eq!(L4::parse(later.as_slice(), &ip), Err(NoL4::Fragment));
    }

    #[test]
    fn a_tcp_header_without_its_flags_is_truncated() {
        let cut = frame(5, 0, &syn()[..13]);
        let ip = V4::ip(cut.as_slice()).unwrap();
        assert_eq!(L4::parse(cut.as_slice(), &ip), Err(NoL4::Truncated));
    }
}
