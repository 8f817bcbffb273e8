//! A TCP relay in front of the API server that a case can cut, as a network between them would.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use fairlead_lab::Namespace;

/// Where the relay listens: the certificate of the API server covers the address, whatever the port.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 16443);

/// A relay on the node's loopback. While it is cut, connections through it are reset and new ones are refused.
pub(crate) struct Relay {
    netns: Namespace,
    to: SocketAddr,
    running: Option<Running>,
}

struct Running {
    stop: Arc<AtomicBool>,
    // Both ends of every connection, so that a cut reaches them.
    streams: Arc<Mutex<Vec<TcpStream>>>,
    thread: JoinHandle<()>,
}

impl Relay {
    pub(crate) fn start(netns: &Namespace, to: SocketAddr) -> Self {
        let mut relay = Self { netns: netns.clone(), to, running: None };
        relay.heal();
        relay
    }

    /// Where the agent finds it.
    pub(crate) fn address(&self) -> SocketAddr {
        LISTEN
    }

    /// Breaks every connection and refuses new ones. When it returns nothing passes any more.
    pub(crate) fn cut(&mut self) {
        let Some(running) = self.running.take() else { return };
        running.stop.store(true, Ordering::Relaxed);
        running.thread.join().unwrap();
        for stream in running.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // One that has ended by itself is not connected any more.
            stream.shutdown(Shutdown::Both).ok();
        }
    }

    /// The clients' ends of the connections that went through since the last cut.
    pub(crate) fn clients(&self) -> Vec<SocketAddr> {
        let Some(running) = &self.running else { return Vec::new() };
        let streams = running.streams.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has ended has no peer any more; the server's ends have the server for a peer.
        streams.iter().filter_map(|stream| stream.peer_addr().ok()).filter(|peer| *peer != self.to).collect()
    }

    /// Lets connections through (again).
    pub(crate) fn heal(&mut self) {
        assert!(self.running.is_none(), "the relay is not cut");
        let listener = self.netns.run(|| TcpListener::bind(LISTEN)).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, streams) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (netns, to) = (self.netns.clone(), self.to);
        let (stopped, connections) = (Arc::clone(&stop), Arc::clone(&streams));
        let thread = std::thread::spawn(move || {
            netns.enter().unwrap();
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => pass(stream, to, &connections),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    Err(error) => panic!("the relay cannot accept: {error}"),
                }
            }
        });
        self.running = Some(Running { stop, streams, thread });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.cut();
        }
    }
}

/// Connects onward and copies in both directions, on two threads that end with the connection.
fn pass(from_client: TcpStream, to: SocketAddr, streams: &Mutex<Vec<TcpStream>>) {
    // No server: the client's connection ends here, as it would without a relay.
    let Ok(to_server) = TcpStream::connect(to) else { return };
    for stream in [&from_client, &to_server] {
        stream.set_nonblocking(false).unwrap();
        stream.set_nodelay(true).unwrap();
        streams.lock().unwrap_or_else(PoisonError::into_inner).push(stream.try_clone().unwrap());
    }
    let back = (to_server.try_clone().unwrap(), from_client.try_clone().unwrap());
    for (mut reader, mut writer) in [(from_client, to_server), back] {
        std::thread::spawn(move || {
            // However the copying ends, the other side learns of it.
            io::copy(&mut reader, &mut writer).ok();
            writer.shutdown(Shutdown::Both).ok();
            reader.shutdown(Shutdown::Both).ok();
        });
    }
}
