// SPDX-License-Identifier: GPL-2.0-only

//! Why a disk cannot be served. Written to xenstore and to the log for an administrator.

use blkif::negotiate::InvalidChoice;
use blkif::node::InvalidNode;
use blkif::ring::RingError;
use blkif::state::Failure;
use engine::Errno;
use std::fmt;
use std::io;

/// Why a disk cannot be served.
#[derive(Debug)]
pub enum Error {
    /// A node of the frontend.
    Node(InvalidNode),
    /// A node of the toolstack.
    Toolstack(InvalidNode),
    /// A node of one queue.
    Queue(u32, InvalidNode),
    /// A choice that was not offered.
    Choice(InvalidChoice),
    /// The indices in a ring make no sense.
    Ring(u32, RingError),
    /// A number that the frontend gave for a queue is refused by Xen: the node and the number.
    Refused(u32, &'static str, u32, io::Error),
    /// The frontend's state is none, or has no place in the protocol.
    State(InvalidNode),
    /// The image cannot be used.
    Image(engine::Error),
    /// Something of our own failed.
    Own(&'static str, io::Error),
}

impl Error {
    /// Returns what the error is to the connection. `connected`: a frontend has been connected to
    /// the device before.
    pub(crate) fn failure(&self, connected: bool) -> Failure {
        match self {
            Error::Node(_) | Error::Queue(..) | Error::Choice(_) => Failure::Frontend,
            Error::Ring(..) | Error::State(_) => Failure::Frontend,
            Error::Refused(_, _, _, error) | Error::Own(_, error) if is_shortage(error) => {
                Failure::Temporary
            }
            // The device model has the last queue until the guest has unplugged the emulated disk.
            Error::Image(error) if error.errno() == Errno::BUSY => Failure::Temporary,
            _ => Failure::Unusable { connected },
        }
    }
}

/// Returns `true` if what has failed so may succeed later by itself.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::OutOfMemory
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::StorageFull
            | io::ErrorKind::Interrupted
    )
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Node(bad) | Error::Toolstack(bad) => write!(f, "{bad}"),
            Error::Queue(index, bad) => write!(f, "queue {index}: {bad}"),
            Error::Choice(bad) => write!(f, "{bad}"),
            Error::Ring(index, error) => write!(f, "ring of queue {index}: {error}"),
            Error::Refused(index, node, number, error) => write!(
                f,
                "queue {index}: {node} = \"{number}\": refused by Xen ({error})"
            ),
            Error::State(bad) => write!(
                f,
                "state = \"{}\": not a state that a frontend may have now",
                bad.text()
            ),
            Error::Image(error) => write!(f, "{error}"),
            Error::Own(doing, error) => write!(f, "{doing}: {error}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Self {
        Error::Image(error)
    }
}

/// Says what was being done when an error happened.
pub(crate) trait During<T> {
    fn during(self, doing: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, doing: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Own(doing, error))
    }
}
