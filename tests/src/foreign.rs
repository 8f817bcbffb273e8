//! Other people's programs on the node's devices: as few instructions as show what they see.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_map_type, bpf_prog_type};
use fairlead_lab::Namespace;

use crate::sys::{bpf, made, zeroed};

mod policy;

pub use policy::Policy;

/// The hooks of a device.
pub const TCX: [u32; 2] = [bpf_attach_type::BPF_TCX_INGRESS as u32, bpf_attach_type::BPF_TCX_EGRESS as u32];

/// Leaves the program, with register 0 as its verdict.
pub const EXIT: u64 = insn(0x95, 0, 0, 0, 0);

/// One instruction: operation, destination and source register, offset, immediate.
const fn insn(op: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    op as u64
        | ((dst | src << 4) as u64) << 8
        | (offset.cast_unsigned() as u64) << 16
        | (immediate.cast_unsigned() as u64) << 32
}

/// Puts a number into a register.
pub const fn mov(register: u8, value: i32) -> u64 {
    insn(0xb7, register, 0, 0, value)
}

/// Loads a program for tc; others know it by this name.
pub fn load(name: &CStr, code: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = code.len() as u32;
    load.license = c"Apache-2.0".as_ptr() as u64;
    // The last byte stays 0.
    for (to, byte) in load.prog_name[..15].iter_mut().zip(name.to_bytes()) {
        *to = *byte as libc::c_char;
    }
    made(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// A hash map.
fn hash(key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let map = unsafe { &mut attr.__bindgen_anon_1 };
    map.map_type = bpf_map_type::BPF_MAP_TYPE_HASH as u32;
    (map.key_size, map.value_size, map.max_entries) = (key, value, entries);
    made(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Pins a program, for `tc` to find.
pub fn pin(program: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let pin = unsafe { &mut attr.__bindgen_anon_4 };
    pin.pathname = path.as_ptr() as u64;
    pin.bpf_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// A tcx link to a device of the namespace. It goes with its descriptor.
pub fn attach(ns: &Namespace, device: &str, program: &OwnedFd, hook: u32) -> io::Result<OwnedFd> {
    ns.run(|| {
        let mut attr = zeroed();
        // SAFETY: plain stores into a union whose other members are not read.
        let link = unsafe { &mut attr.link_create };
        link.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
        link.__bindgen_anon_2.target_ifindex = nix::net::if_::if_nametoindex(device)?;
        link.attach_type = hook;
        made(bpf_cmd::BPF_LINK_CREATE, &mut attr)
    })
    .map_err(io::Error::other)?
}
