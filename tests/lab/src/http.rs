//! One question over plain HTTP, from inside a namespace.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::netns::Namespace;

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers in their order, names in small letters.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: String,
}

impl Answer {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// Asks and waits for the answer; the outer error is of the namespace, the inner one of the connection.
pub fn ask(from: &Namespace, to: SocketAddr, method: &str, path: &str) -> Result<io::Result<Answer>> {
    let answer = from.run(|| exchange(to, method, path))?;
    answer.map(|text| parse(&text)).map_or_else(|error| Ok(Err(error)), |answer| answer.map(Ok))
}

/// Asks with GET, and any answer will do.
pub fn get(from: &Namespace, to: SocketAddr, path: &str) -> Result<Answer> {
    ask(from, to, "GET", path)?.with_context(|| format!("nobody answers at http://{to}{path}"))
}

fn exchange(to: SocketAddr, method: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn parse(text: &str) -> Result<Answer> {
    let unreadable = || format!("not an answer over HTTP: {text:?}");
    let (head, body) = text.split_once("\r\n\r\n").with_context(unreadable)?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).with_context(unreadable)?;
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    let mut answer = Answer { status, headers: lines.filter_map(header).collect(), body: body.to_owned() };
    if answer.header("transfer-encoding") == Some("chunked") {
        answer.body = joined(body).with_context(unreadable)?;
    }
    Ok(answer)
}

/// The chunks of a body, put together: each follows its length.
fn joined(mut chunks: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (length, rest) = chunks.split_once("\r\n")?;
        let length = usize::from_str_radix(length, 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body += rest.get(..length)?;
        chunks = rest.get(length..)?.strip_prefix("\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_in_chunks_is_put_together() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(
            parse(&format!("{head}3\r\none\r\na\r\n, two\r\nend\r\n0\r\n\r\n")).unwrap().body,
            "one, two\r\nend"
        );
        assert!(parse(&format!("{head}3\r\none\r\n")).is_err(), "the last chunk is missing");
    }
}
