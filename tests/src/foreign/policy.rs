//! A network policy as CNIs load it on a pod's device: the pod may ask anybody, is reachable on one port, and whatever else
//! reaches or leaves it must be the answer to a packet seen before. It knows a conversation by the addresses that it sees,
//! so it holds only where both directions show it the same ones.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use fairlead_lab::Namespace;

use super::{EXIT, TCX, attach, hash, insn, load, mov, pin};

/// `TC_ACT_UNSPEC`, which is `TCX_NEXT` as well, and `TC_ACT_SHOT`.
const NEXT: i32 = -1;
const DROP: i32 = 2;
/// Length of an Ethernet header.
const ETHERNET: i32 = 14;
/// Offset of `protocol` in `struct __sk_buff`.
const PROTOCOL: i16 = 16;

/// Where things lie on the stack: a conversation's key is both addresses, both ports, the pod's first, and the protocol.
const KEY: i16 = -40;
const POD_ADDRESS: i16 = KEY;
const PEER_ADDRESS: i16 = -24;
const POD_PORT: i16 = -8;
const PEER_PORT: i16 = -6;
const TRANSPORT: i16 = -4;
const VALUE: i16 = -48;
const KEY_LEN: u32 = 40;

/// The policy of one pod.
#[derive(Debug)]
pub struct Policy {
    // What leaves the pod, and what goes to it: in the order of the node's hooks.
    programs: [OwnedFd; 2],
    links: Vec<OwnedFd>,
    pins: Vec<PathBuf>,
    _seen: OwnedFd,
}

impl Policy {
    /// Loads it for a pod that is reachable on this port.
    pub fn load(port: u16) -> io::Result<Self> {
        let seen = hash(KEY_LEN, 4, 65_536)?;
        let load = |by_pod| load(c"policy", &code(&seen, by_pod, port));
        let programs = [load(true)?, load(false)?];
        Ok(Self { programs, links: Vec::new(), pins: Vec::new(), _seen: seen })
    }

    /// Attaches it to the node's device of the pod by tcx.
    pub fn attach_tcx(&mut self, node: &Namespace, device: &str) -> io::Result<()> {
        for (program, hook) in self.programs.iter().zip(TCX) {
            self.links.push(attach(node, device, program, hook)?);
        }
        Ok(())
    }

    /// Attaches it as clsact filters. `path` is one on a BPF file system, where
    /// the pins' names begin so.
    pub fn attach_clsact(&mut self, node: &Namespace, device: &str, path: &Path) -> anyhow::Result<()> {
        // The qdisc may be there already.
        node.output("tc", &["qdisc", "add", "dev", device, "clsact"]).ok();
        for (program, hook) in self.programs.iter().zip(["ingress", "egress"]) {
            // A name of that file system has no dot.
            let path = PathBuf::from(format!("{}-{hook}", path.display()));
            pin(program, &path)?;
            let place = ["filter", "add", "dev", device, hook, "prio", "77", "protocol", "all"];
            let pinned = path.to_string_lossy().into_owned();
            self.pins.push(path);
            node.output("tc", &[&place[..], &["bpf", "direct-action", "object-pinned", &pinned]].concat())?;
        }
        Ok(())
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        for path in &self.pins {
            // One that is gone is what is wanted.
            std::fs::remove_file(path).ok();
        }
    }
}

/// The program for one direction. `by_pod`: what the pod sends.
fn code(seen: &OwnedFd, by_pod: bool, port: u16) -> Vec<u64> {
    let mut code = Code::default();
    code.push(insn(0xbf, 6, 1, 0, 0)); // r6 = ctx
    for at in [-40, -32, -24, -16, -8] {
        code.push(insn(0x7a, 10, 0, at, 0)); // *(u64 *)(r10 + at) = 0
    }
    code.push(insn(0x61, 7, 6, PROTOCOL, 0)); // r7 = skb->protocol
    let (not_v4, end) = (code.label(), code.label());
    code.jump(0x55, 7, i32::from(0x0800u16.to_be()), not_v4);
    code.addresses(by_pod, (ETHERNET + 9, ETHERNET + 12, 4, ETHERNET + 20));
    let known = code.label();
    code.jump(0x05, 0, 0, known);
    code.here(not_v4);
    code.jump(0x55, 7, i32::from(0x86ddu16.to_be()), end);
    code.addresses(by_pod, (ETHERNET + 6, ETHERNET + 8, 16, ETHERNET + 40));
    code.here(known);
    // Neither TCP nor UDP: not its business.
    code.push(insn(0x71, 7, 10, TRANSPORT, 0));
    let ours = code.label();
    code.jump(0x15, 7, 6, ours);
    code.jump(0x55, 7, 17, end);
    code.here(ours);
    code.push(insn(0x69, 7, 10, POD_PORT, 0));
    let (remember, require) = (code.label(), code.label());
    // The pod's server is asked by others; by any other port the pod asks.
    let at_server = if by_pod { require } else { remember };
    code.jump(0x15, 7, i32::from(port.to_be()), at_server);
    code.jump(0x05, 0, 0, if by_pod { remember } else { require });
    code.here(remember);
    code.push(insn(0x62, 10, 0, VALUE, 1));
    code.map(seen);
    code.stack(2, KEY);
    code.stack(3, VALUE);
    code.push(mov(4, 0));
    code.push(insn(0x85, 0, 0, 0, 2)); // bpf_map_update_elem
    code.jump(0x05, 0, 0, end);
    code.here(require);
    code.map(seen);
    code.stack(2, KEY);
    code.push(insn(0x85, 0, 0, 0, 1)); // bpf_map_lookup_elem
    code.jump(0x55, 0, 0, end);
    code.push(mov(0, DROP));
    code.push(EXIT);
    code.here(end);
    code.push(mov(0, NEXT));
    code.push(EXIT);
    code.finish()
}

/// A program that grows, and the jumps in it that wait for their target.
#[derive(Default)]
struct Code {
    code: Vec<u64>,
    targets: Vec<usize>,
    jumps: Vec<(usize, usize)>,
}

impl Code {
    fn push(&mut self, instruction: u64) {
        self.code.push(instruction);
    }

    fn label(&mut self) -> usize {
        self.targets.push(0);
        self.targets.len() - 1
    }

    fn here(&mut self, label: usize) {
        self.targets[label] = self.code.len();
    }

    fn jump(&mut self, op: u8, register: u8, value: i32, label: usize) {
        self.jumps.push((self.code.len(), label));
        self.push(insn(op, register, 0, 0, value));
    }

    /// A register points to this place on the stack.
    fn stack(&mut self, register: u8, at: i16) {
        self.push(insn(0xbf, register, 10, 0, 0));
        self.push(insn(0x07, register, 0, 0, i32::from(at)));
    }

    /// Register 1 is the map.
    fn map(&mut self, map: &OwnedFd) {
        self.push(insn(0x18, 1, 1, 0, map.as_raw_fd())); // BPF_PSEUDO_MAP_FD
        self.push(0);
    }

    /// Copies a part of the packet to the stack.
    fn copy(&mut self, offset: i32, to: i16, length: i32) {
        self.push(insn(0xbf, 1, 6, 0, 0));
        self.push(mov(2, offset));
        self.stack(3, to);
        self.push(mov(4, length));
        self.push(insn(0x85, 0, 0, 0, 26)); // bpf_skb_load_bytes
    }

    /// Copies what makes a key, whoever of both sends: offsets of the protocol and the addresses, an address's length, and
    /// the ports' offset.
    fn addresses(&mut self, by_pod: bool, (transport, address, length, ports): (i32, i32, i32, i32)) {
        let (src, dst, sport, dport) = match by_pod {
            true => (POD_ADDRESS, PEER_ADDRESS, POD_PORT, PEER_PORT),
            false => (PEER_ADDRESS, POD_ADDRESS, PEER_PORT, POD_PORT),
        };
        self.copy(transport, TRANSPORT, 1);
        self.copy(address, src, length);
        self.copy(address + length, dst, length);
        self.copy(ports, sport, 2);
        self.copy(ports + 2, dport, 2);
    }

    fn finish(mut self) -> Vec<u64> {
        for (at, label) in self.jumps {
            let distance = (self.targets[label] - at - 1) as u16;
            self.code[at] |= u64::from(distance) << 16;
        }
        self.code
    }
}
