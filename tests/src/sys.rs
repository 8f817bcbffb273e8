//! `bpf(2)` itself, for what neither aya nor the agent asks of the kernel.

use std::{
    io, mem,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

use aya_obj::generated::{bpf_attr, bpf_cmd};

/// An attribute block in which nothing is given.
pub fn zeroed() -> bpf_attr {
    // SAFETY: a union of structs of integers, for which zero is valid and, for the kernel, "not given".
    unsafe { mem::zeroed() }
}

/// The system call. Every pointer in the block has to lead to memory of the length stated with it.
pub fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a whole bpf_attr, and the callers fill it with pointers that outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_int, attr, size_of::<bpf_attr>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A command that makes something, which is the caller's.
pub fn made(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: the call returned a new descriptor that nobody else owns.
    bpf(command, attr).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
