//! Other people's programs on the node's devices: as few instructions as show what they see, by the kernel's plain interface.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use fairlead_lab::Namespace;

mod policy;

pub use policy::Policy;

/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` of `enum bpf_attach_type`.
pub const TCX: [u32; 2] = [46, 47];

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

/// bpf(2) with an attribute block of 32-bit words.
fn bpf(command: libc::c_int, words: &mut [u32; 36]) -> io::Result<i32> {
    // SAFETY: the block is as long as stated, and the pointers in it are to live memory of the caller.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, words.as_mut_ptr(), size_of_val(words)) };
    i32::try_from(result).ok().filter(|&result| result >= 0).ok_or_else(io::Error::last_os_error)
}

/// A command that returns a new descriptor.
fn descriptor(command: libc::c_int, words: &mut [u32; 36]) -> io::Result<OwnedFd> {
    // SAFETY: the kernel has just given it to us.
    bpf(command, words).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn split(pointer: *const u8) -> [u32; 2] {
    let address = pointer as u64;
    [address as u32, (address >> 32) as u32]
}

/// Loads a program for tc.
pub fn load(code: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut words = [0u32; 36];
    words[0] = 3; // BPF_PROG_TYPE_SCHED_CLS
    words[1] = code.len() as u32;
    words[2..4].copy_from_slice(&split(code.as_ptr().cast()));
    words[4..6].copy_from_slice(&split(license.as_ptr().cast()));
    descriptor(5, &mut words) // BPF_PROG_LOAD
}

/// A hash map.
fn hash(key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut words = [0u32; 36];
    words[..4].copy_from_slice(&[1, key, value, entries]); // BPF_MAP_TYPE_HASH
    descriptor(0, &mut words) // BPF_MAP_CREATE
}

/// Pins a program, for `tc` to find.
pub fn pin(program: &OwnedFd, path: &Path) -> io::Result<()> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut words = [0u32; 36];
    words[0..2].copy_from_slice(&split(name.as_ptr().cast()));
    words[2] = program.as_raw_fd() as u32;
    bpf(6, &mut words).map(drop) // BPF_OBJ_PIN
}

/// A tcx link to a device of the namespace. It goes with its descriptor.
pub fn attach(ns: &Namespace, device: &str, program: &OwnedFd, hook: u32) -> io::Result<OwnedFd> {
    ns.run(|| {
        let mut words = [0u32; 36];
        words[0] = program.as_raw_fd() as u32;
        words[1] = nix::net::if_::if_nametoindex(device)?;
        words[2] = hook;
        descriptor(28, &mut words) // BPF_LINK_CREATE
    })
    .map_err(io::Error::other)?
}
