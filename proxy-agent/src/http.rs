//! Small answers over plain HTTP/1.1: health checks and metrics. Bounded, because anybody can ask.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Connections that one server holds at a time; further ones wait in the kernel.
const CONNECTIONS: usize = 256;
/// A connection is closed after this long, however it is used: those who ask again connect again.
const LIFETIME: Duration = Duration::from_secs(120);
/// Time for a request to arrive.
const REQUEST: Duration = Duration::from_secs(10);
/// Connections that may wait in the kernel.
const BACKLOG: i32 = 128;
/// Pause after an accept that failed, such as for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Pause between two attempts to listen (rules 121 and 131).
const LISTEN_RETRY: Duration = Duration::from_secs(5);

/// An answer.
pub type Answer = Response<String>;

/// An answer of this status, type and body.
pub fn answer(status: StatusCode, content_type: &'static str, body: impl Into<String>) -> Answer {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// The same as JSON that no browser takes for anything else, as kube-proxy sends it.
pub fn json(yes: bool, body: String) -> Answer {
    let status = if yes { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut answer = answer(status, "application/json", body);
    answer.headers_mut().insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    answer
}

/// What a path that nobody serves gets.
pub fn not_found() -> Answer {
    answer(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n")
}

/// Which of both families an unspecified address stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Both, whichever of the two it is.
    Both,
    /// Its own only.
    Own,
}

/// Listens at an address. Must be called inside the runtime.
pub fn listen(addr: SocketAddr, reach: Reach) -> io::Result<TcpListener> {
    if reach == Reach::Both && addr.ip().is_unspecified() {
        let both = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), addr.port());
        return match open(both, false) {
            // A node without IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                open(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), addr.port()), false)
            }
            result => result,
        };
    }
    open(addr, true)
}

fn open(addr: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.cloexec().nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Nobody can listen there.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen at {addr}: {source}")]
pub struct ListenError {
    addr: SocketAddr,
    source: io::Error,
}

/// Where a server listens, from now on or as soon as it can.
#[derive(Debug)]
pub struct Place {
    what: &'static str,
    addr: SocketAddr,
    open: Option<TcpListener>,
}

impl Place {
    /// Listened on already (`--bind-address-hard-fail`).
    pub fn open(what: &'static str, addr: SocketAddr) -> Result<Self, ListenError> {
        let listener = match listen(addr, Reach::Both) {
            Err(_) if mutant!("rule-121") => return Ok(Self::wanted(what, addr)),
            result => result.map_err(|source| ListenError { addr, source })?,
        };
        tracing::info!(what, %addr, "listening");
        Ok(Self { what, addr, open: Some(listener) })
    }

    /// To be listened on.
    pub const fn wanted(what: &'static str, addr: SocketAddr) -> Self {
        Self { what, addr, open: None }
    }

    /// The socket. Until it can be had, that is tried again.
    pub async fn listener(self) -> TcpListener {
        match self.open {
            Some(listener) => listener,
            None => listen_patiently(self.what, self.addr).await,
        }
    }
}

/// Listens, and tries again until it can; why it could not is said once.
async fn listen_patiently(what: &'static str, addr: SocketAddr) -> TcpListener {
    let mut said = None;
    loop {
        match listen(addr, Reach::Both) {
            Ok(listener) => {
                tracing::info!(what, %addr, "listening");
                return listener;
            }
            Err(error) if said.as_ref() != Some(&error.kind()) => {
                tracing::error!(what, %addr, %error, "cannot listen; trying again");
                said = Some(error.kind());
            }
            Err(_) => {}
        }
        tokio::time::sleep(LISTEN_RETRY).await;
    }
}

/// Answers for ever. Dropping the future closes the socket and every connection.
pub async fn serve<A, F>(listener: TcpListener, handler: A)
where
    A: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send,
{
    let (handler, room) = (Arc::new(handler), Arc::new(Semaphore::new(CONNECTIONS)));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let permit = Arc::clone(&room).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let handler = Arc::clone(&handler);
        connections.spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request| {
                let handler = Arc::clone(&handler);
                async move { Ok::<_, std::convert::Infallible>(handler(request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST)
                .serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = tokio::time::timeout(LIFETIME, connection).await {
                tracing::debug!(%error, "a connection broke");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    }

    fn ask(addr: SocketAddr, request: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn an_answer_has_its_status_type_and_body_and_a_dropped_server_is_gone() {
        let runtime = runtime();
        let listener = runtime.block_on(async { listen("127.0.0.1:0".parse().unwrap(), Reach::Own) }).unwrap();
        let addr = listener.local_addr().unwrap();
        let server = runtime.spawn(serve(listener, |request| {
            std::future::ready(json(request.uri().path() == "/yes", format!("{{\"method\":\"{}\"}}", request.method())))
        }));
        let text =
            ask(addr, "POST /yes HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("{\"method\":\"POST\"}"), "{text}");
        assert!(text.contains("content-type: application/json\r\n"), "{text}");
        assert!(text.contains("x-content-type-options: nosniff\r\n"), "{text}");
        let text = ask(addr, "GET /no HTTP/1.0\r\n\r\n").unwrap();
        assert!(text.starts_with("HTTP/1.0 503 "), "{text}");
        server.abort();
        runtime.block_on(server).unwrap_err();
        assert!(TcpStream::connect(addr).is_err(), "nobody listens any more");
    }

    #[test]
    fn rule_121_a_port_that_is_taken_fails_at_once_or_is_waited_for() {
        let runtime = runtime();
        let _guard = runtime.enter();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = taken.local_addr().unwrap();
        let error = Place::open("health", addr).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot listen at {addr}: ")), "{error}");
        let waiting = runtime.spawn(Place::wanted("health", addr).listener());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(taken);
        let listener = runtime.block_on(async { tokio::time::timeout(LISTEN_RETRY * 6, waiting).await });
        assert_eq!(listener.unwrap().unwrap().local_addr().unwrap(), addr);
    }

    #[test]
    fn an_unspecified_address_stands_for_one_family_or_both() {
        let runtime = runtime();
        let connects = |addr: &str, port: u16| TcpStream::connect(format!("{addr}:{port}")).is_ok();
        let listened = |addr: &str, reach| runtime.block_on(async { listen(addr.parse().unwrap(), reach) }).unwrap();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let v4 = listened("0.0.0.0:0", Reach::Own);
        assert!(connects("127.0.0.1", port(&v4)) && !connects("[::1]", port(&v4)));
        let v6 = listened(&format!("[::]:{}", port(&v4)), Reach::Own);
        assert!(connects("[::1]", port(&v6)), "each family has its own socket");
        drop((v4, v6));
        for addr in ["0.0.0.0:0", "[::]:0"] {
            let both = listened(addr, Reach::Both);
            assert!(connects("127.0.0.1", port(&both)) && connects("[::1]", port(&both)), "{addr}");
        }
    }
}
