// SPDX-License-Identifier: GPL-2.0-only

//! Sockets whose operations have a limit.

use rustix::io::{retry_on_intr, Errno};
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Connects to a unix socket, for which it waits up to `timeout`: the server may have as many
/// connections as it accepts at a time.
pub(crate) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(path)?;
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    match retry_on_intr(|| net::connect(&socket, &address)) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
        Err(errno) => return Err(errno.into()),
    }
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket.into())
}

/// A socket whose reads fail with `TimedOut` at a deadline, however slowly the other end writes.
pub(crate) struct Deadlined<S> {
    pub(crate) socket: S,
    pub(crate) deadline: Instant,
}

impl<S: Read + AsFd> Read for Deadlined<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // A part of a microsecond would be rounded up, to a million of them in the worst case,
        // which the kernel refuses.
        let nanos = left.subsec_micros().max(1).saturating_mul(1000);
        let left = Duration::new(left.as_secs(), nanos);
        set_socket_timeout(&self.socket, Timeout::Recv, Some(left))?;
        match self.socket.read(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::ErrorKind::TimedOut.into())
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_server_that_accepts_no_connection_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        let server = net::socket(family, kind, None).unwrap();
        net::bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        net::listen(&server, 0).unwrap();
        let _first = connect(&path, Duration::from_secs(60)).unwrap();
        let error = connect(&path, Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_slow_writer_does_not_move_the_deadline() {
        let (socket, mut other) = UnixStream::pair().unwrap();
        other.write_all(&[1, 2]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut socket = Deadlined { socket, deadline };
        socket.read_exact(&mut [0]).unwrap();
        socket.deadline = Instant::now();
        let error = socket.read_exact(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        socket.deadline = Instant::now() + Duration::from_millis(10);
        let error = socket.read_exact(&mut [0; 2]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
