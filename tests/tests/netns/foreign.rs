//! Other people's programs on the same devices: they keep running, and they are there when we have gone.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::PoisonError,
    time::Duration,
};

use fairlead_lab::{AgentOptions, Ask, Namespace, Outcome, Proto};

use crate::cell::{Cell, Cluster, PATIENCE, answered, eventually};

/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` of `enum bpf_attach_type`.
const TCX: [u32; 2] = [46, 47];

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

/// A program of two instructions that returns a verdict.
pub(crate) fn program(verdict: i32) -> io::Result<OwnedFd> {
    let mut code = [0u8; 16];
    code[0] = 0xb7; // mov64 r0, imm
    code[4..8].copy_from_slice(&verdict.to_ne_bytes());
    code[8] = 0x95; // exit
    let license = c"Apache-2.0";
    let mut words = [0u32; 36];
    words[0] = 3; // BPF_PROG_TYPE_SCHED_CLS
    words[1] = 2; // instructions
    words[2..4].copy_from_slice(&split(code.as_ptr()));
    words[4..6].copy_from_slice(&split(license.as_ptr().cast()));
    descriptor(5, &mut words) // BPF_PROG_LOAD
}

/// Pins a program, for `tc` to find.
pub(crate) fn pin(program: &OwnedFd, path: &std::path::Path) -> io::Result<()> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut words = [0u32; 36];
    words[0..2].copy_from_slice(&split(name.as_ptr().cast()));
    words[2] = program.as_raw_fd() as u32;
    bpf(6, &mut words).map(drop) // BPF_OBJ_PIN
}

/// A tcx link to a device of the namespace.
fn attach(ns: &Namespace, device: &str, program: &OwnedFd, hook: u32) -> io::Result<OwnedFd> {
    ns.run(|| {
        let mut words = [0u32; 36];
        words[0] = program.as_raw_fd() as u32;
        words[1] = nix::net::if_::if_nametoindex(device)?;
        words[2] = hook;
        descriptor(28, &mut words) // BPF_LINK_CREATE
    })
    .expect("the namespace is there")
}

const NEXT: i32 = -1;
const DROP: i32 = 2;

#[test]
fn a_foreign_tcx_program_keeps_its_say_beside_ours() {
    if !proxy_agent::dataplane::probe::features().expect("programs can be loaded").tcx {
        println!("this kernel has no tcx, for others or for us");
        return;
    }
    let cluster = Cluster::own(Cell::named("routed_plain"), AgentOptions::default());
    let (service, client) = (cluster.service("tcx"), &cluster.lab.client);
    let ask = Ask::new(Proto::Udp, service.vip(false)).timeout(Duration::from_millis(100));
    service.serve(&service.pods(&[0]), &client.ns, ask).unwrap();
    let (next, drop_all) = (program(NEXT).unwrap(), program(DROP).unwrap());
    for hook in TCX {
        let _beside = attach(&cluster.lab.node.ns, &client.node_device, &next, hook).unwrap();
        answered(&client.ns, ask.timeout(PATIENCE)).unwrap();
        let dropping = attach(&cluster.lab.node.ns, &client.node_device, &drop_all, hook).unwrap();
        let attempt = ask.once(&client.ns).unwrap();
        assert_eq!(attempt.outcome, Outcome::Timeout, "hook {hook}: the foreign verdict was not heard");
        // A restart and a clean-up take away what is ours, not what is theirs.
        let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
        agent.stop().unwrap();
        agent.restart(&cluster.lab).unwrap();
        assert_eq!(ask.once(&client.ns).unwrap().outcome, Outcome::Timeout, "hook {hook}, after a restart");
        drop(dropping);
        drop(agent);
        eventually("an answer without the foreign program", &client.ns, ask, |a| a.outcome.answer().is_some()).unwrap();
    }
}

#[test]
fn a_foreign_clsact_filter_keeps_its_say_and_outlives_us() {
    let cluster = Cluster::own(Cell::named("bridge_conntrack"), AgentOptions::default());
    let (service, client) = (cluster.service("clsact"), &cluster.lab.client);
    let (node, device) = (&cluster.lab.node.ns, &*client.node_device);
    let ask = Ask::new(Proto::Udp, service.vip(false)).timeout(Duration::from_millis(100));
    service.serve(&service.pods(&[0]), &client.ns, ask).unwrap();
    // The qdisc may be there already: the agent's, or the kernel's own.
    node.output("tc", &["qdisc", "add", "dev", device, "clsact"]).ok();
    let pinned = fairlead_lab::janitor::BPF_FS.to_owned() + "/" + &cluster.lab.id + "-foreign";
    pin(&program(DROP).unwrap(), pinned.as_ref()).unwrap();
    let add = |hook: &str| {
        let place = ["filter", "add", "dev", device, hook, "prio", "77", "protocol", "all"];
        node.output("tc", &[&place[..], &["bpf", "direct-action", "object-pinned", &pinned]].concat())
    };
    for hook in ["ingress", "egress"] {
        add(hook).unwrap();
        assert_eq!(ask.once(&client.ns).unwrap().outcome, Outcome::Timeout, "{hook}: the foreign filter was passed by");
        {
            let mut agent = cluster.agent.lock().unwrap_or_else(PoisonError::into_inner);
            agent.stop().unwrap();
            agent.restart(&cluster.lab).unwrap();
            agent.stop().unwrap();
            agent.fairlead(&["cleanup"]).unwrap();
            let listed = node.output("tc", &["filter", "show", "dev", device, hook]).unwrap();
            assert!(listed.contains("pref 77"), "{hook}: clean-up took the foreign filter away:\n{listed}");
            agent.restart(&cluster.lab).unwrap();
        }
        assert_eq!(ask.once(&client.ns).unwrap().outcome, Outcome::Timeout, "{hook}, after a restart");
        node.output("tc", &["filter", "del", "dev", device, hook, "prio", "77"]).unwrap();
        eventually("an answer without the foreign filter", &client.ns, ask, |a| a.outcome.answer().is_some()).unwrap();
    }
    std::fs::remove_file(pinned).unwrap();
}
