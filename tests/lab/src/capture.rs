//! Captures: every IP packet that passes a device, seen behind the tc hooks of that device's own namespace.
//!
//! Inside a pod, where no program is attached, a capture on `eth0` is exactly what the pod sends and receives.

use std::{
    fmt::Write as _,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{client::PATIENCE, netns::Namespace, packet::Packet, server::wait_until, sys};

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    packets: Arc<Mutex<Vec<Packet>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How long the last packets may need from the socket to the list.
const SETTLE: Duration = Duration::from_millis(15);

impl Capture {
    /// Listens on a device of the namespace; everything from now on is recorded.
    pub fn start(ns: &Namespace, device: &str) -> Result<Self> {
        let socket = ns
            .run(|| sys::packet_socket(device, true))?
            .with_context(|| format!("cannot capture on {device} in {}", ns.name()))?;
        let (packets, stop) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicBool>::default());
        let (sink, stopped) = (Arc::clone(&packets), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || listen(&socket, &sink, &stopped))
            .context("cannot start a capture thread")?;
        Ok(Self { packets, stop, thread: Some(thread) })
    }

    /// Waits until a packet like this one is recorded. False if none comes.
    pub fn wait_for(&self, wanted: impl Fn(&Packet) -> bool) -> bool {
        let seen = || self.packets.lock().unwrap_or_else(PoisonError::into_inner).iter().any(&wanted);
        wait_until(PATIENCE, seen)
    }

    /// What was recorded so far, without ending the capture.
    pub fn so_far(&self) -> Vec<Packet> {
        std::thread::sleep(SETTLE);
        self.packets.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the capture and returns what it recorded.
    pub fn stop(mut self) -> Vec<Packet> {
        std::thread::sleep(SETTLE);
        self.end();
        std::mem::take(&mut *self.packets.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; what was recorded before it stands.
            thread.join().ok();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

fn listen(socket: &OwnedFd, sink: &Mutex<Vec<Packet>>, stop: &AtomicBool) {
    // What a frame without an Ethernet header is shown with.
    const HEADER: usize = 14;
    let mut buffer = vec![0; HEADER + (1 << 17)];
    loop {
        // Looked at first: what the socket holds when the end is asked for is read all the same.
        let last = stop.load(Ordering::Relaxed);
        // An interrupted wait is a short wait.
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5u8)).ok();
        loop {
            match sys::receive_frame(socket.as_fd(), &mut buffer[HEADER..]) {
                Ok(received) => {
                    let end = HEADER + received.length;
                    let frame = if received.ethernet {
                        &buffer[HEADER..end]
                    } else {
                        let kind = if buffer[HEADER] >> 4 == 6 { [0x86, 0xdd] } else { [0x08, 0x00] };
                        buffer[..HEADER].fill(0);
                        buffer[HEADER - 2..HEADER].copy_from_slice(&kind);
                        &buffer[..end]
                    };
                    if let Some(packet) = Packet::parse(frame, received.outgoing) {
                        sink.lock().unwrap_or_else(PoisonError::into_inner).push(packet);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The device went away or down; there is nothing more to see.
                Err(_) => return,
            }
        }
        if last {
            return;
        }
    }
}

/// The packets as text, one a line, for failure messages.
pub fn show<'a>(packets: impl IntoIterator<Item = &'a Packet>) -> String {
    let mut text = String::new();
    for packet in packets {
        // Writing to a String cannot fail.
        writeln!(text, "  {packet}").ok();
    }
    text
}
