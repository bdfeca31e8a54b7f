// SPDX-License-Identifier: GPL-2.0-only

//! Messages with a file descriptor between the two processes of a disk.

use rustix::cmsg_space;
use rustix::net::recvmsg;
use rustix::net::sendmsg;
use rustix::net::socketpair;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use serde::de::DeserializeOwned;
use serde::Serialize;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

/// Longest message in bytes.
const MAX_MESSAGE: usize = 4096;

/// One end of a socket for messages.
pub(crate) struct Handover(OwnedFd);

impl Handover {
    /// Returns both ends of a new socket.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let kind = SocketType::SEQPACKET;
        let (own, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        Ok((Self(own), other))
    }

    /// Takes the other end of a socket.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a message.
    pub(crate) fn send(
        &self,
        message: &impl Serialize,
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_ref().map(std::slice::from_ref).unwrap_or_default();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL;
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, flags)?;
        Ok(())
    }

    /// Waits for a message. Returns [`None`] if the other end is closed.
    pub(crate) fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Option<OwnedFd>)>> {
        let mut bytes = [0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.0, &mut parts, &mut control, flags)?.bytes;
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match bytes.get(..received) {
            None | Some([]) => Ok(None),
            Some(text) => Ok(Some((serde_json::from_slice(text)?, fd))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_comes_with_a_message() {
        let (own, other) = Handover::pair().unwrap();
        let other = Handover::new(other);
        let file = File::open("/proc/self/comm").unwrap();
        own.send(&"file", Some(file.as_fd())).unwrap();
        own.send(&7, None).unwrap();
        let (text, fd): (String, _) = other.receive().unwrap().unwrap();
        assert_eq!(text, "file");
        let mut name = String::new();
        File::from(fd.unwrap()).read_to_string(&mut name).unwrap();
        assert!(!name.is_empty());
        let (number, fd) = other.receive::<u32>().unwrap().unwrap();
        assert!(number == 7 && fd.is_none());
        drop(own);
        assert!(other.receive::<u32>().unwrap().is_none());
    }
}
