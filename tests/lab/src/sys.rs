//! System calls that have no safe wrapper: packet sockets, batches of datagrams, socket options.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::sys::socket::{setsockopt, sockopt};

/// `ETH_P_ALL`, in network order as sockaddr_ll wants it.
const ETH_P_ALL_BE: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Asks for a receive buffer of this size, beyond the limit if root may.
pub fn set_receive_buffer(fd: &impl AsFd, bytes: usize) -> io::Result<()> {
    setsockopt(fd, sockopt::RcvBufForce, &bytes).map_err(Into::into)
}

/// Makes a socket blocking again.
pub fn set_blocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Segments that a TCP socket has sent more than once, SYNs included. 0 for one of another kind.
pub fn segments_resent(fd: BorrowedFd<'_>) -> u32 {
    // SAFETY: tcp_info is integers; zero is a value of each.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` is ours and as long as stated, and lives through the call.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    if result == 0 { info.tcpi_total_retrans } else { 0 }
}

/// A packet socket on one device of the calling thread's namespace. `listen` false: it only sends.
pub fn packet_socket(device: &str, listen: bool) -> io::Result<OwnedFd> {
    let ifindex = nix::net::if_::if_nametoindex(device)?;
    // SAFETY: plain integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if listen {
        set_receive_buffer(&fd, 64 << 20)?;
    }
    // SAFETY: sockaddr_ll is integers and arrays of them; zero is a value of each.
    let mut addr: libc::sockaddr_ll = unsafe { mem::zeroed() };
    addr.sll_family = libc::AF_PACKET as u16;
    addr.sll_protocol = if listen { ETH_P_ALL_BE } else { 0 };
    addr.sll_ifindex = ifindex as i32;
    // SAFETY: `addr` is a sockaddr_ll of the length given, and lives through the call.
    let result = unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// Makes a tun device in the calling thread's namespace, which goes with the descriptor. It carries bare IP packets, and
/// reading never waits.
pub fn open_tun(name: &str) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = open("/dev/net/tun", flags, nix::sys::stat::Mode::empty())?;
    // SAFETY: ifreq is integers, arrays and unions of them; zero is a value of each.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the call reads and writes one ifreq, which is ours and lives through it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// A raw IP socket in the calling thread's namespace, for one protocol of one family. It hears what is delivered to the host
/// of that protocol; that of `IPPROTO_RAW` hears nothing and sends packets that bring their own IP header.
pub fn raw_socket(v6: bool, protocol: u8) -> io::Result<OwnedFd> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: plain integers.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if v6 {
        setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    set_receive_buffer(&fd, 64 << 20)?;
    Ok(fd)
}

/// A frame that was received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Its length.
    pub length: usize,
    /// It was going out.
    pub outgoing: bool,
    /// It begins with an Ethernet header, and not with that of IP.
    pub ethernet: bool,
}

/// Receives one frame.
pub fn receive_frame(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    // SAFETY: as in `packet_socket`.
    let mut from: libc::sockaddr_ll = unsafe { mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: buffer and address are ours and as long as stated.
    let count = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
            (&raw mut from).cast(),
            &raw mut length,
        )
    };
    match usize::try_from(count) {
        Ok(length) => {
            let outgoing = from.sll_pkttype == libc::PACKET_OUTGOING;
            Ok(Received { length, outgoing, ethernet: from.sll_hatype != libc::ARPHRD_NONE })
        }
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Sends frames on a packet socket, many to a system call. Returns when all are on their way.
pub fn send_frames(fd: BorrowedFd<'_>, frames: &[Vec<u8>]) -> io::Result<()> {
    let mut vectors: Vec<libc::iovec> = frames
        .iter()
        .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = vectors
        .iter_mut()
        .map(|vector| {
            // SAFETY: mmsghdr is integers and pointers; zero and null are values of each.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    let mut sent = 0;
    while sent < messages.len() {
        let rest = &mut messages[sent..];
        // SAFETY: each header points to one iovec, each iovec to a frame; all live through the call, none is written.
        let count = unsafe { libc::sendmmsg(fd.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0) };
        match usize::try_from(count) {
            Ok(count) => sent += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                // The device's queue is full: the kernel wants a moment.
                if error.raw_os_error() != Some(libc::ENOBUFS) {
                    return Err(error);
                }
                std::thread::yield_now();
            }
        }
    }
    Ok(())
}
