//! What this kernel can do, found by trying, not by its version: distributions carry features back.

use proxy_common::abi::Config as Settings;

use super::sys::{self, Insn};

pub mod kube_proxy;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// tcx links (6.6).
    pub tcx: bool,
    /// `BPF_FIB_LOOKUP_SRC` (6.7).
    pub fib_source: bool,
}

impl Features {
    /// The bits of `CONFIG`.
    pub const fn flags(self) -> u32 {
        if self.fib_source { Settings::FIB_SOURCE } else { 0 }
    }
}

/// Tries everything. Needs the rights to load programs.
pub fn features() -> std::io::Result<Features> {
    // lo, which every network namespace has.
    const LOOPBACK: u32 = 1;
    Ok(Features { tcx: sys::tcx_programs(LOOPBACK, false)?.is_some(), fib_source: fib_lookup_source()? })
}

/// True if the node has IPv6 at all (rule 97).
pub fn has_ipv6() -> bool {
    let disabled = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    std::path::Path::new("/proc/net/if_inet6").exists() && disabled.is_ok_and(|text| text.trim() == "0")
}

const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R10: u8 = 10;

/// `dst = imm`.
const fn set(dst: u8, imm: i32) -> Insn {
    Insn { code: 0xb7, dst, src: 0, off: 0, imm }
}

/// `dst = src`.
const fn copy(dst: u8, src: u8) -> Insn {
    Insn { code: 0xbf, dst, src, off: 0, imm: 0 }
}

/// `dst += imm`.
const fn add(dst: u8, imm: i32) -> Insn {
    Insn { code: 0x07, dst, src: 0, off: 0, imm }
}

/// `*(u64 *)(dst + off) = imm`.
const fn store(dst: u8, off: i16, imm: i32) -> Insn {
    Insn { code: 0x7a, dst, src: 0, off, imm }
}

const fn call(helper: i32) -> Insn {
    Insn { code: 0x85, dst: 0, src: 0, off: 0, imm: helper }
}

const EXIT: Insn = Insn { code: 0x95, dst: 0, src: 0, off: 0, imm: 0 };

/// `bpf_fib_lookup` looks at its flags before it looks at the address family: with an unknown flag it answers EINVAL,
/// with all flags known and no family EAFNOSUPPORT.
fn fib_lookup_source() -> std::io::Result<bool> {
    const FIB_LOOKUP: i32 = 69;
    const FIB_LOOKUP_SRC: i32 = 16;
    const PARAMS: i16 = 64;
    let mut insns: Vec<Insn> = (1..=PARAMS / 8).map(|word| store(R10, -8 * word, 0)).collect();
    insns.extend([
        copy(R2, R10),
        add(R2, -i32::from(PARAMS)),
        set(R3, PARAMS.into()),
        set(R4, FIB_LOOKUP_SRC),
        call(FIB_LOOKUP),
        EXIT,
    ]);
    Ok(sys::try_classifier(&insns)? == -libc::EAFNOSUPPORT)
}
