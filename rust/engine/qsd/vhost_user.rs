// SPDX-License-Identifier: GPL-2.0-only

//! The frontend of a vhost-user block device (QEMU's `docs/interop/vhost-user.rst`).
//!
//! A [`Session`] is a connection on which a device has been set up. Each message waits for its
//! reply, with a limit. The device accepts the next connection only when it has no requests of an
//! earlier one.

use super::virtqueue::{Addresses, Virtqueue, BASE, MAX_QUEUES};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::shared_memory::{self, SharedMemory};
use crate::socket::Deadlined;
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Limit for each step of a dialogue.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// Messages to the device (`VhostUserRequest`).
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;

/// The flags of a message: the version, and what it is.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Protocol features.
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
/// QEMU's device fails when its size changes if it has no socket for messages
/// (`vu_config_change_msg`).
const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
const PROTOCOL_CONFIG: u64 = 1 << 9;
const PROTOCOL_FEATURES: u64 =
    PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_BACKEND_REQ | PROTOCOL_CONFIG;

/// Features of the device.
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
const FEATURES: u64 =
    F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_VERSION_1;

/// The bytes of `struct virtio_blk_config` that are read, and before them in a message.
const CONFIG_BYTES: usize = 60;
const CONFIG_HEADER: usize = 12;

/// The greatest number of reads for messages of the device at a time.
const MAX_MESSAGES: usize = 64;

/// The greatest length of a reply.
const MAX_REPLY: usize = 512;

/// The properties of a device (`struct virtio_blk_config`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct DeviceConfig {
    /// The size in bytes.
    pub(super) size: u64,
    pub(super) queues: usize,
    pub(super) max_discard_sectors: u32,
    pub(super) max_write_zeroes_sectors: u32,
}

/// A socket for messages of the device: only that the size has changed, which is noticed otherwise.
pub(super) struct Messages {
    own: UnixStream,
    /// The end that the device gets.
    other: UnixStream,
}

impl Messages {
    pub(super) fn new() -> Result<Self> {
        let pair = UnixStream::pair().and_then(|(own, other)| {
            own.set_nonblocking(true)?;
            Ok(Self { own, other })
        });
        pair.map_err(|error| {
            Error::from_io(&error, "creating a socket", "raise the limit of open files")
        })
    }

    /// Takes messages, so that there is room for more.
    fn clear(&self) {
        for _ in 0..MAX_MESSAGES {
            if !matches!((&self.own).read(&mut [0; 256]), Ok(count) if count > 0) {
                return;
            }
        }
    }
}

/// A connection on which a device has been set up.
pub(super) struct Session {
    socket: Mutex<UnixStream>,
    /// The connection was lost.
    lost: AtomicBool,
}

impl Session {
    /// Sets up the device at the other end of a connection.
    pub(super) fn new(
        stream: OwnedFd,
        memory: &SharedMemory,
        messages: &Messages,
    ) -> Result<(Self, DeviceConfig)> {
        let socket = UnixStream::from(stream);
        Self::set_up(socket, memory, messages).map_err(|error| dialogue_error(&error))
    }

    fn set_up(
        socket: UnixStream,
        memory: &SharedMemory,
        messages: &Messages,
    ) -> io::Result<(Self, DeviceConfig)> {
        socket.set_write_timeout(Some(STEP_TIMEOUT))?;
        let session = Self {
            socket: Mutex::new(socket),
            lost: AtomicBool::new(false),
        };
        session.negotiate(messages.other.as_fd())?;
        let config = session.read_config()?;
        session.share(memory)?;
        Ok((session, config))
    }

    fn negotiate(&self, messages: BorrowedFd<'_>) -> io::Result<()> {
        let mut dialogue = self.dialogue();
        // Replies to all messages are a feature, which is not there yet.
        dialogue.send(SET_OWNER, VERSION, &[], &[])?;
        let features = dialogue.get(GET_FEATURES)?;
        if features & FEATURES != FEATURES {
            return Err(unsupported());
        }
        let protocol = dialogue.get(GET_PROTOCOL_FEATURES)?;
        if protocol & PROTOCOL_FEATURES != PROTOCOL_FEATURES {
            return Err(unsupported());
        }
        let bytes = PROTOCOL_FEATURES.to_ne_bytes();
        dialogue.send(SET_PROTOCOL_FEATURES, VERSION, &bytes, &[])?;
        dialogue.set(SET_FEATURES, &FEATURES.to_ne_bytes(), &[])?;
        dialogue.set(SET_BACKEND_REQ_FD, &[], &[messages])
    }

    /// Shows the memory to the device.
    fn share(&self, memory: &SharedMemory) -> io::Result<()> {
        let mut bytes = 1u64.to_ne_bytes().to_vec();
        // The address for descriptors, the length, the address for virtqueues, the offset.
        for value in [BASE, shared_memory::SIZE as u64, BASE, 0] {
            bytes.extend(value.to_ne_bytes());
        }
        self.dialogue()
            .set(SET_MEM_TABLE, &bytes, &[memory.as_fd()])
    }

    fn read_config(&self) -> io::Result<DeviceConfig> {
        let mut bytes = Vec::new();
        for value in [0, CONFIG_BYTES as u32, 0] {
            bytes.extend(value.to_ne_bytes());
        }
        bytes.resize(CONFIG_HEADER.saturating_add(CONFIG_BYTES), 0);
        let mut dialogue = self.dialogue();
        dialogue.send(GET_CONFIG, VERSION, &bytes, &[])?;
        let reply = dialogue.receive(GET_CONFIG)?;
        let config = reply.get(CONFIG_HEADER..).unwrap_or_default();
        DeviceConfig::parse(config).ok_or_else(unsupported)
    }

    /// Reads the properties of the device.
    pub(super) fn config(&self, messages: &Messages) -> Result<DeviceConfig> {
        messages.clear();
        self.read_config().map_err(|error| {
            self.close();
            dialogue_error(&error)
        })
    }

    /// Starts a virtqueue: `kick` notifies the device, and the device sets `call`.
    pub(super) fn start(
        &self,
        number: usize,
        queue: &Virtqueue,
        kick: &Event,
        call: &Event,
    ) -> Result<()> {
        self.start_queue(number as u32, queue, kick, call)
            .map_err(|error| {
                self.close();
                dialogue_error(&error)
            })
    }

    fn start_queue(
        &self,
        number: u32,
        queue: &Virtqueue,
        kick: &Event,
        call: &Event,
    ) -> io::Result<()> {
        let mut dialogue = self.dialogue();
        dialogue.set(SET_VRING_NUM, &pair(number, queue.size().into()), &[])?;
        dialogue.set(SET_VRING_BASE, &pair(number, 0), &[])?;
        let Addresses {
            descriptors,
            available,
            used,
        } = queue.addresses();
        let mut bytes = pair(number, 0).to_vec();
        for address in [descriptors, used, available, 0] {
            bytes.extend(address.to_ne_bytes());
        }
        dialogue.set(SET_VRING_ADDR, &bytes, &[])?;
        let bytes = u64::from(number).to_ne_bytes();
        dialogue.set(SET_VRING_CALL, &bytes, &[call.as_fd()])?;
        dialogue.set(SET_VRING_ENABLE, &pair(number, 1), &[])?;
        dialogue.set(SET_VRING_KICK, &bytes, &[kick.as_fd()])
    }

    /// Stops a virtqueue that has no requests in flight.
    pub(super) fn stop(&self, number: usize) {
        let mut dialogue = self.dialogue();
        let stopped = dialogue
            .send(GET_VRING_BASE, VERSION, &pair(number as u32, 0), &[])
            .and_then(|()| dialogue.receive(GET_VRING_BASE));
        drop(dialogue);
        if stopped.is_err() {
            self.close();
        }
    }

    fn dialogue(&self) -> Dialogue<'_> {
        // A dialogue that was not completed makes the next one fail.
        Dialogue(self.socket.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns `true` if the connection was lost.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        self.lost.store(true, Ordering::Release);
        // It may have ended already.
        let _ = self.dialogue().0.shutdown(Shutdown::Both);
    }

    /// Returns a descriptor for a thread that waits for the end of the connection.
    pub(super) fn socket(&self) -> Result<OwnedFd> {
        let socket = self.dialogue().0.try_clone();
        Ok(socket.map_err(|error| dialogue_error(&error))?.into())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

/// Returns the bytes of `struct vhost_vring_state`.
fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    low.copy_from_slice(&first.to_ne_bytes());
    high.copy_from_slice(&second.to_ne_bytes());
    bytes
}

/// An exclusive use of the connection.
struct Dialogue<'a>(MutexGuard<'a, UnixStream>);

impl Dialogue<'_> {
    /// Sends a message.
    fn send(
        &mut self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        for value in [request, flags, payload.len() as u32] {
            bytes.extend(value.to_ne_bytes());
        }
        bytes.extend(payload);
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let parts = [IoSlice::new(&bytes)];
        let sent = sendmsg(&*self.0, &parts, &mut control, SendFlags::NOSIGNAL)?;
        if sent != bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Receives the reply to a message.
    fn receive(&mut self, request: u32) -> io::Result<Vec<u8>> {
        let mut socket = Deadlined {
            socket: &*self.0,
            deadline: Instant::now() + STEP_TIMEOUT,
        };
        let mut header = [0; 12];
        socket.read_exact(&mut header)?;
        let (found, rest) = take_u32(&header).ok_or_else(unsupported)?;
        let (flags, rest) = take_u32(rest).ok_or_else(unsupported)?;
        let (len, _) = take_u32(rest).ok_or_else(unsupported)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if found != request || flags & REPLY == 0 || len > MAX_REPLY {
            return Err(unsupported());
        }
        let mut payload = vec![0; len];
        socket.read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Asks for a number.
    fn get(&mut self, request: u32) -> io::Result<u64> {
        self.send(request, VERSION, &[], &[])?;
        let reply = self.receive(request)?;
        let number = reply.first_chunk().ok_or_else(unsupported)?;
        Ok(u64::from_ne_bytes(*number))
    }

    /// Sends a message, and waits until the device has carried it out.
    fn set(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(request, VERSION | NEED_REPLY, payload, fds)?;
        let reply = self.receive(request)?;
        match reply.first_chunk() {
            Some(bytes) if u64::from_ne_bytes(*bytes) == 0 => Ok(()),
            _ => Err(unsupported()),
        }
    }
}

fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (value, rest) = bytes.split_first_chunk()?;
    Some((u32::from_ne_bytes(*value), rest))
}

fn unsupported() -> io::Error {
    io::Error::other("a message of the device is not as expected")
}

fn dialogue_error(error: &io::Error) -> Error {
    let errno = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Errno::TIMEDOUT,
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => Errno::CONNRESET,
        _ => Errno::from_io_error(error).unwrap_or(Errno::PROTO),
    };
    Error::new(
        errno,
        format!("talking to qemu-storage-daemon: {error}"),
        "use qemu-storage-daemon 7.1 or later, and check the load of the host",
    )
}

impl DeviceConfig {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| {
            let bytes = bytes.get(at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let sectors = u64::from_le_bytes(*bytes.first_chunk()?);
        let queues = u16::from_le_bytes(*bytes.get(34..)?.first_chunk()?);
        Some(Self {
            size: sectors.checked_mul(512)?,
            queues: usize::from(queues).clamp(1, MAX_QUEUES),
            max_discard_sectors: u32_at(36)?.max(1),
            max_write_zeroes_sectors: u32_at(48)?.max(1),
        })
    }
}

/// Answers the messages to a device, for tests, until the connection ends.
#[cfg(test)]
pub(super) fn answer(mut device: UnixStream) {
    use std::io::Write;
    let mut header = [0; 12];
    while device.read_exact(&mut header).is_ok() {
        let (request, rest) = take_u32(&header).unwrap();
        let (flags, rest) = take_u32(rest).unwrap();
        let (len, _) = take_u32(rest).unwrap();
        let mut payload = vec![0; len as usize];
        device.read_exact(&mut payload).unwrap();
        let reply = match request {
            GET_FEATURES => FEATURES.to_ne_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => PROTOCOL_FEATURES.to_ne_bytes().to_vec(),
            GET_CONFIG => {
                // The size in sectors, and the number of queues.
                payload[CONFIG_HEADER..][..8].copy_from_slice(&8192u64.to_le_bytes());
                payload[CONFIG_HEADER + 34] = MAX_QUEUES as u8;
                payload
            }
            GET_VRING_BASE => payload,
            _ if flags & NEED_REPLY != 0 => vec![0; 8],
            _ => continue,
        };
        let mut bytes = Vec::new();
        for value in [request, VERSION | REPLY, reply.len() as u32] {
            bytes.extend(value.to_ne_bytes());
        }
        bytes.extend(reply);
        if device.write_all(&bytes).is_err() {
            return;
        }
    }
}
