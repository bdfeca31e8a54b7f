// SPDX-License-Identifier: GPL-2.0-only

//! Errors of a connection, as they are written to xenstore and to the log.

use kernel::{
    fmt,
    prelude::*, //
};

use kernel_ext::block::bdev::{
    Access,
    DeviceNumber, //
};

use blkif::{
    negotiate::InvalidChoice,
    node::{
        InvalidNode,
        Reason, //
    },
    ring::RingError,
    state::Failure, //
};

/// The reason why a connection cannot be made, or has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum ConnectError {
    /// A node of the frontend is missing or not valid.
    Node(InvalidNode),
    /// A node of the toolstack or its hotplug script is missing or not valid.
    Toolstack(InvalidNode),
    /// A node of one queue is missing or not valid.
    Queue(u32, InvalidNode),
    /// The frontend has chosen a value that was not offered.
    Choice(InvalidChoice),
    /// The indices in a ring are not valid.
    Ring(u32, RingError),
    /// A page or event channel that the frontend has named cannot be mapped or bound: queue, node,
    /// first grant reference or port, error.
    Unreachable(u32, &'static str, u32, Error),
    /// The frontend's node `state` contains no state, or one that the protocol does not allow now.
    State(InvalidNode),
    /// The disk cannot be opened.
    Disk(DeviceNumber, Access, Error),
    /// The disk does not have the sequence number that the toolstack has written, so its device
    /// number now belongs to another disk: device number, expected sequence number, actual one.
    WrongSequence(DeviceNumber, u64, u64),
    /// An operation of this domain has failed.
    Local(&'static str, Error),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::Node(bad) | ConnectError::Toolstack(bad) => write!(f, "{bad}"),
            ConnectError::Queue(index, bad) => write!(f, "queue {index}: {bad}"),
            ConnectError::Choice(bad) => write!(f, "{bad}"),
            ConnectError::Ring(index, error) => write!(f, "ring of queue {index}: {error}"),
            ConnectError::Unreachable(index, node, number, _) => {
                write!(
                    f,
                    "queue {index}: {node} = \"{number}\": cannot be mapped or bound"
                )
            }
            ConnectError::State(bad) if bad.reason() == Reason::Missing => write!(f, "{bad}"),
            ConnectError::State(bad) => write!(
                f,
                "{} = \"{}\": not a state that a frontend may have now",
                bad.node(),
                bad.text()
            ),
            ConnectError::Disk(number, access, error) => {
                let (major, minor) = (number.major(), number.minor());
                let what = match access {
                    _ if *error == EBUSY => "in use here: mounted, or part of another device",
                    Access::ReadOnly => "cannot be opened for reading",
                    Access::ReadWrite => "cannot be opened for writing",
                };
                write!(f, "physical-device = \"{major:x}:{minor:x}\": {what}")
            }
            ConnectError::WrongSequence(number, expected, actual) => {
                let (major, minor) = (number.major(), number.minor());
                write!(
                    f,
                    "physical-device = \"{expected:x}@{major:x}:{minor:x}\": that device is now \
                     another disk, with the sequence number {actual:x}"
                )
            }
            ConnectError::Local(what, _) => f.write_str(what),
        }
    }
}

impl ConnectError {
    /// Returns the errno of the error.
    pub(crate) fn error(&self) -> Error {
        match self {
            ConnectError::Node(_) | ConnectError::Toolstack(_) | ConnectError::State(_) => EINVAL,
            ConnectError::Queue(..) | ConnectError::Choice(_) => EINVAL,
            ConnectError::Ring(..) => EIO,
            ConnectError::WrongSequence(..) => ENXIO,
            ConnectError::Disk(_, _, error)
            | ConnectError::Unreachable(_, _, _, error)
            | ConnectError::Local(_, error) => *error,
        }
    }

    /// Returns the kind of failure, which decides whether the connection is closed or retried.
    ///
    /// `connected` tells whether a frontend has been connected to the device before.
    pub(crate) fn failure(&self, connected: impl FnOnce() -> bool) -> Failure {
        match self {
            ConnectError::Node(_) | ConnectError::Queue(..) | ConnectError::Choice(_) => {
                Failure::Frontend
            }
            ConnectError::Ring(..) | ConnectError::State(_) => Failure::Frontend,
            error if is_transient(error.error()) => Failure::Temporary,
            _ => Failure::Unusable {
                connected: connected(),
            },
        }
    }
}

/// Returns `true` if an operation that has failed with this error may succeed later.
fn is_transient(error: Error) -> bool {
    [ENOMEM, EAGAIN, ENOSPC, EINTR].contains(&error)
}

/// Adds the name of the failed operation to an error.
pub(crate) trait ResultExt<T> {
    /// Converts an error to [`ConnectError::Local`].
    ///
    /// `what` is a participle such as "writing the state", as in `xenbus_dev_fatal()`.
    fn during(self, what: &'static str) -> Result<T, ConnectError>;
}

impl<T> ResultExt<T> for Result<T> {
    fn during(self, what: &'static str) -> Result<T, ConnectError> {
        self.map_err(|error| ConnectError::Local(what, error))
    }
}
