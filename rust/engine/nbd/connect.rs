// SPDX-License-Identifier: GPL-2.0-only

//! Connections to an NBD server, and the negotiation at their start.

use super::protocol::{
    take_u16, take_u32, take_u64, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INFO_BLOCK_SIZE,
    INFO_EXPORT, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OPT_GO, OPT_STRUCTURED_REPLY,
    REP_ACK, REP_ERR_POLICY, REP_ERR_SHUTDOWN, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_UNSUP,
    REP_FLAG_ERROR, REP_INFO,
};
use crate::error::{Error, Result};
use crate::socket::{connect, Deadlined};
use crate::uri::{NbdAddress, NbdExport};
use rustix::io::Errno;
use rustix::net::sockopt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Limit for connecting, and for sending a message of the negotiation.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// Limit for the negotiation.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(30);

/// Time without data after which a TCP connection is probed, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Limit for the acknowledgement of sent data.
const USER_TIMEOUT_MS: u32 = 20_000;

/// The greatest length of a reply to an option.
const MAX_REPLY: u32 = 64 << 10;

/// The greatest number of replies to one option.
const MAX_REPLIES: u32 = 100;

const UPDATE_SERVER: &str = "use a newer NBD server";

/// A stream of bytes to a server.
#[derive(Debug)]
pub(super) enum Stream {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A connection over a unix socket.
    Unix(UnixStream),
}

impl Stream {
    fn connect(address: &NbdAddress) -> io::Result<OwnedFd> {
        match address {
            NbdAddress::Unix(path) => connect(path, STEP_TIMEOUT).map(OwnedFd::from),
            NbdAddress::Tcp { host, port } => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, STEP_TIMEOUT) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            sockopt::set_socket_keepalive(&stream, true)?;
                            sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
                            sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
                            sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
                            return Ok(stream.into());
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// Takes a connection that [`connect_to`] has made.
    fn new(address: &NbdAddress, fd: OwnedFd) -> Self {
        match address {
            NbdAddress::Unix(_) => Self::Unix(fd.into()),
            NbdAddress::Tcp { .. } => Self::Tcp(fd.into()),
        }
    }

    /// Sets how long a read or write may wait, or makes both return at once.
    pub(super) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nonblocking(timeout.is_none())?;
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(timeout.is_none())?;
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// The properties of an export, as reported by the server.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct ExportInfo {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// The smallest and the preferred block size, and the greatest length of a transfer, if the
    /// server says them.
    pub(super) blocks: Option<(u32, u32, u32)>,
}

/// Connects to the server of an export.
pub(crate) fn connect_to(export: &NbdExport) -> Result<OwnedFd> {
    Stream::connect(&export.address).map_err(|error| {
        Error::from_io(
            &error,
            format_args!("connecting to {export}"),
            "check that the NBD server runs and can be reached",
        )
    })
}

/// Enters the transmission phase of a new connection.
///
/// The stream is blocking, with a timeout.
pub(super) fn negotiate(export: &NbdExport, stream: OwnedFd) -> Result<(Stream, ExportInfo)> {
    let mut stream = Stream::new(&export.address, stream);
    stream
        .set_timeout(Some(STEP_TIMEOUT))
        .map_err(|error| negotiation_error(export, &error))?;
    let info = Negotiation {
        stream: Deadlined {
            socket: &mut stream,
            deadline: Instant::now() + NEGOTIATION_TIMEOUT,
        },
        export,
    }
    .run()?;
    Ok((stream, info))
}

fn negotiation_error(export: &NbdExport, error: &io::Error) -> Error {
    let errno = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Errno::TIMEDOUT,
        io::ErrorKind::UnexpectedEof => Errno::CONNRESET,
        _ => Errno::from_io_error(error).unwrap_or(Errno::IO),
    };
    Error::new(
        errno,
        format!("negotiation with {export}: {errno}"),
        "check the log of the NBD server, and its limit of connections",
    )
}

struct Negotiation<'a> {
    stream: Deadlined<&'a mut Stream>,
    export: &'a NbdExport,
}

impl Negotiation<'_> {
    fn run(&mut self) -> Result<ExportInfo> {
        let greeting: [u8; 18] = self.read()?;
        let mut bytes = &greeting[..];
        if take_u64(&mut bytes) != Some(NBD_MAGIC) || take_u64(&mut bytes) != Some(OPTION_MAGIC) {
            return Err(self.error("it is no NBD server, or an outdated one", UPDATE_SERVER));
        }
        let flags = take_u16(&mut bytes).unwrap_or_default();
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(self.error("it is an outdated NBD server", UPDATE_SERVER));
        }
        let client_flags = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.write(&u32::from(client_flags).to_be_bytes())?;
        self.negotiate_structured_replies()?;
        self.go()
    }

    /// Asks for structured replies. Without them, the error of a read cannot be told from data.
    fn negotiate_structured_replies(&mut self) -> Result<()> {
        self.send_option(OPT_STRUCTURED_REPLY, &[])?;
        match self.read_option_reply(OPT_STRUCTURED_REPLY)? {
            (REP_ACK, _) => Ok(()),
            (kind, _) if kind & REP_FLAG_ERROR != 0 && kind != REP_ERR_TLS_REQD => Ok(()),
            (kind, text) => Err(self.refused(kind, &text)),
        }
    }

    /// Enters the transmission phase.
    fn go(&mut self) -> Result<ExportInfo> {
        let name = self.export.name.as_bytes();
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name);
        data.extend(1u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.send_option(OPT_GO, &data)?;
        let mut info = None;
        let mut blocks = None;
        for _ in 0..MAX_REPLIES {
            let (kind, payload) = self.read_option_reply(OPT_GO)?;
            let mut rest = &payload[..];
            match (kind, info) {
                (REP_ACK, Some((size, flags))) => {
                    return Ok(ExportInfo {
                        size,
                        flags,
                        blocks,
                    });
                }
                (REP_INFO, _) => match take_u16(&mut rest) {
                    Some(INFO_EXPORT) => info = take_u64(&mut rest).zip(take_u16(&mut rest)),
                    Some(INFO_BLOCK_SIZE) => {
                        blocks = take_u32(&mut rest)
                            .zip(take_u32(&mut rest))
                            .zip(take_u32(&mut rest))
                            .map(|((least, preferred), most)| (least, preferred, most));
                    }
                    _ => {}
                },
                _ => return Err(self.refused(kind, &payload)),
            }
        }
        Err(self.error("it sends too many replies", UPDATE_SERVER))
    }

    fn send_option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.write(&bytes)
    }

    fn read_option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>)> {
        let header: [u8; 20] = self.read()?;
        let mut bytes = &header[..];
        let is_valid = take_u64(&mut bytes) == Some(OPTION_REPLY_MAGIC)
            && take_u32(&mut bytes) == Some(option);
        let kind = take_u32(&mut bytes);
        let length = take_u32(&mut bytes).filter(|length| *length <= MAX_REPLY);
        match (is_valid, kind, length) {
            (true, Some(kind), Some(length)) => {
                let mut payload = vec![0; length as usize];
                self.stream
                    .read_exact(&mut payload)
                    .map_err(|error| negotiation_error(self.export, &error))?;
                Ok((kind, payload))
            }
            _ => Err(self.error("it sends an invalid reply", UPDATE_SERVER)),
        }
    }

    fn refused(&self, kind: u32, text: &[u8]) -> Error {
        let (why, remedy) = match kind {
            REP_ERR_UNKNOWN => ("it has no such export", "check the name of the export"),
            REP_ERR_TLS_REQD => (
                "it requires TLS",
                "use a unix socket, or a tunnel such as stunnel",
            ),
            REP_ERR_POLICY => ("it does not permit this", "check its configuration"),
            REP_ERR_UNSUP => ("it is an outdated NBD server", UPDATE_SERVER),
            REP_ERR_SHUTDOWN => ("it is shutting down", "start it again"),
            _ => ("it refuses the export", "check the log of the NBD server"),
        };
        let text = String::from_utf8_lossy(text);
        let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        let why = if text.is_empty() {
            why.to_owned()
        } else {
            format!("{why} ({text})")
        };
        self.error(&why, remedy)
    }

    fn error(&self, why: &str, remedy: &'static str) -> Error {
        Error::new(
            Errno::PROTO,
            format!("the server of {} cannot be used: {why}", self.export),
            remedy,
        )
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream
            .read_exact(&mut bytes)
            .map_err(|error| negotiation_error(self.export, &error))?;
        Ok(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .socket
            .write_all(bytes)
            .map_err(|error| negotiation_error(self.export, &error))
    }
}
