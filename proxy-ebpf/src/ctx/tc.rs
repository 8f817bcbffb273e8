//! The tc hooks' packet: `struct __sk_buff` and its helpers. The only file that calls them.
//!
//! Offsets count from the first byte of an Ethernet header, also where there is none: the packets of flat devices (tun,
//! IPIP, WireGuard) begin with the IP header, and everybody else may forget that.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_csum_update, bpf_fib_lookup, bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_l4_csum_replace,
    bpf_redirect, bpf_redirect_neigh, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_change_head, bpf_skb_change_tail,
    bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skc_lookup_tcp,
};
use proxy_common::algo::timeout;
use proxy_common::{Address as _, Family};

use super::{PacketCtx, Plain};
use crate::packet::ETHERNET;

/// True in the object for devices without an Ethernet header.
pub const FLAT: bool = cfg!(feature = "flat");
/// Bytes that an offset counts and the packet lacks.
const ABSENT: u32 = if FLAT { ETHERNET } else { 0 };

/// An offset into the bytes that are there.
#[inline(always)]
const fn there(offset: u32) -> u32 {
    offset.wrapping_sub(ABSENT)
}

/// A helper refused.
#[derive(Clone, Copy, Debug)]
pub struct HelperError;

/// `skb->pkt_type` of a frame addressed to the device (`include/uapi/linux/if_packet.h`).
const PACKET_HOST: u32 = 0;
/// `BPF_F_CURRENT_NETNS`: the namespace of the device.
const BPF_F_CURRENT_NETNS: i32 = -1;
/// `BPF_F_MARK_MANGLED_0`: leave a zero checksum zero, never make one (UDP).
const MARK_MANGLED_0: u64 = 1 << 5;

/// A packet at a tc hook.
#[derive(Clone, Copy)]
pub struct Skb {
    skb: *mut __sk_buff,
}

/// `struct bpf_fib_lookup` (`include/uapi/linux/bpf.h`), with addresses as octets.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Fib {
    family: u8,
    l4_protocol: u8,
    sport: u16,
    dport: u16,
    tot_len: u16,
    /// In: the device the packet enters by. Out: the device it leaves by.
    pub ifindex: u32,
    tos_or_flowinfo: u32,
    /// Source; with [`Fib::SOURCE`] the preferred one comes back here.
    pub src: [u8; 16],
    /// Destination; a gateway's address comes back here.
    pub dst: [u8; 16],
    vlan: [u16; 2],
    /// MAC of the device the packet leaves by.
    pub smac: [u8; 6],
    /// MAC of the next hop.
    pub dmac: [u8; 6],
}

impl Fib {
    /// `BPF_FIB_LKUP_RET_SUCCESS`.
    pub const SUCCESS: i64 = 0;
    /// `BPF_FIB_LKUP_RET_NOT_FWDED`: the destination is the node itself.
    pub const NOT_FORWARDED: i64 = 4;
    /// `BPF_FIB_LKUP_RET_NO_NEIGH`: the route is known, the neighbour's MAC is not.
    pub const NO_NEIGHBOUR: i64 = 7;
    /// `BPF_FIB_LKUP_RET_FRAG_NEEDED`: the route is known, the packet exceeds its MTU.
    pub const TOO_LONG: i64 = 8;
    /// `BPF_FIB_LOOKUP_SRC` (6.7): give back the preferred source address.
    pub const SOURCE: u32 = 1 << 4;

    /// A question about this destination, for a packet that enters by `ifindex`.
    #[inline(always)]
    pub fn new<F: Family>(ifindex: u32, src: &F::Addr, dst: &F::Addr) -> Self {
        let mut fib = Self {
            family: F::AF,
            l4_protocol: 0,
            sport: 0,
            dport: 0,
            tot_len: 0,
            ifindex,
            tos_or_flowinfo: 0,
            src: [0; 16],
            dst: [0; 16],
            vlan: [0; 2],
            smac: [0; 6],
            dmac: [0; 6],
        };
        // SAFETY: F::Addr is Addr4 or Addr6: 4 or 16 plain bytes, and both fields hold 16.
        unsafe {
            fib.src.as_mut_ptr().cast::<F::Addr>().write_unaligned(*src);
            fib.dst.as_mut_ptr().cast::<F::Addr>().write_unaligned(*dst);
        }
        fib
    }

    /// The source address that came back.
    #[inline(always)]
    pub fn source<F: Family>(&self) -> F::Addr {
        // SAFETY: as in `new`.
        unsafe { self.src.as_ptr().cast::<F::Addr>().read_unaligned() }
    }
}

// Field reads go through volatile loads: the verifier accepts `ctx` accesses only at the field's own offset and width,
// which merged or narrowed loads would miss.
macro_rules! field {
    ($(#[doc = $doc:literal])+ $name:ident, $field:ident) => {
        $(#[doc = $doc])+
        #[inline(always)]
        pub fn $name(&self) -> u32 {
            // SAFETY: the kernel passes a valid context.
            unsafe { (&raw const (*self.skb).$field).read_volatile() }
        }
    };
}

impl Skb {
    /// Wraps the kernel's context.
    #[inline(always)]
    pub const fn new(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    /// The context, for a global subprogram.
    #[inline(always)]
    pub const fn as_ptr(&self) -> *mut __sk_buff {
        self.skb
    }

    field! {
        /// Bytes that are there.
        bytes, len
    }
    field! {
        /// The device whose hook runs.
        ifindex, ifindex
    }
    field! {
        /// The device the packet came in by; 0 for a packet of the node's own.
        ingress_ifindex, ingress_ifindex
    }
    field! {
        /// EtherType, network order.
        protocol_be, protocol
    }
    field! {
        /// Non-zero if the frame carries a VLAN tag beside its bytes.
        vlan_present, vlan_present
    }
    field! {
        /// What ingress told egress.
        tc_index, tc_index
    }
    field! {
        /// Everybody's bits.
        mark, mark
    }

    /// Length of the frame, bytes.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.bytes() + ABSENT
    }

    /// True if the frame is addressed to the device itself. Without Ethernet there is nobody else to address.
    #[inline(always)]
    pub fn is_for_device(&self) -> bool {
        // SAFETY: the kernel passes a valid context.
        FLAT || unsafe { (&raw const (*self.skb).pkt_type).read_volatile() == PACKET_HOST }
    }

    /// Tells the program that is jumped to. The last word of the control block: nobody else's is known to be used by
    /// more than the first ones.
    #[inline(always)]
    pub fn set_note(&self, note: u8) {
        // SAFETY: the kernel passes a valid context, and tc programs may write this field.
        unsafe { (&raw mut (*self.skb).cb[4]).write_volatile(u32::from(note)) }
    }

    /// What the program that jumped here said.
    #[inline(always)]
    pub fn note(&self) -> u8 {
        // SAFETY: the kernel passes a valid context.
        unsafe { (&raw const (*self.skb).cb[4]).read_volatile() as u8 }
    }

    /// `skb->mark` becomes this.
    #[inline(always)]
    pub fn set_mark(&self, value: u32) {
        // SAFETY: the kernel passes a valid context, and tc programs may write this field.
        unsafe { (&raw mut (*self.skb).mark).write_volatile(value) }
    }

    /// Tells egress.
    #[inline(always)]
    pub fn set_tc_index(&self, value: u16) {
        // SAFETY: the kernel passes a valid context, and tc programs may write this field.
        unsafe { (&raw mut (*self.skb).tc_index).write_volatile(u32::from(value)) }
    }

    /// Where the linear part begins and ends.
    #[inline(always)]
    fn linear(&self) -> (usize, usize) {
        // SAFETY: valid context.
        unsafe {
            let data = (&raw const (*self.skb).data).read_volatile() as usize;
            (data, (&raw const (*self.skb).data_end).read_volatile() as usize)
        }
    }

    /// Overwrites bytes, with the checksum of a `CHECKSUM_COMPLETE` packet kept right if `recompute`.
    #[inline(always)]
    pub fn store<T: Copy>(&self, offset: u32, value: &T, recompute: bool) -> Result<(), HelperError> {
        let flags = if recompute { u64::from(BPF_F_RECOMPUTE_CSUM) } else { 0 };
        let from = core::ptr::from_ref(value).cast();
        // SAFETY: valid context; `value` is as long as stated.
        check(unsafe { bpf_skb_store_bytes(self.skb, there(offset), from, size_of::<T>() as u32, flags) })
    }

    /// Reads at an offset that is not known when compiling, where the bytes are at hand as a rule.
    #[inline(always)]
    pub fn at<T: Plain>(&self, offset: u32) -> Option<T> {
        // The verifier wants a bound; no header lies beyond.
        let offset = there(offset) & 0xfff;
        let len = offset + size_of::<T>() as u32;
        let (mut data, mut end) = self.linear();
        if data + len as usize > end {
            // SAFETY: valid context.
            if unsafe { bpf_skb_pull_data(self.skb, len) } != 0 {
                return None;
            }
            (data, end) = self.linear();
        }
        let start = data + offset as usize;
        if start + size_of::<T>() > end {
            return None;
        }
        // SAFETY: within the linear part, which the verifier checks too. Headers are aligned (NET_IP_ALIGN).
        Some(unsafe { (start as *const T).read() })
    }

    /// Overwrites a field, which has been read before. The kernel has made the packet ours when the program began; sums
    /// are the caller's affair.
    #[inline(always)]
    pub fn write<T: Plain>(&self, offset: u32, value: T) -> Result<(), HelperError> {
        let (data, end) = self.linear();
        let start = data + (there(offset) & 0xfff) as usize;
        if start + size_of::<T>() > end {
            return Err(HelperError);
        }
        // SAFETY: within the linear part, which the verifier checks too, and aligned as in `at`.
        unsafe { (start as *mut T).write(value) }
        Ok(())
    }

    /// Overwrites an IPv6 address.
    #[inline(always)]
    pub fn write_words(&self, offset: u32, words: [u32; 4]) -> Result<(), HelperError> {
        let (data, end) = self.linear();
        let start = data + (there(offset) & 0xfff) as usize;
        if start + 16 > end {
            return Err(HelperError);
        }
        let to = start as *mut u32;
        // SAFETY: as in `write`. Word by word: an array would be copied byte by byte.
        unsafe {
            to.write(words[0]);
            to.add(1).write(words[1]);
            to.add(2).write(words[2]);
            to.add(3).write(words[3]);
        }
        Ok(())
    }

    /// Adds to the sum that a `CHECKSUM_COMPLETE` packet carries; any other has none.
    #[inline(always)]
    pub fn add_to_complete_checksum(&self, diff: u32) {
        // SAFETY: valid context.
        let _none: i64 = unsafe { bpf_csum_update(self.skb, diff) };
    }

    /// Adds a difference of addresses to the layer 4 checksum at `offset`, partial or not.
    #[inline(always)]
    pub fn replace_pseudo_checksum(&self, offset: u32, diff: u32, udp: bool) -> Result<(), HelperError> {
        let flags = u64::from(BPF_F_PSEUDO_HDR) | if udp && !mutant!("no-zero-checksum") { MARK_MANGLED_0 } else { 0 };
        // SAFETY: valid context.
        check(unsafe { bpf_l4_csum_replace(self.skb, there(offset), 0, diff.into(), flags) })
    }

    /// Adds a difference to the layer 4 checksum at `offset`, unless it is a partial one.
    #[inline(always)]
    pub fn replace_checksum(&self, offset: u32, diff: u32, udp: bool) -> Result<(), HelperError> {
        let flags = if udp && !mutant!("no-zero-checksum") { MARK_MANGLED_0 } else { 0 };
        // SAFETY: valid context.
        check(unsafe { bpf_l4_csum_replace(self.skb, there(offset), 0, diff.into(), flags) })
    }

    /// Cuts or grows the frame.
    #[inline(always)]
    pub fn resize(&self, len: u32) -> Result<(), HelperError> {
        // SAFETY: valid context.
        check(unsafe { bpf_skb_change_tail(self.skb, there(len), 0) })
    }

    /// Copies `len` bytes at `offset` into `buffer`, behind its first `skip` bytes. `skip + len` must fit.
    #[inline(always)]
    pub fn load_behind<const N: usize>(
        &self,
        offset: u32,
        buffer: &mut [u8; N],
        skip: u32,
        len: u32,
    ) -> Result<(), HelperError> {
        if skip + len > N as u32 {
            return Err(HelperError);
        }
        // SAFETY: valid context; `len` bytes behind `skip` are within the buffer.
        check(unsafe {
            bpf_skb_load_bytes(self.skb.cast(), there(offset), buffer.as_mut_ptr().add(skip as usize).cast(), len)
        })
    }

    /// Stores the first `len` bytes of `buffer` at `offset`.
    #[inline(always)]
    pub fn store_some<const N: usize>(&self, offset: u32, buffer: &[u8; N], len: u32) -> Result<(), HelperError> {
        if len == 0 || len > N as u32 {
            return Err(HelperError);
        }
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        // SAFETY: valid context; `len` is within the buffer.
        check(unsafe { bpf_skb_store_bytes(self.skb, there(offset), buffer.as_ptr().cast(), len, flags) })
    }

    /// True if a socket of the node would receive what `peer` sends to this address and port of it.
    #[inline(always)]
    pub fn has_socket<F: Family>(
        &self,
        proto: u8,
        peer: &F::Addr,
        peer_port: u16,
        own: &F::Addr,
        own_port: u16,
    ) -> bool {
        let (s, d) = (peer.words(), own.words());
        let ports = u32::from(peer_port.to_be()) | u32::from(own_port.to_be()) << 16;
        // `struct bpf_sock_tuple`: both addresses, then both ports in network order.
        let mut tuple = if F::IS_V6 {
            [s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3], ports]
        } else {
            [s[0], d[0], ports, 0, 0, 0, 0, 0, 0]
        };
        let (tuple, size) = (tuple.as_mut_ptr().cast(), if F::IS_V6 { 36 } else { 12 });
        let (skb, here) = (self.skb.cast(), BPF_F_CURRENT_NETNS as i64 as u64);
        // SAFETY: valid context; the tuple is as long as stated. What was found is given back.
        unsafe {
            let found = match proto {
                timeout::TCP => bpf_skc_lookup_tcp(skb, tuple, size, here, 0),
                timeout::UDP => bpf_sk_lookup_udp(skb, tuple, size, here, 0),
                _ => return false,
            };
            if found.is_null() {
                return false;
            }
            bpf_sk_release(found.cast());
        }
        true
    }

    /// Puts an Ethernet header of zeros before a packet that has none. Offsets mean nothing any more after that.
    #[inline(always)]
    pub fn push_ethernet(&self) -> Result<(), HelperError> {
        // SAFETY: valid context.
        check(unsafe { bpf_skb_change_head(self.skb, ETHERNET, 0) })
    }

    /// Overwrites the first bytes that are there.
    #[inline(always)]
    pub fn store_first<const N: usize>(&self, value: &[u8; N]) -> Result<(), HelperError> {
        // SAFETY: valid context; `value` is as long as stated.
        check(unsafe { bpf_skb_store_bytes(self.skb, 0, value.as_ptr().cast(), N as u32, 0) })
    }

    /// Asks the kernel's routing.
    #[inline(always)]
    pub fn route(&self, fib: &mut Fib, flags: u32) -> i64 {
        let params = core::ptr::from_mut(fib).cast();
        // SAFETY: valid context; `Fib` is `struct bpf_fib_lookup`.
        unsafe { bpf_fib_lookup(self.skb.cast(), params, size_of::<Fib>() as i32, flags) }
    }
}

const _: () = assert!(size_of::<Fib>() == 64, "struct bpf_fib_lookup is 64 bytes (include/uapi/linux/bpf.h)");

impl PacketCtx for Skb {
    #[inline(always)]
    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        let mut value = core::mem::MaybeUninit::<T>::uninit();
        // SAFETY: valid context; `value` is as long as stated.
        let (to, offset) = (value.as_mut_ptr().cast(), there(offset));
        let ret = unsafe { bpf_skb_load_bytes(self.skb.cast(), offset, to, size_of::<T>() as u32) };
        // SAFETY: on success the helper filled it, and `Plain` allows every byte pattern.
        if ret == 0 { Some(unsafe { value.assume_init() }) } else { None }
    }

    // One way only: a second one through the stack would make each header a copy, byte by byte where the two meet.
    #[inline(always)]
    fn load_at<T: Plain, const OFFSET: u32>(&self) -> Option<T> {
        let offset = const { there(OFFSET) };
        let len = offset.wrapping_add(size_of::<T>() as u32);
        let (mut data, mut end) = self.linear();
        if data + len as usize > end {
            // SAFETY: valid context. Headers that lie in fragments are brought into the linear part.
            if unsafe { bpf_skb_pull_data(self.skb, len) } != 0 {
                return None;
            }
            (data, end) = self.linear();
            if data + len as usize > end {
                return None;
            }
        }
        // SAFETY: within the linear part, which the verifier checks too. The kernel keeps the IP header aligned
        // (NET_IP_ALIGN), and header types are read nowhere else.
        Some(unsafe { ((data + offset as usize) as *const T).read() })
    }
}

/// One's complement sum of an address on top of `seed`.
#[inline(always)]
pub fn checksum_of<T: Copy>(value: &T, seed: u32) -> u32 {
    let to = core::ptr::from_ref(value).cast_mut().cast();
    // SAFETY: `T`'s bytes, a multiple of 4; the helper writes none.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, to, size_of::<T>() as u32, seed) as u32 }
}

/// One's complement sum of a buffer on top of `seed`.
#[inline(always)]
pub fn checksum<const N: usize>(buffer: &[u8; N], seed: u32) -> u32 {
    let to = buffer.as_ptr().cast_mut().cast();
    // SAFETY: N readable bytes, a multiple of 4; the helper writes none.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, to, N as u32, seed) as u32 }
}

/// Lets the packet arrive at a device.
#[inline(always)]
pub fn redirect_in(ifindex: u32) -> i32 {
    // SAFETY: no pointers involved.
    unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}

/// Sends the packet out of a device as it stands. A flat device may be a tunnel that asks the packet's route whom to wrap
/// it for, so there the kernel is to find one.
#[inline(always)]
pub fn redirect_out(ifindex: u32) -> i32 {
    if FLAT {
        return redirect_neighbour(ifindex);
    }
    // SAFETY: no pointers involved.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

/// Sends the packet out of a device, resolving the next hop. The kernel takes an Ethernet header off first, so there must be
/// one: see [`Skb::push_ethernet`].
#[inline(always)]
pub fn redirect_neighbour(ifindex: u32) -> i32 {
    // SAFETY: no parameters: the kernel takes the packet's own destination.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Nanoseconds of `CLOCK_MONOTONIC`, to the tick.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no pointers involved.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The kernel's tick counter; the verifier makes it a load.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: no pointers involved.
    unsafe { bpf_jiffies64() }
}

#[inline(always)]
const fn check(ret: i64) -> Result<(), HelperError> {
    if ret == 0 { Ok(()) } else { Err(HelperError) }
}
