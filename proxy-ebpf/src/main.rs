//! Fairlead's eBPF programs: attach points only. A packet's path is `pipeline.rs`, top to bottom.
//!
//! Links hold the stubs; what they run is a slot of `PROGRAMS`, so a new build is switched in with a few stores.
//!
//! With the feature `flat` the same sources make the programs of devices whose packets begin with the IP header: what
//! differs is a constant (`ctx/tc.rs`) and the map of programs, `PROGRAMS_FLAT`.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
#[macro_use]
extern crate proxy_ebpf;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::classifier;
    use aya_ebpf::programs::TcContext;
    use proxy_common::abi::program;
    use proxy_common::{V4, V6};

    use crate::ctx::tc::FLAT;
    use crate::maps::jump;
    use crate::{hook, pipeline};

    // Slots of their own: a link that holds a stub of the other object is told by it.
    const INGRESS: u32 = if FLAT { program::INGRESS_FLAT } else { program::INGRESS };
    const EGRESS: u32 = if FLAT { program::EGRESS_FLAT } else { program::EGRESS };

    /// What tc ingress of a device runs: a jump to the current [`ingress`].
    #[classifier]
    pub(crate) fn ingress_stub(ctx: TcContext) -> i32 {
        jump!(ctx, INGRESS);
        hook::NEXT
    }

    /// What tc egress of a device runs: a jump to the current [`egress`].
    #[classifier]
    pub(crate) fn egress_stub(ctx: TcContext) -> i32 {
        jump!(ctx, EGRESS);
        hook::NEXT
    }

    /// A packet arrives on a device.
    #[classifier]
    pub(crate) fn ingress(ctx: TcContext) -> i32 {
        pipeline::ingress(&ctx)
    }

    /// A packet leaves by a device.
    #[classifier]
    pub(crate) fn egress(ctx: TcContext) -> i32 {
        pipeline::egress(&ctx)
    }

    // Programs of their own, because they write packets: the kernel begins such a program with code that copies every
    // packet which somebody else holds, as TCP does until the acknowledgement. Traffic that is not ours is spared that.

    /// An IPv4 packet that may be ours arrives.
    #[classifier]
    pub(crate) fn ingress_v4(ctx: TcContext) -> i32 {
        pipeline::arrive::<V4>(&ctx)
    }

    /// An IPv6 packet that may be ours arrives.
    #[classifier]
    pub(crate) fn ingress_v6(ctx: TcContext) -> i32 {
        pipeline::arrive::<V6>(&ctx)
    }

    /// An IPv4 packet that may be ours leaves.
    #[classifier]
    pub(crate) fn egress_v4(ctx: TcContext) -> i32 {
        pipeline::leave::<V4>(&ctx)
    }

    /// An IPv6 packet that may be ours leaves.
    #[classifier]
    pub(crate) fn egress_v6(ctx: TcContext) -> i32 {
        pipeline::leave::<V6>(&ctx)
    }

    /// An IPv4 request leaves whose source is to be exchanged.
    #[classifier]
    pub(crate) fn masquerade_v4(ctx: TcContext) -> i32 {
        pipeline::masquerade::<V4>(&ctx)
    }

    /// An IPv6 request leaves whose source is to be exchanged.
    #[classifier]
    pub(crate) fn masquerade_v6(ctx: TcContext) -> i32 {
        pipeline::masquerade::<V6>(&ctx)
    }

    /// ICMP of IPv4 that may be about a translated packet.
    #[classifier]
    pub(crate) fn icmp_v4(ctx: TcContext) -> i32 {
        pipeline::icmp::<V4>(&ctx)
    }

    /// ICMP of IPv6 that may be about a translated packet.
    #[classifier]
    pub(crate) fn icmp_v6(ctx: TcContext) -> i32 {
        pipeline::icmp::<V6>(&ctx)
    }

    /// An IPv4 packet has arrived that may be a reply.
    #[classifier]
    pub(crate) fn mark_v4(ctx: TcContext) -> i32 {
        pipeline::mark::<V4>(&ctx)
    }

    /// An IPv6 packet has arrived that may be a reply.
    #[classifier]
    pub(crate) fn mark_v6(ctx: TcContext) -> i32 {
        pipeline::mark::<V6>(&ctx)
    }

    // The verifier refuses a program that can reach this: a panic is a build error, not undefined behaviour.
    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(target_arch = "bpf")]
use proxy_ebpf::{ctx, packet};

#[cfg(target_arch = "bpf")]
mod clock;
#[cfg(target_arch = "bpf")]
mod config;
#[cfg(target_arch = "bpf")]
mod hook;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod pipeline;
#[cfg(target_arch = "bpf")]
mod step;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
