// SPDX-License-Identifier: GPL-2.0-only

//! The socket for `rblkd`: one command and one answer for each connection, see [`api::disk`].

use crate::listen::listen;
use api::socket;
use api::DiskAnswer;
use api::DiskCommand;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Limit for a client to send its command, and to read the answer.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The socket. Only root may connect.
pub(crate) struct ControlSocket(UnixListener);

/// A client that waits for its answer.
pub(crate) struct Client {
    stream: UnixStream,
    command: Result<DiskCommand, String>,
}

impl ControlSocket {
    /// Creates the socket, in place of that of a predecessor.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        listen(path).map(Self)
    }

    /// Accepts a client, and reads its command. Returns `None` if there is none.
    pub(crate) fn accept(&self) -> Option<Client> {
        let (stream, _) = self.0.accept().ok()?;
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).ok()?;
        stream.set_write_timeout(Some(TIMEOUT)).ok()?;
        let command = socket::read_command(&stream)?;
        Some(Client { stream, command })
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Client {
    /// Carries the command out, and sends the answer.
    pub(crate) fn answer(self, carry_out: impl FnOnce(DiskCommand) -> Result<DiskAnswer, String>) {
        socket::answer_command(&self.stream, self.command.and_then(carry_out));
    }
}
