//! `BPF_PROG_TEST_RUN` with what it does not offer by itself: `skb->tc_index` in and out, and a VLAN tag.
//!
//! The kernel takes neither in the context. So a program of a few instructions goes first: it sets them, calls a
//! subprogram that jumps through `PROGRAMS` as a device's stub would, and brings back what the packet carries then.
//! (A tail call from a subprogram replaces only the subprogram.)

use std::io;
use std::mem;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use aya_obj::generated::{bpf_cmd, bpf_insn, bpf_prog_type};

use crate::sys::{bpf, made, zeroed};

/// `struct __sk_buff`, as far as test runs take or give it (`include/uapi/linux/bpf.h`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SkBuff {
    len: u32,
    pkt_type: u32,
    mark: u32,
    queue_mapping: u32,
    protocol: u32,
    vlan: [u32; 3],
    priority: u32,
    ingress_ifindex: u32,
    ifindex: u32,
    tc_index: u32,
    cb: [u32; 5],
    hash_to_flow_keys: [u32; 21],
    tstamp: u64,
    wire_len: u32,
    gso_segs: u32,
    sk: u64,
    gso_size: u32,
    tstamp_type: u32,
    hwtstamp: u64,
}

const _: () = assert!(size_of::<SkBuff>() == 192 && mem::offset_of!(SkBuff, gso_size) == 176);

/// What a packet has besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    /// The device whose hook runs.
    pub(super) ifindex: u32,
    /// The device it came in by; 0 for the node's own.
    pub(super) ingress_ifindex: u32,
    /// What ingress told egress.
    pub(super) tc_index: u16,
    /// `skb->mark`.
    pub(super) mark: u32,
    /// A VLAN tag beside the bytes; 0 for none.
    pub(super) vlan: u16,
    /// Size of a segment, of a packet that stands for several.
    pub(super) gso_size: u32,
    /// Number of segments.
    pub(super) gso_segs: u32,
}

/// What a run left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) verdict: i32,
    pub(super) bytes: Vec<u8>,
    pub(super) tc_index: u16,
    pub(super) mark: u32,
    pub(super) gso: (u32, u32),
}

/// A program in front of one slot of `PROGRAMS`.
pub(super) struct Entry {
    program: OwnedFd,
}

const ROOM: usize = 4096;
/// Index of the subprogram's first instruction.
const SUBPROGRAM: u32 = 13;
/// What the subprogram returns if the slot is empty.
const EMPTY_SLOT: i32 = 0x0bad;

impl Entry {
    /// Loads it.
    pub(super) fn to_slot(programs: BorrowedFd<'_>, slot: u32) -> Self {
        Self { program: load(&instructions(programs.as_raw_fd(), slot)).expect("the entry program loads") }
    }

    /// Runs it once.
    pub(super) fn run(&self, frame: &[u8], meta: Meta) -> Left {
        let mut context = SkBuff {
            ingress_ifindex: meta.ingress_ifindex,
            ifindex: meta.ifindex,
            mark: meta.mark,
            cb: [meta.tc_index.into(), meta.vlan.into(), 0, 0, 0],
            gso_segs: meta.gso_segs,
            gso_size: meta.gso_size,
            ..SkBuff::default()
        };
        let mut out = vec![0u8; ROOM];
        let mut attr = zeroed();
        attr.test.prog_fd = self.program.as_raw_fd() as u32;
        attr.test.data_in = frame.as_ptr() as u64;
        attr.test.data_size_in = frame.len() as u32;
        attr.test.data_out = out.as_mut_ptr() as u64;
        attr.test.data_size_out = out.len() as u32;
        attr.test.ctx_in = &raw const context as u64;
        attr.test.ctx_size_in = size_of::<SkBuff>() as u32;
        attr.test.ctx_out = &raw mut context as u64;
        attr.test.ctx_size_out = size_of::<SkBuff>() as u32;
        bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)
            .unwrap_or_else(|e| panic!("a test run of {} bytes with {meta:?} was refused: {e}", frame.len()));
        // SAFETY: the kernel filled this member.
        let (verdict, length) = unsafe { (attr.test.retval as i32, attr.test.data_size_out as usize) };
        assert_ne!(verdict, EMPTY_SLOT, "the slot of PROGRAMS is empty");
        out.truncate(length);
        let gso = (context.gso_size, context.gso_segs);
        Left { verdict, bytes: out, tc_index: context.cb[0] as u16, mark: context.mark, gso }
    }
}

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> bpf_insn {
    // SAFETY: integers and bit fields only.
    let mut insn: bpf_insn = unsafe { mem::zeroed() };
    insn.code = code;
    insn.set_dst_reg(dst);
    insn.set_src_reg(src);
    insn.off = off;
    insn.imm = imm;
    insn
}

/// See the module's words.
fn instructions(programs: RawFd, slot: u32) -> Vec<bpf_insn> {
    const TAIL_CALL: i32 = 12;
    const VLAN_PUSH: i32 = 18;
    const TC_INDEX: i16 = mem::offset_of!(SkBuff, tc_index) as i16;
    const CB: i16 = mem::offset_of!(SkBuff, cb) as i16;
    const PSEUDO_MAP_FD: u8 = 1;
    const PSEUDO_CALL: u8 = 1;
    let load_word = |dst, src, off| insn(0x61, dst, src, off, 0);
    let store_word = |dst, off, src| insn(0x63, dst, src, off, 0);
    let copy = |dst, src| insn(0xbf, dst, src, 0, 0);
    let set = |dst, imm| insn(0xb7, dst, 0, 0, imm);
    let call = |helper| insn(0x85, 0, 0, 0, helper);
    let exit = || insn(0x95, 0, 0, 0, 0);
    vec![
        copy(6, 1),
        load_word(2, 6, CB),
        store_word(6, TC_INDEX, 2),
        load_word(3, 6, CB + 4),
        // No tag: over the push.
        insn(0x15, 3, 0, 3, 0),
        copy(1, 6),
        set(2, i32::from(0x8100u16.to_be())),
        call(VLAN_PUSH),
        copy(1, 6),
        insn(0x85, 0, PSEUDO_CALL, 0, SUBPROGRAM as i32 - 10),
        load_word(2, 6, TC_INDEX),
        store_word(6, CB, 2),
        exit(),
        insn(0x18, 2, PSEUDO_MAP_FD, 0, programs),
        insn(0, 0, 0, 0, 0),
        set(3, slot as i32),
        call(TAIL_CALL),
        set(0, EMPTY_SLOT),
        exit(),
    ]
}

const MAIN_TYPE: u32 = 4;
const JUMP_TYPE: u32 = 5;

/// Types of the two functions: a subprogram may do tail calls only if the kernel knows that it returns an int.
fn load_btf() -> io::Result<OwnedFd> {
    const INT: u32 = 1 << 24;
    const PTR: u32 = 2 << 24;
    const FUNC: u32 = 12 << 24;
    const FUNC_PROTO: u32 = 13 << 24;
    const SIGNED_32_BITS: u32 = 1 << 24 | 32;
    let strings = b"\0int\0ctx\0main\0jump\0";
    let (int, ctx, main, jump) = (1, 5, 9, 14);
    let types = [
        // 1: int. 2: void *. 3: int (void *ctx). 4 and 5: the functions.
        [int, INT, 4, SIGNED_32_BITS].as_slice(),
        &[0, PTR, 0],
        &[0, FUNC_PROTO | 1, 1, ctx, 2],
        &[main, FUNC, 3],
        &[jump, FUNC, 3],
    ]
    .concat();
    let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut blob = 0xeb9f_u16.to_ne_bytes().to_vec();
    blob.extend([1, 0]);
    let length = types.len() as u32;
    for word in [24, 0, length, length, strings.len() as u32] {
        blob.extend(word.to_ne_bytes());
    }
    blob.extend(types);
    blob.extend(strings);
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let load = unsafe { &mut attr.__bindgen_anon_7 };
    load.btf = blob.as_ptr() as u64;
    load.btf_size = blob.len() as u32;
    made(bpf_cmd::BPF_BTF_LOAD, &mut attr)
}

fn load(code: &[bpf_insn]) -> io::Result<OwnedFd> {
    let license = c"GPL";
    let mut log = vec![0u8; 1 << 16];
    let btf = load_btf()?;
    let functions = [[0, MAIN_TYPE], [SUBPROGRAM, JUMP_TYPE]];
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = code.len() as u32;
    load.license = license.as_ptr() as u64;
    load.prog_btf_fd = btf.as_raw_fd() as u32;
    load.func_info = functions.as_ptr() as u64;
    load.func_info_cnt = functions.len() as u32;
    load.func_info_rec_size = size_of::<[u32; 2]>() as u32;
    load.log_level = 1;
    load.log_buf = log.as_mut_ptr() as u64;
    load.log_size = log.len() as u32;
    made(bpf_cmd::BPF_PROG_LOAD, &mut attr).map_err(|error| {
        let text = String::from_utf8_lossy(&log);
        io::Error::other(format!("{error}: {}", text.trim_end_matches('\0')))
    })
}
