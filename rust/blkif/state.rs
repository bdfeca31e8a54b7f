// SPDX-License-Identifier: GPL-2.0-only

//! The connection as a state machine, for each side.
//!
//! Both sides of a device write their state to a xenstore node and watch that of the other side.
//! [`FrontState`] and [`BackState`] are the states of a side; `step` returns the action for an
//! event. A driver executes the action, writes the state after the action to its node, enters that
//! state, and calls `step` again with the current state of the other side, until no action changes
//! the state:
//!
//! ```
//! # use blkif::state::{BackState, BackAction, BackEvent, XenbusState};
//! # fn frontend() -> BackEvent {
//! #     BackEvent::Frontend { state: XenbusState::Initialised, online: true, ready: true }
//! # }
//! # fn execute(_: BackAction) {}
//! # let mut own = BackState::Waiting;
//! # let mut event = frontend();
//! loop {
//!     let action = own.step(event);
//!     execute(action);
//!     let Some(next) = action.next_state() else { break };
//!     own = next;
//!     event = frontend();
//! }
//! # assert_eq!(own, BackState::Connected);
//! ```
//!
//! A frontend may stop after one step: it gets an event for each change of the backend. A backend
//! calls `step` again after each change of its own state, because no event reports that the
//! toolstack has cleared `online`.
//!
//! # Writers of a state
//!
//! A side writes its own node. The toolstack writes the backend's node too: it writes Closing, and
//! waits for Closed. A backend writes a state in a transaction, and replaces only the state that it
//! has written before. When it finds Closing instead, it writes nothing but Closed until the
//! frontend has closed and is Initialising again, see [`BackEvent::ToolstackClosing`]. If it wrote
//! InitWait or Connected earlier, a frontend that has closed would take it for a backend that has
//! restarted: `xen-blkfront` would offer its rings again while it still has the old ones, and
//! crash.
//!
//! # From attach to detach
//!
//! | frontend | backend | |
//! |---|---|---|
//! | Initialising | Initialising | the toolstack has created both |
//! | | InitWait | the backend has written its features |
//! | Initialised | | the frontend has chosen and offers its rings |
//! | | Connected | the backend serves the rings and has described the disk |
//! | Connected | | the disk is in use |
//! | | Closing | the toolstack detaches the disk and has cleared `online` |
//! | Closed | | the frontend has removed the disk and no longer uses the rings |
//! | | Closed | the backend has closed too; the toolstack removes the nodes |
//!
//! # Outage
//!
//! An *outage* is the time during which a disk in use has no connected backend, although the
//! toolstack does not detach it. The node `online` of the backend distinguishes the two cases. As
//! long as it is 1, a backend that closes or disappears is expected to reconnect: the frontend
//! keeps the disk and the requests in flight, and connects again. A backend that reconnects while
//! the frontend is still Connected continues with the same rings. The frontend waits for no longer
//! than a deadline, which starts when [`FrontState::is_connected`] becomes false, and is cancelled
//! when it is true again.
//!
//! A side reads only the current state of the other side, so it may see several changes as one. The
//! steps are chosen so that no order of changes leaves both sides waiting for each other, even if
//! one of them is the C driver. `rust/blkif/tests/states.rs` tries all orders.

use xen_io::node;

pub use xen_io::xenbus::XenbusState;

/// The state of a frontend's connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum FrontState {
    /// Nothing is shared; ready to connect as soon as the backend is in InitWait. This is the first
    /// state of a probed device, after it has written Initialising. There may be a disk of an
    /// earlier connection.
    Waiting,
    /// Rings are shared and their nodes written; the backend does not serve them yet.
    Offered,
    /// The disk is in use. During an outage, the rings stay as they are for the next backend.
    Connected,
    /// An earlier connection has ended, and the backend must be Closed before a new one can begin.
    /// The disk and its requests are kept. The backend sees a frontend that has closed.
    Reset,
    /// The disk was removed, and no request is in flight. Only the toolstack can create a new
    /// device.
    Removed,
}

/// An event for a frontend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FrontEvent {
    /// The backend's state may have changed.
    Backend {
        /// Current state of the backend.
        state: XenbusState,
        /// `false` if its node `online` is 0: the toolstack detaches the disk. A backend without
        /// this node is online.
        online: bool,
        /// `true` if there is a disk of an earlier connection.
        disk: bool,
    },
    /// The backend's node `state` does not contain a state.
    BadState,
    /// An action has failed permanently: invalid nodes, a broken ring.
    Failed,
    /// This connection cannot continue, for lack of memory or grants, or because the backend does
    /// not respond to requests. Another one may succeed.
    ConnectionFailed,
    /// [`FrontState::is_connected`] has been false for too long.
    Deadline {
        /// `true` if there is a disk, whose users may be waiting.
        disk: bool,
    },
    /// The domain runs again after it was saved: nothing is shared with other domains.
    Resume,
}

/// An action that a frontend must take.
///
/// The xenbus state at the end of a description is the one that is written after the action.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FrontAction {
    /// Nothing.
    Wait,
    /// Log the reason for the wait, and keep waiting.
    Report,
    /// Choose features, share rings, write their nodes; Initialised.
    Offer,
    /// Read the properties of the disk; create it, or resubmit the requests that were kept;
    /// Connected.
    Connect,
    /// Read the size of the disk again: it may have changed.
    Refresh,
    /// Stop sharing, keep the requests; Closed.
    Reset,
    /// Stop sharing, keep the requests; Initialising.
    Restart,
    /// Remove the disk: write it back first if the backend still serves it, otherwise end all
    /// requests with an error. Stop sharing; Closed.
    Remove,
}

impl FrontAction {
    /// Returns the state after the action, if it leads to another one.
    pub const fn next_state(self) -> Option<FrontState> {
        match self {
            FrontAction::Wait | FrontAction::Report | FrontAction::Refresh => None,
            FrontAction::Offer => Some(FrontState::Offered),
            FrontAction::Connect => Some(FrontState::Connected),
            FrontAction::Reset => Some(FrontState::Reset),
            FrontAction::Restart => Some(FrontState::Waiting),
            FrontAction::Remove => Some(FrontState::Removed),
        }
    }
}

impl FrontState {
    /// Returns the value of the frontend's node `state`.
    pub const fn xenbus(self) -> XenbusState {
        match self {
            FrontState::Waiting => XenbusState::Initialising,
            FrontState::Offered => XenbusState::Initialised,
            FrontState::Connected => XenbusState::Connected,
            FrontState::Reset | FrontState::Removed => XenbusState::Closed,
        }
    }

    /// Returns `true` if both sides are Connected.
    ///
    /// The deadline runs while this is `false`.
    pub const fn is_connected(self, backend: XenbusState) -> bool {
        matches!(
            (self, backend),
            (FrontState::Connected, XenbusState::Connected)
        )
    }

    /// Returns the action for an event.
    pub const fn step(self, event: FrontEvent) -> FrontAction {
        match event {
            FrontEvent::Backend { online: false, .. } => self.give_up(),
            FrontEvent::Backend {
                state,
                online: true,
                disk,
            } => match self {
                FrontState::Waiting => Self::waiting(state),
                FrontState::Offered => Self::offered(state, disk),
                FrontState::Connected => Self::connected(state),
                FrontState::Reset => Self::reset(state),
                FrontState::Removed => FrontAction::Wait,
            },
            FrontEvent::BadState | FrontEvent::Failed => self.give_up(),
            FrontEvent::Deadline { disk: true } => self.give_up(),
            FrontEvent::Deadline { disk: false } => FrontAction::Report,
            FrontEvent::ConnectionFailed => self.disconnect(),
            FrontEvent::Resume => self.resume(),
        }
    }

    /// Returns the action while there is no connection.
    ///
    /// A backend that is Connected or Closing is still connected to an earlier driver of this
    /// domain, for instance one that has crashed: it must close first. A backend that is Closed
    /// sees that the frontend is Initialising and will return to InitWait.
    const fn waiting(backend: XenbusState) -> FrontAction {
        match backend {
            XenbusState::InitWait => FrontAction::Offer,
            XenbusState::Connected | XenbusState::Closing => FrontAction::Reset,
            XenbusState::Unknown | XenbusState::Initialising => FrontAction::Wait,
            XenbusState::Initialised | XenbusState::Closed => FrontAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => FrontAction::Wait,
        }
    }

    /// Returns the action after an offer.
    ///
    /// A backend that responds to the first offer with Closing has refused it. A backend that
    /// refuses a disk that was connected before may accept it later: the disk is in use, and the
    /// deadline ends the attempts.
    const fn offered(backend: XenbusState, disk: bool) -> FrontAction {
        match backend {
            XenbusState::Connected => FrontAction::Connect,
            XenbusState::Closing if disk => FrontAction::Reset,
            XenbusState::Closing => FrontAction::Remove,
            XenbusState::Closed => FrontAction::Restart,
            XenbusState::Unknown | XenbusState::Initialising => FrontAction::Wait,
            XenbusState::InitWait | XenbusState::Initialised => FrontAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => FrontAction::Wait,
        }
    }

    /// Returns the action while connected.
    ///
    /// A backend in a state before Connected was replaced, and will serve the same rings.
    const fn connected(backend: XenbusState) -> FrontAction {
        match backend {
            XenbusState::Connected => FrontAction::Refresh,
            XenbusState::Closing => FrontAction::Reset,
            XenbusState::Closed => FrontAction::Restart,
            XenbusState::Unknown | XenbusState::Initialising => FrontAction::Wait,
            XenbusState::InitWait | XenbusState::Initialised => FrontAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => FrontAction::Wait,
        }
    }

    /// Returns the action after Closed was written.
    ///
    /// Every backend becomes Closed then, even one that was just started and is in InitWait. Acting
    /// on an earlier state would race with that.
    const fn reset(backend: XenbusState) -> FrontAction {
        match backend {
            XenbusState::Closed => FrontAction::Restart,
            XenbusState::Unknown | XenbusState::Initialising => FrontAction::Wait,
            XenbusState::InitWait | XenbusState::Initialised => FrontAction::Wait,
            XenbusState::Connected | XenbusState::Closing => FrontAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => FrontAction::Wait,
        }
    }

    /// Returns the action that ends the device.
    const fn give_up(self) -> FrontAction {
        match self {
            FrontState::Waiting
            | FrontState::Offered
            | FrontState::Connected
            | FrontState::Reset => FrontAction::Remove,
            FrontState::Removed => FrontAction::Wait,
        }
    }

    /// Returns the action that asks the backend to close.
    ///
    /// A frontend that could not make an offer has shared nothing, so the backend need not close:
    /// the driver makes the offer again later.
    const fn disconnect(self) -> FrontAction {
        match self {
            FrontState::Offered | FrontState::Connected => FrontAction::Reset,
            FrontState::Waiting | FrontState::Reset | FrontState::Removed => FrontAction::Wait,
        }
    }

    /// Returns the action after the domain was restored or has migrated.
    const fn resume(self) -> FrontAction {
        match self {
            FrontState::Waiting
            | FrontState::Offered
            | FrontState::Connected
            | FrontState::Reset => FrontAction::Restart,
            FrontState::Removed => FrontAction::Wait,
        }
    }
}

/// The state of a backend's connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum BackState {
    /// A driver was bound and has written nothing yet. The frontend may be in any state, even
    /// Connected: the driver continues with the rings of the previous driver.
    Starting,
    /// As `Starting`, but the previous driver has left Closing or Closed, and a frontend that has
    /// not closed yet is about to.
    StartingClosed,
    /// The features were written.
    Waiting,
    /// The rings are served.
    Connected,
    /// The frontend is closing, or has to close: the toolstack detaches the device, or there was an
    /// error. Mapped rings are still served.
    Closing,
    /// All requests taken from the rings have responses, and the rings are unmapped. The node still
    /// has the previous state; the next step, which follows at once, decides on another.
    Disconnected,
    /// The frontend has closed. It may connect again.
    Closed,
    /// The device is being removed.
    Removed,
}

/// An event for a backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackEvent {
    /// The frontend's state may have changed, or the physical device may have appeared.
    Frontend {
        /// Current state of the frontend.
        state: XenbusState,
        /// `true` if the toolstack wants the device to exist, see [`is_online`].
        online: bool,
        /// `true` if the physical device is open.
        ready: bool,
    },
    /// The frontend's node `state` does not contain a state.
    BadState,
    /// Closing was found in the backend's own node, where the toolstack has written it.
    ToolstackClosing,
    /// An action has failed.
    Failed(Failure),
}

/// The reason why an action of a backend has failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Failure {
    /// The frontend has written invalid nodes or violated the ring protocol.
    Frontend,
    /// The disk or a resource that the frontend has named cannot be used: it does not exist, has
    /// another exclusive user, or Xen refuses it.
    Unusable {
        /// `true` if a frontend has been connected to this device before, so that a disk is in use.
        connected: bool,
    },
    /// This domain lacks a resource that it may have later, such as memory, or an operation was
    /// interrupted.
    Temporary,
}

/// Returns `true` if the toolstack wants a backend's device to stay when a frontend in this state
/// closes it.
///
/// `node` is the node `online` of the backend; without it, the device stays as long as the frontend
/// uses it. An invalid value counts as 0, as in `xenbus_dev_is_online()`.
pub fn is_online(node: Option<&[u8]>, frontend: XenbusState) -> bool {
    match node {
        Some(text) => node::boolean("online", text).unwrap_or(false),
        None => !matches!(frontend, XenbusState::Closed | XenbusState::Unknown),
    }
}

/// An action that a backend must take.
///
/// The xenbus state at the end of a description is the one that is written after the action.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackAction {
    /// Nothing.
    Wait,
    /// Open the physical device, because a frontend waits for it, and take another step if it is
    /// open now. If it is not there yet, the backend waits for it; if it cannot be used, that is a
    /// failure.
    Open,
    /// Map the rings, continue at their present indices, describe the disk, start to serve;
    /// Connected.
    Connect,
    /// Report the failure, and retry after a delay, or at the next event. The frontend keeps
    /// waiting, and a disk in use stays in use.
    Retry,
    /// Announce that the connection ends, because the frontend closes or the toolstack detaches the
    /// device; Closing.
    Close,
    /// Write the error to xenstore; Closing.
    Fail,
    /// Take no more requests from the rings, respond to those that were taken, unmap the rings
    /// (`xen_blkif_disconnect()`). No state is written: the next step, which follows at once,
    /// decides on one.
    Disconnect,
    /// Write the features; InitWait.
    Restart,
    /// Only write the state; Closed.
    Finish,
    /// Remove the device.
    Remove,
}

impl BackAction {
    /// Returns the state after the action, if it leads to another one.
    pub const fn next_state(self) -> Option<BackState> {
        match self {
            BackAction::Wait | BackAction::Open | BackAction::Retry => None,
            BackAction::Connect => Some(BackState::Connected),
            BackAction::Close | BackAction::Fail => Some(BackState::Closing),
            BackAction::Disconnect => Some(BackState::Disconnected),
            BackAction::Restart => Some(BackState::Waiting),
            BackAction::Finish => Some(BackState::Closed),
            BackAction::Remove => Some(BackState::Removed),
        }
    }
}

impl BackState {
    /// Returns the value of the backend's node `state`, or `None` if the node keeps its value.
    pub const fn xenbus(self) -> Option<XenbusState> {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Disconnected => None,
            BackState::Waiting => Some(XenbusState::InitWait),
            BackState::Connected => Some(XenbusState::Connected),
            BackState::Closing => Some(XenbusState::Closing),
            BackState::Closed | BackState::Removed => Some(XenbusState::Closed),
        }
    }

    /// Returns the action for an event.
    pub const fn step(self, event: BackEvent) -> BackAction {
        match event {
            BackEvent::Frontend {
                state,
                online: false,
                ..
            } => self.unwanted(state),
            BackEvent::Frontend {
                state,
                online: true,
                ready,
            } => match self {
                BackState::Starting => Self::starting(state),
                BackState::StartingClosed => Self::starting_closed(state),
                BackState::Waiting => Self::waiting(state, ready),
                BackState::Connected => Self::connected(state),
                BackState::Closing => Self::closing(state),
                BackState::Disconnected => Self::disconnected(state),
                BackState::Closed => Self::closed(state),
                BackState::Removed => BackAction::Wait,
            },
            BackEvent::ToolstackClosing => self.close(),
            BackEvent::BadState | BackEvent::Failed(Failure::Frontend) => self.fail(),
            BackEvent::Failed(Failure::Unusable { connected: false }) => self.unusable(),
            BackEvent::Failed(Failure::Unusable { connected: true } | Failure::Temporary) => {
                self.retry()
            }
        }
    }

    /// Returns the first action of a driver.
    ///
    /// A frontend that is Initialised or Connected keeps its rings: InitWait is written first, and
    /// the next step maps them.
    const fn starting(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Initialising => BackAction::Restart,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Restart,
            XenbusState::Closing => BackAction::Close,
            XenbusState::Closed | XenbusState::Unknown => BackAction::Disconnect,
            XenbusState::InitWait => BackAction::Fail,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Fail,
        }
    }

    /// Returns the action of a driver that was bound to a device that was closing.
    ///
    /// A frontend that is Initialised or Connected has not seen the state of the previous driver
    /// yet. Writing InitWait now would race with it.
    const fn starting_closed(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Initialising => BackAction::Restart,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Wait,
            XenbusState::Closing => BackAction::Wait,
            XenbusState::Closed | XenbusState::Unknown => BackAction::Disconnect,
            XenbusState::InitWait => BackAction::Fail,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Fail,
        }
    }

    /// Returns the action while waiting for a frontend.
    ///
    /// Opening the device may have failed before this frontend began to wait, and that failure was
    /// dropped when an earlier frontend closed. The device must be opened again, so that the
    /// failure is reported again; otherwise the frontend would wait forever.
    const fn waiting(frontend: XenbusState, ready: bool) -> BackAction {
        match (frontend, ready) {
            (XenbusState::Initialised | XenbusState::Connected, true) => BackAction::Connect,
            (XenbusState::Initialised | XenbusState::Connected, false) => BackAction::Open,
            (XenbusState::Initialising, _) => BackAction::Wait,
            (XenbusState::Closing, _) => BackAction::Close,
            (XenbusState::Closed | XenbusState::Unknown, _) => BackAction::Disconnect,
            (XenbusState::InitWait, _) => BackAction::Fail,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => BackAction::Fail,
        }
    }

    /// Returns the action while connected.
    ///
    /// A frontend that is Initialising has restarted without closing: it has crashed.
    const fn connected(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Initialised | XenbusState::Connected => BackAction::Wait,
            XenbusState::Closing => BackAction::Close,
            XenbusState::Closed | XenbusState::Unknown => BackAction::Disconnect,
            XenbusState::Initialising => BackAction::Disconnect,
            XenbusState::InitWait => BackAction::Fail,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Fail,
        }
    }

    /// Returns the action while closing.
    ///
    /// Every frontend responds to Closing with Closed, or the toolstack removes it. Returning to
    /// InitWait before that would race with it.
    const fn closing(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Closed | XenbusState::Unknown => BackAction::Disconnect,
            XenbusState::Initialising | XenbusState::InitWait => BackAction::Wait,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Wait,
            XenbusState::Closing => BackAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Wait,
        }
    }

    /// Returns the action once the rings are unmapped.
    const fn disconnected(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Unknown => BackAction::Remove,
            XenbusState::Closed => BackAction::Finish,
            XenbusState::Closing => BackAction::Close,
            XenbusState::Initialising => BackAction::Restart,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Restart,
            XenbusState::InitWait => BackAction::Fail,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Fail,
        }
    }

    /// Returns the action after Closed.
    ///
    /// Some frontends (boot loaders) offer rings without waiting for InitWait.
    const fn closed(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Unknown => BackAction::Remove,
            XenbusState::Initialising => BackAction::Restart,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Restart,
            XenbusState::Closing | XenbusState::Closed => BackAction::Wait,
            XenbusState::InitWait => BackAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Wait,
        }
    }

    /// Returns the action when the toolstack detaches the device.
    ///
    /// The toolstack has written Closing to the backend's node, but an earlier driver, such as
    /// `xen-blkback`, may have overwritten it.
    const fn unwanted(self, frontend: XenbusState) -> BackAction {
        let closed = matches!(frontend, XenbusState::Closed | XenbusState::Unknown);
        match self {
            BackState::Disconnected | BackState::Closed => BackAction::Remove,
            BackState::Removed => BackAction::Wait,
            _ if closed => BackAction::Disconnect,
            BackState::Starting | BackState::Waiting | BackState::Connected => BackAction::Close,
            BackState::StartingClosed | BackState::Closing => BackAction::Wait,
        }
    }

    /// Returns the action when the toolstack has written Closing.
    const fn close(self) -> BackAction {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Waiting => {
                BackAction::Close
            }
            BackState::Connected | BackState::Disconnected | BackState::Closed => BackAction::Close,
            BackState::Closing | BackState::Removed => BackAction::Wait,
        }
    }

    /// Returns the action after a failure that may be temporary.
    ///
    /// Closing would remove a disk that may have the root file system, because of a problem that
    /// may be temporary.
    const fn retry(self) -> BackAction {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Waiting => {
                BackAction::Retry
            }
            BackState::Connected | BackState::Disconnected | BackState::Closed => BackAction::Retry,
            BackState::Closing | BackState::Removed => BackAction::Wait,
        }
    }

    /// Returns the action after a failure of this side that is not temporary, while no disk is in
    /// use.
    ///
    /// A backend that is Closed has failed to write its features for a frontend that waits for
    /// InitWait: it tries again.
    const fn unusable(self) -> BackAction {
        match self {
            BackState::Closed => BackAction::Retry,
            _ => self.fail(),
        }
    }

    /// Returns the action after a failure that ends the connection.
    const fn fail(self) -> BackAction {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Waiting => {
                BackAction::Fail
            }
            BackState::Connected | BackState::Disconnected => BackAction::Fail,
            BackState::Closing | BackState::Closed | BackState::Removed => BackAction::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [XenbusState; 9] = [
        XenbusState::Unknown,
        XenbusState::Initialising,
        XenbusState::InitWait,
        XenbusState::Initialised,
        XenbusState::Connected,
        XenbusState::Closing,
        XenbusState::Closed,
        XenbusState::Reconfiguring,
        XenbusState::Reconfigured,
    ];
    const FRONTS: [FrontState; 5] = [
        FrontState::Waiting,
        FrontState::Offered,
        FrontState::Connected,
        FrontState::Reset,
        FrontState::Removed,
    ];
    const BACKS: [BackState; 8] = [
        BackState::Starting,
        BackState::StartingClosed,
        BackState::Waiting,
        BackState::Connected,
        BackState::Closing,
        BackState::Disconnected,
        BackState::Closed,
        BackState::Removed,
    ];

    fn front(own: FrontState, state: XenbusState) -> FrontAction {
        own.step(FrontEvent::Backend {
            state,
            online: true,
            disk: true,
        })
    }

    fn back(own: BackState, state: XenbusState, online: bool) -> BackAction {
        own.step(BackEvent::Frontend {
            state,
            online,
            ready: true,
        })
    }

    #[test]
    fn attach_and_detach() {
        assert_eq!(
            front(FrontState::Waiting, XenbusState::Initialising),
            FrontAction::Wait
        );
        assert_eq!(
            front(FrontState::Waiting, XenbusState::InitWait),
            FrontAction::Offer
        );
        assert_eq!(
            back(BackState::Waiting, XenbusState::Initialised, true),
            BackAction::Connect
        );
        assert_eq!(
            front(FrontState::Offered, XenbusState::Connected),
            FrontAction::Connect
        );
        assert_eq!(
            back(BackState::Connected, XenbusState::Connected, true),
            BackAction::Wait
        );
        assert_eq!(
            front(FrontState::Connected, XenbusState::Connected),
            FrontAction::Refresh
        );
        let asked = FrontEvent::Backend {
            state: XenbusState::Closing,
            online: false,
            disk: true,
        };
        assert_eq!(FrontState::Connected.step(asked), FrontAction::Remove);
        assert_eq!(
            back(BackState::Connected, XenbusState::Closed, false),
            BackAction::Disconnect
        );
        assert_eq!(
            back(BackState::Disconnected, XenbusState::Closed, false),
            BackAction::Remove
        );
    }

    #[test]
    fn one_step_of_a_frontend_is_all_that_a_state_asks_for() {
        for own in FRONTS {
            for state in STATES {
                for (online, disk) in [(false, false), (false, true), (true, false), (true, true)] {
                    let event = FrontEvent::Backend {
                        state,
                        online,
                        disk,
                    };
                    if let Some(next) = own.step(event).next_state() {
                        assert_eq!(next.step(event).next_state(), None);
                    }
                }
            }
        }
    }

    #[test]
    fn a_disk_in_use_outlives_an_outage() {
        for state in STATES {
            assert_ne!(front(FrontState::Connected, state), FrontAction::Remove);
        }
        let online = FrontEvent::Backend {
            state: XenbusState::Connected,
            online: false,
            disk: true,
        };
        assert_eq!(FrontState::Connected.step(online), FrontAction::Remove);
    }

    #[test]
    fn a_refusal_ends_a_first_offer_only() {
        for (disk, action) in [(false, FrontAction::Remove), (true, FrontAction::Reset)] {
            let refused = FrontEvent::Backend {
                state: XenbusState::Closing,
                online: true,
                disk,
            };
            assert_eq!(FrontState::Offered.step(refused), action);
        }
    }

    #[test]
    fn an_unusable_connection_is_closed() {
        for own in FRONTS {
            let expected = match own {
                FrontState::Offered | FrontState::Connected => FrontAction::Reset,
                FrontState::Waiting | FrontState::Reset | FrontState::Removed => FrontAction::Wait,
            };
            assert_eq!(own.step(FrontEvent::ConnectionFailed), expected);
        }
    }

    #[test]
    fn connected_if_both_sides_are() {
        for own in FRONTS {
            for state in STATES {
                let both = own == FrontState::Connected && state == XenbusState::Connected;
                assert_eq!(own.is_connected(state), both);
            }
        }
    }

    #[test]
    fn deadlines_end_the_wait_for_those_who_wait() {
        for own in FRONTS {
            let removed = own == FrontState::Removed;
            let expected = if removed {
                FrontAction::Wait
            } else {
                FrontAction::Remove
            };
            assert_eq!(own.step(FrontEvent::Deadline { disk: true }), expected);
            assert_eq!(own.step(FrontEvent::BadState), expected);
            assert_eq!(own.step(FrontEvent::Failed), expected);
            assert_eq!(
                own.step(FrontEvent::Deadline { disk: false }),
                FrontAction::Report
            );
            let expected = if removed {
                FrontAction::Wait
            } else {
                FrontAction::Restart
            };
            assert_eq!(own.step(FrontEvent::Resume), expected);
        }
    }

    #[test]
    fn a_backend_looks_for_its_device_when_a_frontend_waits() {
        for state in [XenbusState::Initialised, XenbusState::Connected] {
            let event = BackEvent::Frontend {
                state,
                online: true,
                ready: false,
            };
            assert_eq!(BackState::Waiting.step(event), BackAction::Open);
        }
    }

    #[test]
    fn a_backend_fails_once() {
        for own in BACKS {
            let open = !matches!(
                own,
                BackState::Closing | BackState::Closed | BackState::Removed
            );
            let expected = if open {
                BackAction::Fail
            } else {
                BackAction::Wait
            };
            let unusable = BackEvent::Failed(Failure::Unusable { connected: false });
            if own == BackState::Closed {
                assert_eq!(own.step(unusable), BackAction::Retry);
            } else {
                assert_eq!(own.step(unusable), expected);
            }
            assert_eq!(own.step(BackEvent::Failed(Failure::Frontend)), expected);
            assert_eq!(own.step(BackEvent::BadState), expected);
            for state in [
                XenbusState::InitWait,
                XenbusState::Reconfiguring,
                XenbusState::Reconfigured,
            ] {
                assert_eq!(back(own, state, true), expected);
            }
        }
    }

    #[test]
    fn a_disk_in_use_outlives_failures_of_the_backend() {
        for own in BACKS {
            let over = matches!(own, BackState::Closing | BackState::Removed);
            let expected = if over {
                BackAction::Wait
            } else {
                BackAction::Retry
            };
            let unusable = Failure::Unusable { connected: true };
            assert_eq!(own.step(BackEvent::Failed(unusable)), expected);
            assert_eq!(own.step(BackEvent::Failed(Failure::Temporary)), expected);
        }
    }

    #[test]
    fn online_until_the_frontend_has_closed_if_the_toolstack_does_not_say() {
        for state in STATES {
            let closed = matches!(state, XenbusState::Closed | XenbusState::Unknown);
            assert_eq!(is_online(None, state), !closed);
            assert!(is_online(Some(b"1"), state));
            assert!(!is_online(Some(b"0"), state));
            assert!(!is_online(Some(b"x"), state));
        }
    }

    #[test]
    fn closing_of_the_toolstack_is_taken_over() {
        for own in BACKS {
            let over = matches!(own, BackState::Closing | BackState::Removed);
            let expected = if over {
                BackAction::Wait
            } else {
                BackAction::Close
            };
            assert_eq!(own.step(BackEvent::ToolstackClosing), expected);
        }
    }

    #[test]
    fn what_was_told_to_close_closes_before_it_is_served_again() {
        for (state, first, later) in [
            (
                XenbusState::Initialising,
                BackAction::Restart,
                BackAction::Restart,
            ),
            (
                XenbusState::Initialised,
                BackAction::Restart,
                BackAction::Wait,
            ),
            (
                XenbusState::Connected,
                BackAction::Restart,
                BackAction::Wait,
            ),
            (XenbusState::Closing, BackAction::Close, BackAction::Wait),
            (
                XenbusState::Closed,
                BackAction::Disconnect,
                BackAction::Disconnect,
            ),
        ] {
            assert_eq!(back(BackState::Starting, state, true), first);
            assert_eq!(back(BackState::StartingClosed, state, true), later);
        }
        assert_eq!(
            back(BackState::Starting, XenbusState::Connected, false),
            BackAction::Close
        );
        assert_eq!(
            back(BackState::StartingClosed, XenbusState::Connected, false),
            BackAction::Wait
        );
    }

    #[test]
    fn a_backend_without_a_frontend_is_removed() {
        for (own, action) in [
            (BackState::Starting, BackAction::Disconnect),
            (BackState::StartingClosed, BackAction::Disconnect),
            (BackState::Waiting, BackAction::Disconnect),
            (BackState::Connected, BackAction::Disconnect),
            (BackState::Closing, BackAction::Disconnect),
            (BackState::Disconnected, BackAction::Remove),
            (BackState::Closed, BackAction::Remove),
            (BackState::Removed, BackAction::Wait),
        ] {
            assert_eq!(back(own, XenbusState::Unknown, true), action);
            assert_eq!(back(own, XenbusState::Unknown, false), action);
        }
    }

    #[test]
    fn actions_lead_to_states_with_their_nodes() {
        for (action, node) in [
            (FrontAction::Offer, XenbusState::Initialised),
            (FrontAction::Connect, XenbusState::Connected),
            (FrontAction::Reset, XenbusState::Closed),
            (FrontAction::Restart, XenbusState::Initialising),
            (FrontAction::Remove, XenbusState::Closed),
        ] {
            assert_eq!(action.next_state().map(FrontState::xenbus), Some(node));
        }
        for action in [FrontAction::Wait, FrontAction::Report, FrontAction::Refresh] {
            assert_eq!(action.next_state(), None);
        }
        for (action, node) in [
            (BackAction::Connect, Some(XenbusState::Connected)),
            (BackAction::Close, Some(XenbusState::Closing)),
            (BackAction::Fail, Some(XenbusState::Closing)),
            (BackAction::Disconnect, None),
            (BackAction::Restart, Some(XenbusState::InitWait)),
            (BackAction::Finish, Some(XenbusState::Closed)),
            (BackAction::Remove, Some(XenbusState::Closed)),
        ] {
            assert_eq!(action.next_state().and_then(BackState::xenbus), node);
        }
        for action in [BackAction::Wait, BackAction::Open, BackAction::Retry] {
            assert_eq!(action.next_state(), None);
        }
    }
}
