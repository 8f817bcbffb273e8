//! Whether kube-proxy's rules still stand in this network namespace. While they do, TCP in mid-stream that we never
//! saw is theirs.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::path::Path;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// The chain through which the iptables modes pass everything.
const CHAIN: &str = "KUBE-SERVICES";

/// True if kube-proxy's rules stand: its nftables table, its iptables chain (in either flavour), or its IPVS device.
pub fn stands() -> io::Result<bool> {
    Ok(in_nftables()? || in_legacy_iptables() || Path::new("/sys/class/net/kube-ipvs0").exists())
}

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;

fn in_nftables() -> io::Result<bool> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    for family in [NFPROTO_IPV4, NFPROTO_IPV6] {
        let table = request(family, NFT_MSG_GETTABLE, &[(NFTA_TABLE_NAME, "kube-proxy")]);
        let chain = request(family, NFT_MSG_GETCHAIN, &[(NFTA_CHAIN_TABLE, "nat"), (NFTA_CHAIN_NAME, CHAIN)]);
        if exists(&socket, &table)? || exists(&socket, &chain)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A question for one nftables object: netlink header, nfgenmsg, attributes.
fn request(family: u8, message: u16, attributes: &[(u16, &str)]) -> Vec<u8> {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NLM_F_REQUEST: u16 = 1;
    let mut bytes = vec![0; 16];
    bytes.extend([family, 0, 0, 0]);
    for (kind, text) in attributes {
        let len = 4 + text.len() + 1;
        bytes.extend((len as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len() + 1 + (4 - len % 4) % 4, 0);
    }
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&(NFNL_SUBSYS_NFTABLES << 8 | message).to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    bytes
}

/// True if the kernel answers with the object, false if with an error: there is none, or no nftables at all.
fn exists(socket: &Socket, request: &[u8]) -> io::Result<bool> {
    const NLMSG_ERROR: u16 = 2;
    socket.send(request, 0)?;
    let mut answer = Vec::with_capacity(8_192);
    socket.recv(&mut answer, 0)?;
    let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    match kind {
        Some(NLMSG_ERROR) => match answer.get(16..20).map(|b| -i32::from_ne_bytes([b[0], b[1], b[2], b[3]])) {
            Some(libc::EPERM | libc::EACCES) => Err(io::Error::from_raw_os_error(libc::EPERM)),
            _ => Ok(false),
        },
        Some(_) => Ok(true),
        None => Err(io::Error::other("a netlink answer without a header")),
    }
}

/// Looks for the chain in the legacy tables. Only if they are in use: to ask for a table is to make it.
fn in_legacy_iptables() -> bool {
    const IPT_SO_GET_INFO: i32 = 64;
    const IPT_SO_GET_ENTRIES: i32 = 65;
    let in_use = |path: &str| std::fs::read_to_string(path).is_ok_and(|names| names.lines().any(|name| name == "nat"));
    let families =
        [("/proc/net/ip_tables_names", libc::IPPROTO_IP), ("/proc/net/ip6_tables_names", libc::IPPROTO_IPV6)];
    families.into_iter().filter(|(path, _)| in_use(path)).any(|(_, level)| {
        let info = ask(level, IPT_SO_GET_INFO, INFO_LEN, 0);
        // struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size.
        let size = info.and_then(|info| info.get(80..84).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])));
        let entries = size.and_then(|size| ask(level, IPT_SO_GET_ENTRIES, ENTRIES_HEAD + size as usize, size));
        // A chain's name stands in its first entry, as the text of an ERROR target.
        entries.is_some_and(|bytes| bytes.windows(CHAIN.len()).any(|window| window == CHAIN.as_bytes()))
    })
}

/// `struct ipt_getinfo`.
const INFO_LEN: usize = 84;
/// `struct ipt_get_entries` up to its entries: `name[32]`, `size`, aligned to 8.
const ENTRIES_HEAD: usize = 40;

fn ask(level: i32, option: i32, len: usize, size: u32) -> Option<Vec<u8>> {
    let socket = match level {
        libc::IPPROTO_IPV6 => UdpSocket::bind("[::]:0"),
        _ => UdpSocket::bind("0.0.0.0:0"),
    };
    let mut bytes = vec![0u8; len];
    bytes[..3].copy_from_slice(b"nat");
    bytes[32..36].copy_from_slice(&size.to_ne_bytes());
    let mut got = len as libc::socklen_t;
    // SAFETY: a live buffer of the length given; the kernel writes at most that much.
    let ret = unsafe { libc::getsockopt(socket.ok()?.as_raw_fd(), level, option, bytes.as_mut_ptr().cast(), &mut got) };
    (ret == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_padded_and_says_its_length() {
        let bytes = request(NFPROTO_IPV4, NFT_MSG_GETTABLE, &[(NFTA_TABLE_NAME, "kube-proxy")]);
        // 16 header, 4 nfgenmsg, 4 + 11 attribute, 1 pad.
        assert_eq!(bytes.len(), 36);
        assert_eq!(bytes[..4], 36u32.to_ne_bytes());
        assert_eq!(bytes[20..22], 15u16.to_ne_bytes());
        assert_eq!(&bytes[24..36], b"kube-proxy\0\0");
    }
}
