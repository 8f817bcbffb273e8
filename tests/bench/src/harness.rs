//! Runs a loaded program many times on one frame, by `BPF_PROG_TEST_RUN`.
//!
//! The kernel repeats a run on the same packet, which the first run has translated already. So what is run is a
//! program of ours that puts the frame back as it was and then jumps into `PROGRAMS`; the same without the jump is
//! the cost of putting it back.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
};

use anyhow::{Context as _, Result, ensure};
use aya_obj::generated::{bpf_cmd, bpf_insn, bpf_prog_type};
use fairlead_tests::sys::{bpf, made, zeroed};
use proxy_agent::dataplane::{pin::PinRoot, sys};
use proxy_common::abi::program;

/// Room for the frame in the template's map.
const ROOM: usize = 256;
/// `struct __sk_buff` (`include/uapi/linux/bpf.h`): offsets of what the harness and its caller set.
const INGRESS_IFINDEX: usize = 36;
const IFINDEX: usize = 40;
const TC_INDEX: i16 = 44;
/// Helper numbers (`include/uapi/linux/bpf.h`).
const SKB_STORE_BYTES: i32 = 9;
const TAIL_CALL: i32 = 12;
const SKB_CHANGE_TAIL: i32 = 38;
/// The loopback device of the namespace that the run takes place in.
const LOOPBACK: u32 = 1;

/// Which program is jumped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A packet arrives.
    Ingress,
    /// A packet leaves.
    Egress,
}

/// Where a frame has its source, for packets that are each a flow of their own.
#[derive(Clone, Copy, Debug)]
pub struct Vary {
    /// Offset of the low half of the source address.
    pub address: i16,
    /// Offset of the source port.
    pub port: i16,
}

/// What is run.
#[derive(Clone, Debug)]
pub struct Shot {
    /// The frame.
    pub frame: Vec<u8>,
    /// The program.
    pub hook: Hook,
    /// `skb->tc_index` as egress finds it.
    pub tc_index: u16,
    /// `skb->ingress_ifindex`: 0 for a packet of the node's own.
    pub came_in_by: u32,
    /// A new source for each run.
    pub vary: Option<Vary>,
}

/// One run, or the mean of many.
#[derive(Clone, Debug)]
pub struct Run {
    /// Nanoseconds.
    pub ns: f64,
    /// What the program returned.
    pub verdict: i32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

/// A loaded harness.
#[derive(Debug)]
pub struct Harness {
    shot: Shot,
    whole: OwnedFd,
    without_jump: OwnedFd,
    // Held by the programs too; here so that its life is plain.
    _template: OwnedFd,
}

impl Harness {
    /// Loads both programs for a shot at the programs that are pinned here.
    pub fn new(pins: &PinRoot, shot: Shot) -> Result<Self> {
        ensure!(shot.frame.len() <= ROOM, "a frame of {} bytes, there is room for {ROOM}", shot.frame.len());
        let template = sys::create_array(ROOM as u32, 1).context("cannot make the template's map")?;
        write(&template, &shot.frame).context("cannot write the template")?;
        let programs = sys::open_pin(&pins.map("PROGRAMS")).context("cannot open PROGRAMS")?;
        let programs = programs.context("PROGRAMS is not pinned")?;
        let slot = match shot.hook {
            Hook::Ingress => program::INGRESS,
            Hook::Egress => program::EGRESS,
        };
        let load = |jump: Option<(RawFd, u32)>| {
            load(&code(&shot, template.as_raw_fd(), jump)).context("cannot load the harness")
        };
        let whole = load(Some((programs.as_raw_fd(), slot)))?;
        let without_jump = load(None)?;
        Ok(Self { shot, whole, without_jump, _template: template })
    }

    /// Runs it once.
    pub fn once(&self) -> Result<Run> {
        run(&self.whole, &self.shot, 1)
    }

    /// Runs it many times; the time of putting the frame back is taken off.
    pub fn mean(&self, repeat: u32) -> Result<Run> {
        let bare = run(&self.without_jump, &self.shot, repeat)?;
        let whole = run(&self.whole, &self.shot, repeat)?;
        Ok(Run { ns: whole.ns - bare.ns, ..whole })
    }
}

/// The instructions: R6 is the packet, R7 the template.
fn code(shot: &Shot, template: RawFd, jump: Option<(RawFd, u32)>) -> Vec<bpf_insn> {
    let len = shot.frame.len() as i32;
    let mut code = vec![copy(6, 1)];
    code.extend(address_of(7, template));
    if let Some(vary) = shot.vary {
        code.extend([
            load_half(1, 7, vary.port),
            add(1, 1),
            store_half(7, 1, vary.port),
            and(1, 0xffff),
            // Every port was used: the next address.
            skip_unless_zero(1, 3),
            load_half(2, 7, vary.address),
            add(2, 1),
            store_half(7, 2, vary.address),
        ]);
    }
    code.extend([set(1, i32::from(shot.tc_index)), store_word(6, 1, TC_INDEX)]);
    code.extend([copy(1, 6), set(2, len), set(3, 0), call(SKB_CHANGE_TAIL)]);
    code.extend([copy(1, 6), set(2, 0), copy(3, 7), set(4, len), set(5, 0), call(SKB_STORE_BYTES)]);
    if let Some((programs, slot)) = jump {
        code.push(copy(1, 6));
        code.extend(map(2, programs));
        code.extend([set(3, slot as i32), call(TAIL_CALL)]);
    }
    code.extend([set(0, 0), exit()]);
    code
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

/// `dst = imm`.
fn set(dst: u8, imm: i32) -> bpf_insn {
    insn(0xb7, dst, 0, 0, imm)
}

/// `dst = src`.
fn copy(dst: u8, src: u8) -> bpf_insn {
    insn(0xbf, dst, src, 0, 0)
}

/// `dst += imm`.
fn add(dst: u8, imm: i32) -> bpf_insn {
    insn(0x07, dst, 0, 0, imm)
}

/// `dst &= imm`.
fn and(dst: u8, imm: i32) -> bpf_insn {
    insn(0x57, dst, 0, 0, imm)
}

/// `dst = *(u16 *)(src + off)`.
fn load_half(dst: u8, src: u8, off: i16) -> bpf_insn {
    insn(0x69, dst, src, off, 0)
}

/// `*(u16 *)(dst + off) = src`.
fn store_half(dst: u8, src: u8, off: i16) -> bpf_insn {
    insn(0x6b, dst, src, off, 0)
}

/// `*(u32 *)(dst + off) = src`.
fn store_word(dst: u8, src: u8, off: i16) -> bpf_insn {
    insn(0x63, dst, src, off, 0)
}

/// `if (dst != 0) goto +off`.
fn skip_unless_zero(dst: u8, off: i16) -> bpf_insn {
    insn(0x55, dst, 0, off, 0)
}

/// A helper call.
fn call(helper: i32) -> bpf_insn {
    insn(0x85, 0, 0, 0, helper)
}

fn exit() -> bpf_insn {
    insn(0x95, 0, 0, 0, 0)
}

/// `dst = the map` (`BPF_PSEUDO_MAP_FD`).
fn map(dst: u8, fd: RawFd) -> [bpf_insn; 2] {
    [insn(0x18, dst, 1, 0, fd), insn(0, 0, 0, 0, 0)]
}

/// `dst = address of the array's first value` (`BPF_PSEUDO_MAP_VALUE`).
fn address_of(dst: u8, fd: RawFd) -> [bpf_insn; 2] {
    [insn(0x18, dst, 2, 0, fd), insn(0, 0, 0, 0, 0)]
}

fn load(code: &[bpf_insn]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = code.len() as u32;
    load.license = c"GPL".as_ptr() as u64;
    made(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

fn write(map: &OwnedFd, frame: &[u8]) -> io::Result<()> {
    let (key, mut value) = (0u32, [0u8; ROOM]);
    value[..frame.len()].copy_from_slice(frame);
    let mut attr = zeroed();
    // SAFETY: plain stores into a union whose other members are not read.
    let update = unsafe { &mut attr.__bindgen_anon_2 };
    update.map_fd = map.as_raw_fd() as u32;
    update.key = &raw const key as u64;
    update.__bindgen_anon_1.value = value.as_ptr() as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

fn run(program: &OwnedFd, shot: &Shot, repeat: u32) -> Result<Run> {
    let mut context = [0u8; 64];
    context[INGRESS_IFINDEX..][..4].copy_from_slice(&shot.came_in_by.to_ne_bytes());
    context[IFINDEX..][..4].copy_from_slice(&LOOPBACK.to_ne_bytes());
    let mut out = vec![0u8; 2_048];
    let mut attr = zeroed();
    attr.test.prog_fd = program.as_raw_fd() as u32;
    attr.test.data_in = shot.frame.as_ptr() as u64;
    attr.test.data_size_in = shot.frame.len() as u32;
    attr.test.data_out = out.as_mut_ptr() as u64;
    attr.test.data_size_out = out.len() as u32;
    attr.test.ctx_in = context.as_ptr() as u64;
    attr.test.ctx_size_in = context.len() as u32;
    attr.test.repeat = repeat;
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr).context("BPF_PROG_TEST_RUN")?;
    // SAFETY: the kernel wrote these.
    let (length, ns, verdict) = unsafe { (attr.test.data_size_out, attr.test.duration, attr.test.retval) };
    out.truncate(length as usize);
    Ok(Run { ns: f64::from(ns), verdict: verdict as i32, frame: out })
}
