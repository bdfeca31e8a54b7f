// SPDX-License-Identifier: GPL-2.0-only

//! The connection as a state machine, for each side.
//!
//! Both sides of a device write their state to a xenstore node and watch that of the other side.
//! [`FrontState`] and [`BackState`] are the states of a side; `step` returns the action for an
//! event. A driver executes the action, enters the state after the action, writes that state to its
//! node, and calls `step` again with the current state of the other side, until no action changes
//! the state:
//!
//! ```
//! # use blkif::state::{BackState, BackAction, BackEvent, XenbusState};
//! # fn frontend() -> BackEvent {
//! #     BackEvent::Frontend { state: XenbusState::Initialised, online: true, ready: true }
//! # }
//! # fn carry_out(_: BackAction) {}
//! # let mut own = BackState::Waiting;
//! # let mut event = frontend();
//! loop {
//!     let action = own.step(event);
//!     carry_out(action);
//!     let Some(next) = action.next_state() else { break };
//!     own = next;
//!     event = frontend();
//! }
//! # assert_eq!(own, BackState::Live);
//! ```
//!
//! A driver that gets an event for each change of the other side need not read the other state
//! again. For a frontend, one step is always enough. A backend reads again unless it is
//! [`BackState::Live`], because no event reports that the toolstack is detaching the device.
//!
//! # Writers of a state
//!
//! A side writes its own node. The toolstack writes the backend's node too: it writes Closing, and
//! waits for Closed. A backend writes a state in a transaction, and replaces only the state that it
//! has written before. When it finds Closing instead, it writes only Closed from then on, see
//! [`BackEvent::ToolstackClosing`]. A frontend that has closed would take InitWait or Connected for
//! a backend that has restarted: `xen-blkfront` then offers its rings again while it still has the
//! old ones, and crashes.
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
    Live,
    /// An earlier connection has ended, and the backend must be Closed before a new one can begin.
    /// The disk and its requests are kept. For the backend the frontend has closed.
    Reset,
    /// The disk was removed, and requests in flight have ended with an error. Only the toolstack
    /// can create a new device.
    Dead,
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
    /// An action has failed for lack of memory or grants, or the backend does not respond to
    /// requests: another connection may succeed.
    Unusable,
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
    /// Stop sharing, end all requests with an error, remove the disk; Closed.
    Detach,
}

impl FrontAction {
    /// Returns the state after the action, if it leads to another one.
    pub const fn next_state(self) -> Option<FrontState> {
        match self {
            FrontAction::Wait | FrontAction::Report | FrontAction::Refresh => None,
            FrontAction::Offer => Some(FrontState::Offered),
            FrontAction::Connect => Some(FrontState::Live),
            FrontAction::Reset => Some(FrontState::Reset),
            FrontAction::Restart => Some(FrontState::Waiting),
            FrontAction::Detach => Some(FrontState::Dead),
        }
    }
}

impl FrontState {
    /// Returns the value of the frontend's node `state`.
    pub const fn xenbus(self) -> XenbusState {
        match self {
            FrontState::Waiting => XenbusState::Initialising,
            FrontState::Offered => XenbusState::Initialised,
            FrontState::Live => XenbusState::Connected,
            FrontState::Reset | FrontState::Dead => XenbusState::Closed,
        }
    }

    /// Returns `true` if requests are served.
    ///
    /// The deadline runs while this is `false`.
    pub const fn is_connected(self, backend: XenbusState) -> bool {
        matches!((self, backend), (FrontState::Live, XenbusState::Connected))
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
                FrontState::Live => Self::live(state),
                FrontState::Reset => Self::reset(state),
                FrontState::Dead => FrontAction::Wait,
            },
            FrontEvent::BadState | FrontEvent::Failed => self.give_up(),
            FrontEvent::Deadline { disk: true } => self.give_up(),
            FrontEvent::Deadline { disk: false } => FrontAction::Report,
            FrontEvent::Unusable => self.disconnect(),
            FrontEvent::Resume => self.resume(),
        }
    }

    /// Returns the action while there is no connection.
    ///
    /// A backend that is Connected or Closing belongs to an earlier connection of another driver,
    /// for instance after a crash of the frontend: it must close first. A backend that is Closed
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
            XenbusState::Closing => FrontAction::Detach,
            XenbusState::Closed => FrontAction::Restart,
            XenbusState::Unknown | XenbusState::Initialising => FrontAction::Wait,
            XenbusState::InitWait | XenbusState::Initialised => FrontAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => FrontAction::Wait,
        }
    }

    /// Returns the action while connected.
    ///
    /// A backend in a state before Connected was replaced, and will serve the same rings.
    const fn live(backend: XenbusState) -> FrontAction {
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
    /// Every backend becomes Closed then, even one that was just started and is in InitWait. An
    /// earlier action would race with that.
    const fn reset(backend: XenbusState) -> FrontAction {
        match backend {
            XenbusState::Closed => FrontAction::Restart,
            XenbusState::Unknown | XenbusState::Initialising => FrontAction::Wait,
            XenbusState::InitWait | XenbusState::Initialised => FrontAction::Wait,
            XenbusState::Connected | XenbusState::Closing => FrontAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => FrontAction::Wait,
        }
    }

    const fn give_up(self) -> FrontAction {
        match self {
            FrontState::Waiting | FrontState::Offered | FrontState::Live | FrontState::Reset => {
                FrontAction::Detach
            }
            FrontState::Dead => FrontAction::Wait,
        }
    }

    /// Returns the action that asks the backend to close.
    ///
    /// A frontend that could not make an offer has shared nothing, so it retries without the
    /// backend.
    const fn disconnect(self) -> FrontAction {
        match self {
            FrontState::Offered | FrontState::Live => FrontAction::Reset,
            FrontState::Waiting | FrontState::Reset | FrontState::Dead => FrontAction::Wait,
        }
    }

    const fn resume(self) -> FrontAction {
        match self {
            FrontState::Waiting | FrontState::Offered | FrontState::Live | FrontState::Reset => {
                FrontAction::Restart
            }
            FrontState::Dead => FrontAction::Wait,
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
    Live,
    /// The frontend has announced that it will close, or has to close because of an error. Mapped
    /// rings are still served.
    Closing,
    /// All requests taken from the rings have responses, and the rings are unmapped. The node still
    /// has the previous state; the next step, which follows at once, decides on another.
    Detached,
    /// The frontend has closed. It may connect again.
    Closed,
    /// The device is being removed.
    Gone,
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
    /// This domain lacks a resource, such as memory, that it may have later.
    Shortage,
}

/// Returns `true` if the toolstack wants a backend's device to stay when a frontend in this state
/// closes it.
///
/// `node` is the node `online` of the backend; without it, the device stays as long as the frontend
/// uses it.
pub fn is_online(node: Option<&[u8]>, frontend: XenbusState) -> bool {
    match node {
        Some(text) => node::switch("online", text).unwrap_or(false),
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
    Attach,
    /// Report the failure, and retry after a delay, or at the next event. The frontend keeps
    /// waiting, and a disk in use stays in use.
    Retry,
    /// Acknowledge that the frontend closes; Closing.
    Close,
    /// Write the error to xenstore; Closing.
    Fail,
    /// Respond to the requests that were taken from the rings, take no more, unmap. No state is
    /// written: the next step, which follows at once, decides on one.
    Drain,
    /// Write the features; InitWait.
    Restart,
    /// Only write the state; Closed.
    Finish,
    /// Remove the device.
    Forget,
}

impl BackAction {
    /// Returns the state after the action, if it leads to another one.
    pub const fn next_state(self) -> Option<BackState> {
        match self {
            BackAction::Wait | BackAction::Open | BackAction::Retry => None,
            BackAction::Attach => Some(BackState::Live),
            BackAction::Close | BackAction::Fail => Some(BackState::Closing),
            BackAction::Drain => Some(BackState::Detached),
            BackAction::Restart => Some(BackState::Waiting),
            BackAction::Finish => Some(BackState::Closed),
            BackAction::Forget => Some(BackState::Gone),
        }
    }
}

impl BackState {
    /// Returns the value of the backend's node `state`, or `None` if the node keeps its value.
    pub const fn xenbus(self) -> Option<XenbusState> {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Detached => None,
            BackState::Waiting => Some(XenbusState::InitWait),
            BackState::Live => Some(XenbusState::Connected),
            BackState::Closing => Some(XenbusState::Closing),
            BackState::Closed | BackState::Gone => Some(XenbusState::Closed),
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
                BackState::Live => Self::live(state),
                BackState::Closing => Self::closing(state),
                BackState::Detached => Self::detached(state),
                BackState::Closed => Self::closed(state),
                BackState::Gone => BackAction::Wait,
            },
            BackEvent::ToolstackClosing => self.close(),
            BackEvent::BadState | BackEvent::Failed(Failure::Frontend) => self.fail(),
            BackEvent::Failed(Failure::Unusable { connected: false }) => self.fail(),
            BackEvent::Failed(Failure::Unusable { connected: true } | Failure::Shortage) => {
                self.retry()
            }
        }
    }

    const fn starting(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Initialising => BackAction::Restart,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Restart,
            XenbusState::Closing => BackAction::Close,
            XenbusState::Closed | XenbusState::Unknown => BackAction::Drain,
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
            XenbusState::Closed | XenbusState::Unknown => BackAction::Drain,
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
            (XenbusState::Initialised | XenbusState::Connected, true) => BackAction::Attach,
            (XenbusState::Initialised | XenbusState::Connected, false) => BackAction::Open,
            (XenbusState::Initialising, _) => BackAction::Wait,
            (XenbusState::Closing, _) => BackAction::Close,
            (XenbusState::Closed | XenbusState::Unknown, _) => BackAction::Drain,
            (XenbusState::InitWait, _) => BackAction::Fail,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => BackAction::Fail,
        }
    }

    /// Returns the action while connected.
    ///
    /// A frontend that is Initialising has restarted without closing: it has crashed.
    const fn live(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Initialised | XenbusState::Connected => BackAction::Wait,
            XenbusState::Closing => BackAction::Close,
            XenbusState::Closed | XenbusState::Unknown => BackAction::Drain,
            XenbusState::Initialising => BackAction::Drain,
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
            XenbusState::Closed | XenbusState::Unknown => BackAction::Drain,
            XenbusState::Initialising | XenbusState::InitWait => BackAction::Wait,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Wait,
            XenbusState::Closing => BackAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Wait,
        }
    }

    const fn detached(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Unknown => BackAction::Forget,
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
            XenbusState::Unknown => BackAction::Forget,
            XenbusState::Initialising => BackAction::Restart,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Restart,
            XenbusState::Closing | XenbusState::Closed => BackAction::Wait,
            XenbusState::InitWait => BackAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Wait,
        }
    }

    /// Returns the action when the toolstack detaches the device.
    ///
    /// The toolstack has written Closing to the backend's node itself,
    /// and this state may have been overwritten since.
    const fn unwanted(self, frontend: XenbusState) -> BackAction {
        let closed = matches!(frontend, XenbusState::Closed | XenbusState::Unknown);
        match self {
            BackState::Detached | BackState::Closed => BackAction::Forget,
            BackState::Gone => BackAction::Wait,
            _ if closed => BackAction::Drain,
            BackState::Starting | BackState::Waiting | BackState::Live => BackAction::Close,
            BackState::StartingClosed | BackState::Closing => BackAction::Wait,
        }
    }

    const fn close(self) -> BackAction {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Waiting => {
                BackAction::Close
            }
            BackState::Live | BackState::Detached | BackState::Closed => BackAction::Close,
            BackState::Closing | BackState::Gone => BackAction::Wait,
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
            BackState::Live | BackState::Detached | BackState::Closed => BackAction::Retry,
            BackState::Closing | BackState::Gone => BackAction::Wait,
        }
    }

    const fn fail(self) -> BackAction {
        match self {
            BackState::Starting | BackState::StartingClosed | BackState::Waiting => {
                BackAction::Fail
            }
            BackState::Live | BackState::Detached => BackAction::Fail,
            BackState::Closing | BackState::Closed | BackState::Gone => BackAction::Wait,
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
        FrontState::Live,
        FrontState::Reset,
        FrontState::Dead,
    ];
    const BACKS: [BackState; 8] = [
        BackState::Starting,
        BackState::StartingClosed,
        BackState::Waiting,
        BackState::Live,
        BackState::Closing,
        BackState::Detached,
        BackState::Closed,
        BackState::Gone,
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
    fn an_ordinary_life() {
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
            BackAction::Attach
        );
        assert_eq!(
            front(FrontState::Offered, XenbusState::Connected),
            FrontAction::Connect
        );
        assert_eq!(
            back(BackState::Live, XenbusState::Connected, true),
            BackAction::Wait
        );
        assert_eq!(
            front(FrontState::Live, XenbusState::Connected),
            FrontAction::Refresh
        );
        let asked = FrontEvent::Backend {
            state: XenbusState::Closing,
            online: false,
            disk: true,
        };
        assert_eq!(FrontState::Live.step(asked), FrontAction::Detach);
        assert_eq!(
            back(BackState::Live, XenbusState::Closed, false),
            BackAction::Drain
        );
        assert_eq!(
            back(BackState::Detached, XenbusState::Closed, false),
            BackAction::Forget
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
            assert_ne!(front(FrontState::Live, state), FrontAction::Detach);
        }
        let online = FrontEvent::Backend {
            state: XenbusState::Connected,
            online: false,
            disk: true,
        };
        assert_eq!(FrontState::Live.step(online), FrontAction::Detach);
    }

    #[test]
    fn a_refusal_ends_a_first_offer_only() {
        for (disk, action) in [(false, FrontAction::Detach), (true, FrontAction::Reset)] {
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
                FrontState::Offered | FrontState::Live => FrontAction::Reset,
                FrontState::Waiting | FrontState::Reset | FrontState::Dead => FrontAction::Wait,
            };
            assert_eq!(own.step(FrontEvent::Unusable), expected);
        }
    }

    #[test]
    fn only_a_served_disk_is_whole() {
        for own in FRONTS {
            for state in STATES {
                let both = own == FrontState::Live && state == XenbusState::Connected;
                assert_eq!(own.is_connected(state), both);
            }
        }
    }

    #[test]
    fn deadlines_end_the_wait_for_those_who_wait() {
        for own in FRONTS {
            let dead = own == FrontState::Dead;
            let expected = if dead {
                FrontAction::Wait
            } else {
                FrontAction::Detach
            };
            assert_eq!(own.step(FrontEvent::Deadline { disk: true }), expected);
            assert_eq!(own.step(FrontEvent::BadState), expected);
            assert_eq!(own.step(FrontEvent::Failed), expected);
            assert_eq!(
                own.step(FrontEvent::Deadline { disk: false }),
                FrontAction::Report
            );
            let expected = if dead {
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
                BackState::Closing | BackState::Closed | BackState::Gone
            );
            let expected = if open {
                BackAction::Fail
            } else {
                BackAction::Wait
            };
            let unusable = Failure::Unusable { connected: false };
            assert_eq!(own.step(BackEvent::Failed(unusable)), expected);
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
            let over = matches!(own, BackState::Closing | BackState::Gone);
            let expected = if over {
                BackAction::Wait
            } else {
                BackAction::Retry
            };
            let unusable = Failure::Unusable { connected: true };
            assert_eq!(own.step(BackEvent::Failed(unusable)), expected);
            assert_eq!(own.step(BackEvent::Failed(Failure::Shortage)), expected);
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
            let over = matches!(own, BackState::Closing | BackState::Gone);
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
            (XenbusState::Closed, BackAction::Drain, BackAction::Drain),
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
    fn a_backend_without_a_frontend_goes() {
        for (own, action) in [
            (BackState::Starting, BackAction::Drain),
            (BackState::StartingClosed, BackAction::Drain),
            (BackState::Waiting, BackAction::Drain),
            (BackState::Live, BackAction::Drain),
            (BackState::Closing, BackAction::Drain),
            (BackState::Detached, BackAction::Forget),
            (BackState::Closed, BackAction::Forget),
            (BackState::Gone, BackAction::Wait),
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
            (FrontAction::Detach, XenbusState::Closed),
        ] {
            assert_eq!(action.next_state().map(FrontState::xenbus), Some(node));
        }
        for action in [FrontAction::Wait, FrontAction::Report, FrontAction::Refresh] {
            assert_eq!(action.next_state(), None);
        }
        for (action, node) in [
            (BackAction::Attach, Some(XenbusState::Connected)),
            (BackAction::Close, Some(XenbusState::Closing)),
            (BackAction::Fail, Some(XenbusState::Closing)),
            (BackAction::Drain, None),
            (BackAction::Restart, Some(XenbusState::InitWait)),
            (BackAction::Finish, Some(XenbusState::Closed)),
            (BackAction::Forget, Some(XenbusState::Closed)),
        ] {
            assert_eq!(action.next_state().and_then(BackState::xenbus), node);
        }
        for action in [BackAction::Wait, BackAction::Open, BackAction::Retry] {
            assert_eq!(action.next_state(), None);
        }
    }
}
