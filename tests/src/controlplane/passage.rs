//! A way to the API server from another network namespace.
//!
//! The API server listens on loopback only, so that nothing of the cluster's own wiring can carry it, or cut it.

use std::{
    io,
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use fairlead_lab::Namespace;

use super::{ControlPlane, SERVER};

const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the API server answer at its own address in another namespace as well: kubeconfigs hold there, too. Dropping it
/// ends that for new connections.
#[derive(Debug)]
pub struct Passage {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Passage {
    /// Listens in `from` and connects in the namespace of the control plane.
    pub fn open(from: &Namespace, plane: &ControlPlane) -> Result<Self> {
        let listener =
            from.run(listen)?.with_context(|| format!("cannot listen on {SERVER} in namespace {}", from.name()))?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, to) = (Arc::clone(&stop), plane.netns.clone());
        let thread = std::thread::spawn(move || accept(&listener, &to, &stopped));
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            thread.join().ok();
        }
    }
}

/// The passage before this one may still be held by a process that another thread is just starting: until it executes its
/// program, it has whatever was open.
fn listen() -> io::Result<TcpListener> {
    let start = Instant::now();
    loop {
        match TcpListener::bind(SERVER) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

fn accept(listener: &TcpListener, to: &Namespace, stopped: &AtomicBool) {
    if let Err(error) = to.enter() {
        eprintln!("a passage to the API server: {error:#}");
        return;
    }
    while !stopped.load(Ordering::Relaxed) {
        match listener.accept() {
            // No server: the client's connection ends here, as it would without a passage.
            Ok((client, _)) => drop(TcpStream::connect(SERVER).and_then(|server| pass(client, server))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => {
                eprintln!("a passage to the API server cannot accept: {error}");
                return;
            }
        }
    }
}

/// Copies in both directions, on two threads that end with the connection.
fn pass(client: TcpStream, server: TcpStream) -> io::Result<()> {
    client.set_nonblocking(false)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let back = (server.try_clone()?, client.try_clone()?);
    for (mut reader, mut writer) in [(client, server), back] {
        std::thread::spawn(move || {
            // However the copying ends, the other side learns of it.
            io::copy(&mut reader, &mut writer).ok();
            writer.shutdown(Shutdown::Both).ok();
            reader.shutdown(Shutdown::Both).ok();
        });
    }
    Ok(())
}
