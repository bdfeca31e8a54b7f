// SPDX-License-Identifier: GPL-2.0

//! The connection as a state machine, for each side.
//!
//! Both sides of a device show their state in a xenstore node and watch the other's. [`Front`] and
//! [`Back`] are what a side knows about itself; `step` says what it must do when something happens.
//! A driver does what the action says, takes over the state that the action leads to, writes that
//! state to its node, and asks again with the other side's state as it is then, until the answer is
//! to wait:
//!
//! ```
//! # use blkif::state::{Front, FrontAction, FrontEvent, XenbusState};
//! # fn backend() -> FrontEvent {
//! #     FrontEvent::Backend { state: XenbusState::Connected, online: true }
//! # }
//! # fn carry_out(_: FrontAction) {}
//! # let mut own = Front::Offered;
//! # let mut event = backend();
//! loop {
//!     let action = own.step(event);
//!     carry_out(action);
//!     let Some(next) = action.leads_to() else { break };
//!     own = next;
//!     event = backend();
//! }
//! # assert_eq!(own, Front::Live);
//! ```
//!
//! # An ordinary life
//!
//! | frontend | backend | |
//! |---|---|---|
//! | Initialising | Initialising | the toolstack has created both |
//! | | InitWait | the backend has written what it can do |
//! | Initialised | | the frontend has chosen and offers its rings |
//! | | Connected | the backend serves the rings and has described the disk |
//! | Connected | | the disk is in use |
//! | | Closing | the toolstack wants the disk back and has cleared `online` |
//! | Closed | | the frontend has ended everything |
//! | | Closed | so has the backend; the toolstack removes the nodes |
//!
//! # Outage
//!
//! The node `online` of the backend tells a detach from an outage. As long as it is 1, a backend
//! that closes or disappears is expected to come back: the frontend keeps the disk and what is in
//! flight, and connects anew. A backend that comes back while the frontend is still Connected just
//! goes on with the same rings. The frontend waits for no longer than a deadline, which runs from
//! when [`Front::whole`] ends to be true until it is true again.
//!
//! A side looks only at the present state of the other: several changes may be seen as one. The
//! steps are made such that no order of changes leaves both sides waiting for each other, also if
//! one of them is the C driver. A test searches all of them.

/// State of one side as written in its node `state` (`enum xenbus_state`).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub enum XenbusState {
    /// There is no such node.
    Unknown = 0,
    /// Created, or starting anew.
    Initialising = 1,
    /// Backend only: what it can do is written, now it is the frontend's turn.
    InitWait = 2,
    /// Frontend: the rings are offered.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// About to close.
    Closing = 5,
    /// Nothing is shared any more.
    Closed = 6,
    /// Used by PCI devices only.
    Reconfiguring = 7,
    /// Used by PCI devices only.
    Reconfigured = 8,
}

impl XenbusState {
    /// The state of a number, or `None` if there is no such state.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => XenbusState::Unknown,
            1 => XenbusState::Initialising,
            2 => XenbusState::InitWait,
            3 => XenbusState::Initialised,
            4 => XenbusState::Connected,
            5 => XenbusState::Closing,
            6 => XenbusState::Closed,
            7 => XenbusState::Reconfiguring,
            8 => XenbusState::Reconfigured,
            _ => return None,
        })
    }

    /// The number of the state.
    pub const fn number(self) -> u32 {
        self as u32
    }
}

/// What a frontend knows about its connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Front {
    /// Nothing is shared; ready to connect as soon as the backend is in InitWait. This is where a
    /// probed device starts, after it has written Initialising. There may be a disk, kept from an
    /// earlier connection.
    Waiting,
    /// Rings are shared and their nodes written; the backend has not said that it serves them.
    Offered,
    /// The disk is in use. The backend may be away for a while; it will find the rings as they are.
    Live,
    /// An earlier connection is over, and the backend must get to Closed before a new one can
    /// begin. The disk and its requests are kept. To the backend this looks as if the frontend had
    /// closed.
    Reset,
    /// The disk is gone: what was in flight has ended with an error. Only the toolstack can make a
    /// new device of this one.
    Dead,
}

/// What can happen to a frontend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FrontEvent {
    /// The backend's state may have changed.
    Backend {
        /// Present state of the backend.
        state: XenbusState,
        /// Its node `online`: it is to serve this device. A node that is missing means no.
        online: bool,
    },
    /// The backend's node `state` holds no number of a state.
    BadState,
    /// A step could not be carried out: no memory, bad nodes.
    Failed,
    /// The connection has not been whole for too long.
    Deadline {
        /// There is a disk that somebody may be waiting for.
        disk: bool,
    },
    /// The domain runs anew after it was saved: nothing is shared with anyone.
    Resume,
}

/// What a frontend must do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FrontAction {
    /// Nothing.
    Wait,
    /// Say in the log what is being waited for, and go on waiting.
    Report,
    /// Choose features, share rings, write their nodes; Initialised.
    Offer,
    /// Read what the disk is; make it, or let it go on with the requests that were kept;
    /// Connected.
    Connect,
    /// Read the size of the disk again: it may have changed.
    Refresh,
    /// Stop sharing, keep the requests; Closed.
    Reset,
    /// Stop sharing, keep the requests; Initialising.
    Restart,
    /// Stop sharing, end all requests with an error, let the disk go; Closed.
    Detach,
}

impl FrontAction {
    /// The state after the action, if it leads to another one.
    pub const fn leads_to(self) -> Option<Front> {
        match self {
            FrontAction::Wait | FrontAction::Report | FrontAction::Refresh => None,
            FrontAction::Offer => Some(Front::Offered),
            FrontAction::Connect => Some(Front::Live),
            FrontAction::Reset => Some(Front::Reset),
            FrontAction::Restart => Some(Front::Waiting),
            FrontAction::Detach => Some(Front::Dead),
        }
    }
}

impl Front {
    /// What stands in the frontend's node `state`.
    pub const fn xenbus(self) -> XenbusState {
        match self {
            Front::Waiting => XenbusState::Initialising,
            Front::Offered => XenbusState::Initialised,
            Front::Live => XenbusState::Connected,
            Front::Reset | Front::Dead => XenbusState::Closed,
        }
    }

    /// Whether requests are being served. The deadline runs while this is false.
    pub const fn whole(self, backend: XenbusState) -> bool {
        matches!((self, backend), (Front::Live, XenbusState::Connected))
    }

    /// What to do about an event.
    pub const fn step(self, event: FrontEvent) -> FrontAction {
        match event {
            FrontEvent::Backend { state, online } => match self {
                Front::Waiting => Self::waiting(state, online),
                Front::Offered => Self::offered(state, online),
                Front::Live => Self::live(state, online),
                Front::Reset => Self::reset(state, online),
                Front::Dead => FrontAction::Wait,
            },
            FrontEvent::BadState | FrontEvent::Failed => self.give_up(),
            FrontEvent::Deadline { disk: true } => self.give_up(),
            FrontEvent::Deadline { disk: false } => FrontAction::Report,
            FrontEvent::Resume => self.resume(),
        }
    }

    /// A backend that is Connected or Closing belongs to a connection of which this driver knows
    /// nothing, as after a crash of the frontend: it must close first.
    const fn waiting(backend: XenbusState, online: bool) -> FrontAction {
        match (backend, online) {
            (XenbusState::InitWait, _) => FrontAction::Offer,
            (XenbusState::Closing | XenbusState::Closed, false) => FrontAction::Detach,
            (XenbusState::Connected, _) | (XenbusState::Closing, true) => FrontAction::Reset,
            // It sees that the frontend is Initialising and will return to InitWait.
            (XenbusState::Closed, true) => FrontAction::Wait,
            (XenbusState::Unknown | XenbusState::Initialising, _) => FrontAction::Wait,
            (XenbusState::Initialised, _) => FrontAction::Wait,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => FrontAction::Wait,
        }
    }

    /// A backend that answers an offer with Closing has refused it. To offer the same again would
    /// go on for ever.
    const fn offered(backend: XenbusState, online: bool) -> FrontAction {
        match (backend, online) {
            (XenbusState::Connected, _) => FrontAction::Connect,
            (XenbusState::Closing, _) | (XenbusState::Closed, false) => FrontAction::Detach,
            (XenbusState::Closed, true) => FrontAction::Restart,
            (XenbusState::Unknown | XenbusState::Initialising, _) => FrontAction::Wait,
            (XenbusState::InitWait | XenbusState::Initialised, _) => FrontAction::Wait,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => FrontAction::Wait,
        }
    }

    /// A backend before Connected is one that was replaced and comes back to the same rings.
    const fn live(backend: XenbusState, online: bool) -> FrontAction {
        match (backend, online) {
            (XenbusState::Connected, _) => FrontAction::Refresh,
            (XenbusState::Closing | XenbusState::Closed, false) => FrontAction::Detach,
            (XenbusState::Closing, true) => FrontAction::Reset,
            (XenbusState::Closed, true) => FrontAction::Restart,
            (XenbusState::Unknown | XenbusState::Initialising, _) => FrontAction::Wait,
            (XenbusState::InitWait | XenbusState::Initialised, _) => FrontAction::Wait,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => FrontAction::Wait,
        }
    }

    /// Closed has been written. A backend that has seen it, or is a new one, can be connected to.
    const fn reset(backend: XenbusState, online: bool) -> FrontAction {
        match (backend, online) {
            (XenbusState::Closing | XenbusState::Closed, false) => FrontAction::Detach,
            (XenbusState::Closed, true) => FrontAction::Restart,
            (XenbusState::Initialising | XenbusState::InitWait, _) => FrontAction::Restart,
            (XenbusState::Closing, true) | (XenbusState::Connected, _) => FrontAction::Wait,
            (XenbusState::Unknown | XenbusState::Initialised, _) => FrontAction::Wait,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => FrontAction::Wait,
        }
    }

    const fn give_up(self) -> FrontAction {
        match self {
            Front::Waiting | Front::Offered | Front::Live | Front::Reset => FrontAction::Detach,
            Front::Dead => FrontAction::Wait,
        }
    }

    const fn resume(self) -> FrontAction {
        match self {
            Front::Waiting | Front::Offered | Front::Live | Front::Reset => FrontAction::Restart,
            Front::Dead => FrontAction::Wait,
        }
    }
}

/// What a backend knows about its connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Back {
    /// What it can do is written. This is where a probed device starts, also when it takes over a
    /// frontend that is Connected.
    Waiting,
    /// The rings are served.
    Live,
    /// The frontend has announced that it will close, or something is wrong and it should. Rings
    /// that are there are still served.
    Closing,
    /// What was taken from the rings is answered and they are unmapped. The node still holds the
    /// state from before; the next step, which comes at once, decides on another.
    Detached,
    /// The frontend has closed. It may come back.
    Closed,
    /// The device is being removed.
    Gone,
}

/// What can happen to a backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackEvent {
    /// The frontend's state may have changed, or the physical device is there now.
    Frontend {
        /// Present state of the frontend.
        state: XenbusState,
        /// The own node `online`: the toolstack wants the device to exist.
        online: bool,
        /// The physical device is open.
        ready: bool,
    },
    /// The frontend's node `state` holds no number of a state.
    BadState,
    /// A step could not be carried out: bad nodes, a bad ring.
    Failed,
}

/// What a backend must do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackAction {
    /// Nothing.
    Wait,
    /// Map the rings at the position where they are, describe the disk, start to serve; Connected.
    Attach,
    /// Show that the frontend's wish to close was seen; Closing.
    Close,
    /// Write the error to xenstore; Closing.
    Fail,
    /// Answer what was taken from the rings, take no more, unmap. Then ask again; no state is
    /// written yet.
    Drain,
    /// Write what it can do; InitWait.
    Restart,
    /// Closed.
    Finish,
    /// Remove the device.
    Forget,
}

impl BackAction {
    /// The state after the action, if it leads to another one.
    pub const fn leads_to(self) -> Option<Back> {
        match self {
            BackAction::Wait => None,
            BackAction::Attach => Some(Back::Live),
            BackAction::Close | BackAction::Fail => Some(Back::Closing),
            BackAction::Drain => Some(Back::Detached),
            BackAction::Restart => Some(Back::Waiting),
            BackAction::Finish => Some(Back::Closed),
            BackAction::Forget => Some(Back::Gone),
        }
    }
}

impl Back {
    /// What stands in the backend's node `state`, if this state of the connection decides it.
    pub const fn xenbus(self) -> Option<XenbusState> {
        match self {
            Back::Waiting => Some(XenbusState::InitWait),
            Back::Live => Some(XenbusState::Connected),
            Back::Closing => Some(XenbusState::Closing),
            Back::Detached => None,
            Back::Closed | Back::Gone => Some(XenbusState::Closed),
        }
    }

    /// What to do about an event.
    pub const fn step(self, event: BackEvent) -> BackAction {
        match event {
            BackEvent::Frontend {
                state,
                online,
                ready,
            } => match self {
                Back::Waiting => Self::waiting(state, ready),
                Back::Live => Self::live(state),
                Back::Closing => Self::closing(state),
                Back::Detached => Self::detached(state, online),
                Back::Closed => Self::closed(state, online),
                Back::Gone => BackAction::Wait,
            },
            BackEvent::BadState | BackEvent::Failed => self.fail(),
        }
    }

    const fn waiting(frontend: XenbusState, ready: bool) -> BackAction {
        match (frontend, ready) {
            (XenbusState::Initialised | XenbusState::Connected, true) => BackAction::Attach,
            (XenbusState::Initialised | XenbusState::Connected, false) => BackAction::Wait,
            (XenbusState::Initialising, _) => BackAction::Wait,
            (XenbusState::Closing, _) => BackAction::Close,
            (XenbusState::Closed | XenbusState::Unknown, _) => BackAction::Drain,
            (XenbusState::InitWait, _) => BackAction::Fail,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => BackAction::Fail,
        }
    }

    /// A frontend that is Initialising has started anew without closing: it crashed.
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

    /// A frontend that has not seen Closing yet, or not followed it, will or will be removed.
    const fn closing(frontend: XenbusState) -> BackAction {
        match frontend {
            XenbusState::Closed | XenbusState::Unknown => BackAction::Drain,
            XenbusState::Initialising => BackAction::Drain,
            XenbusState::Initialised | XenbusState::Connected => BackAction::Wait,
            XenbusState::Closing | XenbusState::InitWait => BackAction::Wait,
            XenbusState::Reconfiguring | XenbusState::Reconfigured => BackAction::Wait,
        }
    }

    const fn detached(frontend: XenbusState, online: bool) -> BackAction {
        match (frontend, online) {
            (XenbusState::Unknown, _) => BackAction::Forget,
            (XenbusState::Closed, false) => BackAction::Forget,
            (XenbusState::Closed, true) => BackAction::Finish,
            (XenbusState::Closing, _) => BackAction::Close,
            (XenbusState::Initialising, _) => BackAction::Restart,
            (XenbusState::Initialised | XenbusState::Connected, _) => BackAction::Restart,
            (XenbusState::InitWait, _) => BackAction::Fail,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, _) => BackAction::Fail,
        }
    }

    /// Some frontends (boot loaders) offer rings without waiting for InitWait.
    const fn closed(frontend: XenbusState, online: bool) -> BackAction {
        match (frontend, online) {
            (XenbusState::Unknown, _) | (_, false) => BackAction::Forget,
            (XenbusState::Initialising, true) => BackAction::Restart,
            (XenbusState::Initialised | XenbusState::Connected, true) => BackAction::Restart,
            (XenbusState::Closing | XenbusState::Closed, true) => BackAction::Wait,
            (XenbusState::InitWait, true) => BackAction::Wait,
            (XenbusState::Reconfiguring | XenbusState::Reconfigured, true) => BackAction::Wait,
        }
    }

    const fn fail(self) -> BackAction {
        match self {
            Back::Waiting | Back::Live | Back::Detached => BackAction::Fail,
            Back::Closing | Back::Closed | Back::Gone => BackAction::Wait,
        }
    }
}
