//! A wire of IP packets: two tun devices, one in each of two namespaces, and a thread that carries from one to the other.
//!
//! What a tunnel's device is to the node: packets without an Ethernet header, no neighbours, no MAC addresses.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{read, write},
};

use crate::{netns::Namespace, schedule, sys};

/// Both devices; they go when it is dropped.
#[derive(Debug)]
pub struct TunPair {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TunPair {
    /// Makes the devices, down and without addresses.
    pub fn new(one: (&Namespace, &str), other: (&Namespace, &str)) -> Result<Self> {
        let open = |(ns, device): (&Namespace, &str)| {
            ns.run(|| sys::open_tun(device))?
                .with_context(|| format!("cannot make the tun device {device} in {}", ns.name()))
        };
        let ends = [open(one)?, open(other)?];
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("tun".to_owned())
            .spawn(move || carry(&ends, &stopped))
            .context("cannot start the thread of a pair of tun devices")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for TunPair {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            thread.join().ok();
        }
    }
}

fn carry(ends: &[OwnedFd; 2], stop: &AtomicBool) {
    schedule::go_first();
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let mut waiting = ends.each_ref().map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        // An interrupted wait is a short wait.
        poll(&mut waiting, PollTimeout::from(20u8)).ok();
        for (from, to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
            loop {
                match read(from, &mut buffer) {
                    // A device that is down takes nothing, as a wire that nobody listens to.
                    Ok(length) => drop(write(to, &buffer[..length])),
                    Err(Errno::EAGAIN) => break,
                    // Down for now, or gone with its namespace: each wait ends at once then.
                    Err(_) => {
                        std::thread::sleep(Duration::from_millis(5));
                        break;
                    }
                }
            }
        }
    }
}
