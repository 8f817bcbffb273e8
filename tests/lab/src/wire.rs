//! What servers and clients say to each other: one line each way, the same over TCP and UDP.
//!
//! A request is `NONCE SIZE [PADDING]`; the answer is `SERVER PEER LOCAL NONCE [PADDING]` with SIZE bytes of padding.

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

/// A request line with `padding` bytes behind it, which asks for as many as `size` in the answer.
pub fn request(nonce: u64, size: usize, padding: usize) -> Vec<u8> {
    let mut line = format!("{nonce} {size}").into_bytes();
    pad(&mut line, padding);
    line
}

/// The nonce of a request line, and the size of the padding that it asks for.
pub fn parse_request(line: &[u8]) -> Option<(u64, usize)> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let parsed = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    is_padding(words.next()).then_some(parsed)
}

/// An answer line with `padding` bytes behind it.
pub fn answer(answer: &Answer, nonce: u64, padding: usize) -> Vec<u8> {
    let mut line = format!("{} {} {} {nonce}", answer.server, answer.peer, answer.local).into_bytes();
    pad(&mut line, padding);
    line
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
    is_padding(words.next()).then_some((answer, nonce))
}

/// Ends a line, with as many bytes of a repeating pattern as asked for.
fn pad(line: &mut Vec<u8>, padding: usize) {
    if padding > 0 {
        line.push(b' ');
        line.extend((0..padding).map(pattern));
    }
    line.push(b'\n');
}

/// True for nothing, and for what [`pad`] makes: a lost, doubled or changed byte breaks the pattern.
fn is_padding(word: Option<&str>) -> bool {
    word.is_none_or(|word| word.bytes().enumerate().all(|(at, byte)| byte == pattern(at)))
}

const fn pattern(at: usize) -> u8 {
    // A prime period: blocks of any common size begin differently.
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"[at % 59]
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
        for padding in [0, 1, 5000] {
            assert_eq!(parse_answer(&answer(&said, 7, padding)), Some((said.clone(), 7)));
            assert_eq!(parse_request(&request(12, 3, padding)), Some((12, 3)));
        }
        assert_eq!(parse_answer(b"pod-a 10.0.0.1:1 10.0.0.2:2\n"), None, "the nonce is missing");
        assert_eq!(parse_request(b"x 1"), None);
        let mut changed = request(12, 3, 100);
        changed[50] ^= 1;
        assert_eq!(parse_request(&changed), None);
    }
}
