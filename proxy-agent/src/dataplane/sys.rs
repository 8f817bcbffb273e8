//! The system calls that aya does not make: `bpf(2)` batches, link queries and test runs, `membarrier`, the BPF file
//! system, limits and clocks. Nothing above this file knows their structs.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Error};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use aya::Pod;
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_insn, bpf_link_info, bpf_map_type, bpf_prog_info, bpf_prog_type};

use super::load::Shape;

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is a live bpf_attr of the size given; the callers fill it with pointers that outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, cmd, attr as *mut bpf_attr, size_of::<bpf_attr>()) };
    if ret < 0 { Err(Error::last_os_error()) } else { Ok(ret) }
}

fn zeroed_attr() -> bpf_attr {
    // SAFETY: a union of integers, for which zero is valid and, for the kernel, "not given".
    unsafe { mem::zeroed() }
}

/// Elements read per `BPF_MAP_LOOKUP_BATCH` at first: a system call per 4,096 flows costs nothing against the copy.
const BATCH: u32 = 4_096;

/// Calls `each` with every element of a hash map, read in batches. A map that changes meanwhile yields each element
/// that stayed at least once, and may yield one twice.
pub fn for_each_in_hash<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    zero: (K, V),
    mut each: impl FnMut(&K, &V),
) -> io::Result<()> {
    let mut room = BATCH;
    let mut keys = vec![zero.0; room as usize];
    let mut values = vec![zero.1; room as usize];
    let mut position: Option<u64> = None;
    loop {
        let mut next = 0u64;
        let mut attr = zeroed_attr();
        // SAFETY: plain stores into a union whose other members are not read.
        let batch = unsafe { &mut attr.batch };
        batch.map_fd = map.as_raw_fd() as u32;
        batch.in_batch = position.as_ref().map_or(0, |p| p as *const u64 as u64);
        batch.out_batch = &mut next as *mut u64 as u64;
        batch.keys = keys.as_mut_ptr() as u64;
        batch.values = values.as_mut_ptr() as u64;
        batch.count = room;
        let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
        // SAFETY: the kernel wrote the number of elements there.
        let count = unsafe { attr.batch.count } as usize;
        let end = match result {
            Ok(_) => false,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => true,
            // One bucket holds more than there is room for; nothing was consumed.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 24 => {
                room *= 2;
                keys.resize(room as usize, zero.0);
                values.resize(room as usize, zero.1);
                continue;
            }
            Err(e) => return Err(e),
        };
        for (key, value) in keys[..count].iter().zip(&values[..count]) {
            each(key, value);
        }
        if end {
            return Ok(());
        }
        position = Some(next);
    }
}

/// What a tcx link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxLink {
    /// ifindex; 0 once the device is gone.
    pub ifindex: u32,
    /// The program's id.
    pub program_id: u32,
}

/// Asks a tcx link what it is attached to; `None` if it is a link of another kind.
pub fn tcx_link(link: BorrowedFd<'_>) -> io::Result<Option<TcxLink>> {
    // `enum bpf_link_type` and the member `tcx` of `bpf_link_info` (include/uapi/linux/bpf.h): ifindex, attach type.
    const TCX: u32 = 11;
    // SAFETY: integers only.
    let mut info: bpf_link_info = unsafe { mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = link.as_raw_fd() as u32;
    attr.info.info_len = size_of::<bpf_link_info>() as u32;
    attr.info.info = &mut info as *mut bpf_link_info as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    if info.type_ != TCX {
        return Ok(None);
    }
    // SAFETY: the type says that this member was written; all members are integers.
    let ifindex = unsafe { info.__bindgen_anon_1.tcx.ifindex };
    Ok(Some(TcxLink { ifindex, program_id: info.prog_id }))
}

/// Opens a pinned object; `None` if nothing is pinned there.
pub fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    unsafe { &mut attr.__bindgen_anon_4 }.pathname = path.as_ptr() as u64;
    match bpf(bpf_cmd::BPF_OBJ_GET, &mut attr) {
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Pins an object.
pub fn pin(object: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let pin = unsafe { &mut attr.__bindgen_anon_4 };
    pin.pathname = path.as_ptr() as u64;
    pin.bpf_fd = object.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Loads type information.
pub fn load_types(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let load = unsafe { &mut attr.__bindgen_anon_7 };
    load.btf = bytes.as_ptr() as u64;
    load.btf_size = bytes.len() as u32;
    let fd = bpf(bpf_cmd::BPF_BTF_LOAD, &mut attr)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Makes a map whose key and value have these types.
pub fn create_typed_map(name: &CStr, shape: &Shape, types: &OwnedFd, key: u32, value: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = shape.kind;
    create.key_size = shape.key_size;
    create.value_size = shape.value_size;
    create.max_entries = shape.max_entries;
    create.map_flags = shape.flags;
    create.btf_fd = types.as_raw_fd() as u32;
    create.btf_key_type_id = key;
    create.btf_value_type_id = value;
    // The last byte stays zero.
    let room = create.map_name.len() - 1;
    for (to, from) in create.map_name[..room].iter_mut().zip(name.to_bytes()) {
        *to = *from as libc::c_char;
    }
    let fd = bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Attaches a program by a tcx link before all others at ingress, behind all others at egress.
pub fn attach_tcx(program: BorrowedFd<'_>, ifindex: u32, egress: bool) -> io::Result<OwnedFd> {
    // `BPF_F_BEFORE` and `BPF_F_AFTER`: without another program, of all of them.
    const PLACE: [u32; 2] = [1 << 3, 1 << 4];
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let create = unsafe { &mut attr.link_create };
    create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    create.__bindgen_anon_2.target_ifindex = ifindex;
    create.attach_type = TCX_ATTACH[usize::from(egress)];
    create.flags = PLACE[usize::from(egress)];
    let fd = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Exchanges the program of a link in one step.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed_attr();
    attr.link_update.link_fd = link.as_raw_fd() as u32;
    attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// The name of a loaded program, as far as the kernel keeps it. Opening a program by its id takes CAP_SYS_ADMIN, which root on
/// the node has, and the agent in its pod has not.
pub fn program_name(id: u32) -> io::Result<String> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    let fd = bpf(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    let program = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // SAFETY: integers only.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = program.as_raw_fd() as u32;
    attr.info.info_len = size_of::<bpf_prog_info>() as u32;
    attr.info.info = &mut info as *mut bpf_prog_info as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let name = info.name.map(|byte| byte as u8);
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` of `enum bpf_attach_type`.
const TCX_ATTACH: [u32; 2] = [46, 47];

/// Ids of program and link of everything that tcx runs at a hook of a device, in this order; none on a kernel without tcx.
pub fn tcx_programs(ifindex: u32, egress: bool) -> io::Result<Option<Vec<(u32, u32)>>> {
    // `BPF_MPROG_MAX`.
    const MOST: usize = 64;
    let (mut programs, mut links) = ([0u32; MOST], [0u32; MOST]);
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let query = unsafe { &mut attr.query };
    query.__bindgen_anon_1.target_ifindex = ifindex;
    query.attach_type = TCX_ATTACH[usize::from(egress)];
    query.prog_ids = programs.as_mut_ptr() as u64;
    query.link_ids = links.as_mut_ptr() as u64;
    query.__bindgen_anon_2.count = MOST as u32;
    match bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) {
        Ok(_) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        Err(e) => return Err(e),
    }
    // SAFETY: the kernel wrote the number of programs there.
    let count = unsafe { attr.query.__bindgen_anon_2.count } as usize;
    Ok(Some(programs.into_iter().zip(links).take(count).collect()))
}

fn create_map(kind: bpf_map_type, value_size: u32, entries: u32, inner: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = kind as u32;
    create.key_size = 4;
    create.value_size = value_size;
    create.max_entries = entries;
    create.inner_map_fd = inner.map_or(0, |fd| fd.as_raw_fd() as u32);
    let fd = bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Makes an unnamed array.
pub fn create_array(value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    create_map(bpf_map_type::BPF_MAP_TYPE_ARRAY, value_size, entries, None)
}

/// Makes an array of one map like `inner`.
pub fn create_array_of_maps(inner: &OwnedFd) -> io::Result<OwnedFd> {
    create_map(bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, 4, 1, Some(inner))
}

/// Puts `inner` into the first place of `outer`. The kernel returns after every program that ran before has ended.
pub fn put_inner_map(outer: &OwnedFd, inner: &OwnedFd) -> io::Result<()> {
    let (key, value) = (0u32, inner.as_raw_fd());
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let update = unsafe { &mut attr.__bindgen_anon_2 };
    update.map_fd = outer.as_raw_fd() as u32;
    update.key = &key as *const u32 as u64;
    update.__bindgen_anon_1.value = &value as *const RawFd as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// A BPF instruction, as the kernel's macros build it.
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    /// Operation.
    pub code: u8,
    /// Destination and source register.
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Offset.
    pub off: i16,
    /// Immediate value.
    pub imm: i32,
}

/// Loads a classifier made of these instructions.
pub fn load_classifier(insns: &[Insn]) -> io::Result<OwnedFd> {
    let code: Vec<bpf_insn> = insns
        .iter()
        .map(|i| {
            // SAFETY: integers and bit fields only.
            let mut insn: bpf_insn = unsafe { mem::zeroed() };
            insn.code = i.code;
            insn.set_dst_reg(i.dst);
            insn.set_src_reg(i.src);
            insn.off = i.off;
            insn.imm = i.imm;
            insn
        })
        .collect();
    let license = c"GPL";
    let mut attr = zeroed_attr();
    // SAFETY: plain stores into a union whose other members are not read.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = code.len() as u32;
    load.license = license.as_ptr() as u64;
    let fd = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Loads a classifier made of these instructions and runs it once on an empty frame: how a helper of this kernel
/// reacts to its arguments. Returns what the program returned.
pub fn try_classifier(insns: &[Insn]) -> io::Result<i32> {
    let program = load_classifier(insns)?;
    let frame = [0u8; 64];
    let mut attr = zeroed_attr();
    attr.test.prog_fd = program.as_raw_fd() as u32;
    attr.test.data_in = frame.as_ptr() as u64;
    attr.test.data_size_in = frame.len() as u32;
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: the kernel wrote it.
    Ok(unsafe { attr.test.retval } as i32)
}

/// Waits until every program that ran when this was called has ended: `membarrier(GLOBAL)` is `synchronize_rcu`.
///
/// # Errors
/// On one CPU the kernel answers without waiting, and with `nohz_full` it refuses: see [`super::bpf::grace`].
pub fn membarrier_global() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if ret == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Lifts the limit on locked memory: before 5.11 maps count against it.
pub fn raise_memlock() -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a live struct of the type that the call reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) } == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| Error::new(io::ErrorKind::InvalidInput, e))
}

/// True if the path lies on a BPF file system.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    let path = c_path(path)?;
    // SAFETY: integers only.
    let mut stat: libc::statfs = unsafe { mem::zeroed() };
    // SAFETY: a NUL-terminated path and a live struct.
    if unsafe { libc::statfs(path.as_ptr(), &mut stat) } != 0 {
        return Err(Error::last_os_error());
    }
    // The types of both differ between architectures and C libraries; the number has 32 bits.
    Ok(u32::try_from(stat.f_type).ok() == u32::try_from(libc::BPF_FS_MAGIC).ok())
}

/// Mounts a BPF file system.
pub fn mount_bpffs(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: NUL-terminated strings; the last argument is the options' text.
    let ret =
        unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), flags, c"mode=0700".as_ptr().cast()) };
    if ret == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Seconds of `CLOCK_MONOTONIC`, as the programs stamp flows.
pub fn monotonic_secs() -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a live struct. The clock always exists, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u32
}

/// A random number that nobody can predict.
pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: a live buffer of the length given.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n == 8 { Ok(u64::from_ne_bytes(bytes)) } else { Err(Error::last_os_error()) }
}

/// Inode of this process' network namespace: with it an ifindex is unique on the machine.
pub fn netns_inode() -> io::Result<u64> {
    Ok(File::open("/proc/self/ns/net")?.metadata()?.ino())
}

/// The name of a device of this thread's network namespace; none without such a device.
pub fn device_name(ifindex: u32) -> Option<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: a live buffer of the length that the call may fill.
    let found = unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    let name = CStr::from_bytes_until_nul(&name).ok()?;
    Some(name.to_string_lossy().into_owned())
}

/// Bytes of a page.
pub fn page_size() -> u64 {
    sysconf(libc::_SC_PAGESIZE)
}

/// Ticks of a second in `/proc`.
pub fn clock_ticks() -> u64 {
    sysconf(libc::_SC_CLK_TCK)
}

fn sysconf(name: libc::c_int) -> u64 {
    // SAFETY: it reads a constant of the system.
    let value = unsafe { libc::sysconf(name) };
    u64::try_from(value).unwrap_or(1)
}

/// True if this process is root in effect.
pub fn is_root() -> bool {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The host's name.
pub fn host_name() -> io::Result<String> {
    let mut name = [0u8; 256];
    // SAFETY: a live buffer; one byte stays free for the closing NUL.
    if unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } != 0 {
        return Err(Error::last_os_error());
    }
    let len = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..len]).trim().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_and_randomness_move() {
        assert!(monotonic_secs() > 0);
        assert_ne!(random_u64().unwrap(), random_u64().unwrap());
    }

    #[test]
    fn this_namespace_has_an_inode_and_this_host_a_name() {
        assert!(netns_inode().unwrap() > 0);
        assert!(!host_name().unwrap().is_empty());
    }

    #[test]
    fn proc_is_no_bpf_file_system() {
        assert!(!is_bpffs(Path::new("/proc")).unwrap());
        assert!(is_bpffs(Path::new("/no/such/place")).is_err());
    }
}
