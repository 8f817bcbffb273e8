//! What servers and clients say to each other: one line each way, the same over TCP and UDP.

use std::{fmt, net::SocketAddr};

/// Transport of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proto {
    /// One connection, one or more request lines.
    Tcp,
    /// One datagram each way.
    Udp,
}

impl Proto {
    /// Both transports.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// The name that Kubernetes uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }

    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a server says about one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The server's name.
    pub server: String,
    /// The client's address, as the server saw it.
    pub peer: SocketAddr,
    /// The server's own address, as its socket has it.
    pub local: SocketAddr,
}

/// A request line.
pub fn request(nonce: u64) -> Vec<u8> {
    format!("{nonce}\n").into_bytes()
}

/// The nonce of a request line (without the line's end).
pub fn parse_request(line: &[u8]) -> Option<u64> {
    std::str::from_utf8(line).ok()?.trim_end().parse().ok()
}

/// An answer line.
pub fn answer(answer: &Answer, nonce: u64) -> Vec<u8> {
    format!("{} {} {} {nonce}\n", answer.server, answer.peer, answer.local).into_bytes()
}

/// An answer line taken apart: the answer, and the nonce it echoes.
pub fn parse_answer(line: &[u8]) -> Option<(Answer, u64)> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let answer = Answer {
        server: words.next()?.to_owned(),
        peer: words.next()?.parse().ok()?,
        local: words.next()?.parse().ok()?,
    };
    let nonce = words.next()?.parse().ok()?;
    words.next().is_none().then_some((answer, nonce))
}

/// The same address without an IPv4-mapped form.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_survives_the_wire() {
        let said = Answer {
            server: "pod-a".to_owned(),
            peer: "[fd00::1]:4000".parse().unwrap(),
            local: "[fd00::2]:80".parse().unwrap(),
        };
        assert_eq!(parse_answer(&answer(&said, 7)), Some((said, 7)));
        assert_eq!(parse_answer(b"pod-a 10.0.0.1:1 10.0.0.2:2\n"), None, "the nonce is missing");
        assert_eq!(parse_request(b"12\n"), Some(12));
        assert_eq!(parse_request(b"x"), None);
    }
}
