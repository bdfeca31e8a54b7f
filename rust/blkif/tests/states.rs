// SPDX-License-Identifier: GPL-2.0-only

//! Search of all states that two sides and a toolstack can reach.
//!
//! A *model state* is the state of a frontend, of a backend and of their nodes, with the changes
//! that each has not read yet. A *step* is an action of a side or of the toolstack. A *disturbance*
//! is an event from outside: a detach, a driver that is unbound or bound, a crash, a failure, a
//! migration, a deadline. The search visits every state that a sequence of steps and disturbances
//! reaches. Then it follows steps alone: from no state do they continue forever, and each state in
//! which they end is an expected one.
//!
//! A side reads the other's state in one step, acts on it in another, and writes its own state in a
//! third, so that the others may act in between. So does the toolstack: it clears `online` in one
//! step and writes Closing in another. A watch that fires several times is noticed once.
//!
//! The C drivers take part, modelled after what they do with each state of the other side. The C
//! frontend crashes (`BUG_ON(info->nr_rings)`) when it has closed and then reads Connected: no
//! sequence of steps and disturbances may lead to that.

use blkif::state::BackAction;
use blkif::state::BackEvent;
use blkif::state::BackState;
use blkif::state::Failure;
use blkif::state::FrontAction;
use blkif::state::FrontEvent;
use blkif::state::FrontState;
use blkif::state::XenbusState;
use std::collections::BTreeMap;
use std::collections::BTreeSet;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum FrontSide {
    /// No driver is bound.
    Absent,
    Ours(FrontState),
    /// The C driver, which knows the state that it wrote last.
    C(XenbusState),
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum BackSide {
    /// The device was removed.
    Removed,
    Ours(BackState),
    /// The C driver, which knows the state that it wrote last.
    C(XenbusState),
}

/// What the toolstack does about the device.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Toolstack {
    /// It wants the device to be there.
    Keeps,
    /// It has cleared `online`, and has still to write Closing.
    Detaches,
    /// It has written Closing and waits for Closed.
    Waits,
    /// It has removed the nodes.
    Done,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Model {
    front: FrontSide,
    back: BackSide,
    front_node: XenbusState,
    back_node: XenbusState,
    /// What the drivers of the backend have written last.
    back_wrote: XenbusState,
    online: bool,
    toolstack: Toolstack,
    /// The physical device is open.
    ready: bool,
    /// The one that the hotplug script has named cannot be opened.
    wrong: bool,
    /// A backend has described the disk in its directory: a frontend has been connected.
    described: bool,
    /// The frontend shares rings.
    offered: bool,
    /// The backend has mapped the rings that the frontend shares now.
    served: bool,
    /// The frontend has something to notice.
    front_wake: bool,
    /// The backend has something to notice.
    back_wake: bool,
    /// The backend's state and `online` as the frontend read them.
    front_read: Option<(XenbusState, bool)>,
    /// The frontend has been connected, and keeps its disk.
    disk: bool,
    /// The frontend's state, `online` and `ready` as the backend read them.
    back_read: Option<(XenbusState, bool, bool)>,
    /// What the frontend has done leads to this, which it has to write.
    front_write: Option<FrontSide>,
    /// The same for the backend.
    back_write: Option<BackSide>,
    /// The C frontend has made rings. It keeps them when it closes.
    c_rings: bool,
    /// `true` if the C frontend has reached its `BUG_ON`.
    crashed: bool,
}

/// An event from outside.
#[derive(Clone, Copy, Debug)]
enum Disturbance {
    Detach,
    /// The toolstack writes Closing and leaves `online` as it is.
    AskToClose,
    BackRebind,
    /// The frontend or the toolstack has written an invalid node.
    BackFailure,
    /// The backend is short of something.
    BackShortage,
    FrontUnbind,
    FrontBind,
    FrontCrash,
    FrontFailure,
    /// The frontend could not take a step for now, or gives up a connection without responses.
    FrontUnusable,
    Deadline,
    Migration,
    DeviceReady,
    DeviceWrong,
    /// A backend that was replaced finds that somebody else has the device.
    DeviceTaken,
}

const DISTURBANCES: [Disturbance; 15] = [
    Disturbance::Detach,
    Disturbance::AskToClose,
    Disturbance::BackRebind,
    Disturbance::BackFailure,
    Disturbance::BackShortage,
    Disturbance::FrontUnbind,
    Disturbance::FrontBind,
    Disturbance::FrontCrash,
    Disturbance::FrontFailure,
    Disturbance::FrontUnusable,
    Disturbance::Deadline,
    Disturbance::Migration,
    Disturbance::DeviceReady,
    Disturbance::DeviceWrong,
    Disturbance::DeviceTaken,
];

impl Model {
    fn new(front: FrontSide, back: BackSide) -> Self {
        Model {
            front,
            back,
            front_node: XenbusState::Initialising,
            back_node: XenbusState::Initialising,
            back_wrote: XenbusState::Initialising,
            online: true,
            toolstack: Toolstack::Keeps,
            ready: false,
            wrong: false,
            described: false,
            offered: false,
            served: false,
            front_wake: true,
            back_wake: true,
            front_read: None,
            disk: false,
            back_read: None,
            front_write: None,
            back_write: None,
            c_rings: false,
            crashed: false,
        }
        .with_probed_back()
    }

    /// Writes InitWait for a C backend, which does so when it is bound; ours does so in a step.
    fn with_probed_back(mut self) -> Self {
        if let BackSide::C(state) = self.back {
            self.back_writes(BackSide::C(state));
        }
        self
    }

    fn write_front(&mut self, state: XenbusState) {
        if self.front_node != state {
            self.front_node = state;
            self.back_wake = true;
        }
    }

    fn write_back(&mut self, state: XenbusState) {
        if self.back_node != state {
            self.back_node = state;
            self.front_wake = true;
        }
    }

    fn share(&mut self) {
        self.offered = true;
        self.served = false;
    }

    fn unshare(&mut self) {
        self.offered = false;
        self.served = false;
    }

    /// Returns the states after one step, at most one for each side and one for the toolstack.
    fn steps(&self) -> Vec<Model> {
        [self.front_step(), self.back_step(), self.toolstack_step()]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Makes a step of the toolstack: it writes Closing, and removes all nodes once the backend has
    /// closed, which both sides notice.
    fn toolstack_step(mut self) -> Option<Model> {
        let closed = self.back_node == XenbusState::Closed;
        match self.toolstack {
            Toolstack::Keeps | Toolstack::Done => return None,
            Toolstack::Detaches | Toolstack::Waits if closed => {
                self.forget();
                self.toolstack = Toolstack::Done;
            }
            Toolstack::Waits => return None,
            Toolstack::Detaches => {
                self.back_node = XenbusState::Closing;
                self.toolstack = Toolstack::Waits;
            }
        }
        self.front_wake = true;
        Some(self)
    }

    fn front_step(mut self) -> Option<Model> {
        if let Some(next) = self.front_write.take() {
            self.front_writes(next);
        } else if let Some((state, online)) = self.front_read.take() {
            match self.front {
                FrontSide::Absent => {}
                FrontSide::Ours(own) => {
                    let disk = self.disk;
                    self.front_does(own.step(FrontEvent::Backend {
                        state,
                        online,
                        disk,
                    }))
                }
                FrontSide::C(own) => self.c_front(own, state),
            }
        } else if self.front_wake {
            self.front_wake = false;
            self.front_read = Some((self.back_node, self.online));
        } else {
            return None;
        }
        Some(self)
    }

    fn front_does(&mut self, action: FrontAction) {
        match action {
            FrontAction::Wait | FrontAction::Report | FrontAction::Refresh => {}
            FrontAction::Offer => self.share(),
            FrontAction::Connect => {
                assert!(self.offered);
                self.disk = true;
            }
            FrontAction::Reset | FrontAction::Restart | FrontAction::Remove => self.unshare(),
        }
        self.front_write = action.next_state().map(FrontSide::Ours);
    }

    fn front_writes(&mut self, next: FrontSide) {
        self.front = next;
        match next {
            FrontSide::Absent => {}
            FrontSide::Ours(own) => self.write_front(own.xenbus()),
            FrontSide::C(own) => self.write_front(own),
        }
    }

    /// Models `blkback_changed()` of the C frontend.
    fn c_front(&mut self, own: XenbusState, back: XenbusState) {
        use XenbusState::*;
        let next = match (own, back) {
            (Initialising, InitWait) => Initialised,
            (_, Connected) => Connected,
            (Closed, Closed) | (_, InitWait) => own,
            (_, Closing | Closed) => Closed,
            _ => own,
        };
        match (own, next) {
            (Initialised, Initialised) | (Initialised | Connected, Connected) => {}
            (_, Initialised | Connected) => {
                self.crashed |= self.c_rings;
                self.c_rings = true;
                self.share();
            }
            (_, Closed) => self.unshare(),
            _ => {}
        }
        self.front_write = Some(FrontSide::C(next));
    }

    fn back_step(mut self) -> Option<Model> {
        if let Some(next) = self.back_write.take() {
            self.back_writes(next);
        } else if let Some((state, online, ready)) = self.back_read.take() {
            match self.back {
                BackSide::Removed => {}
                BackSide::Ours(own) => {
                    let event = BackEvent::Frontend {
                        state,
                        online,
                        ready,
                    };
                    self.back_does(own.step(event), own);
                }
                BackSide::C(own) => self.c_back(own, state),
            }
        } else if self.back_wake {
            self.back_wake = false;
            self.back_read = Some((self.front_node, self.online, self.ready));
        } else {
            return None;
        }
        Some(self)
    }

    fn back_does(&mut self, action: BackAction, own: BackState) {
        match action {
            BackAction::Connect if self.offered => self.served = true,
            // The frontend has torn its rings down in the meantime: they cannot be mapped.
            BackAction::Connect => return self.back_fails(self.unusable(), own),
            BackAction::Open if self.wrong => return self.back_fails(self.unusable(), own),
            BackAction::Open | BackAction::Retry => {}
            BackAction::Disconnect => self.served = false,
            BackAction::Wait | BackAction::Close | BackAction::Fail => {}
            BackAction::Restart | BackAction::Finish => {}
            BackAction::Remove => self.served = false,
        }
        self.back_write = action.next_state().map(|next| match next {
            BackState::Removed => BackSide::Removed,
            _ => BackSide::Ours(next),
        });
    }

    fn unusable(&self) -> Failure {
        Failure::Unusable {
            connected: self.described,
        }
    }

    fn back_fails(&mut self, failure: Failure, own: BackState) {
        self.back_does(own.step(BackEvent::Failed(failure)), own);
    }

    /// Writes the backend's state. The C backend replaces any state. Ours reads the frontend's
    /// state again after each step but the one to Connected: an event tells it of later changes.
    fn back_writes(&mut self, next: BackSide) {
        let (state, looks_again) = match next {
            BackSide::Removed => (Some(XenbusState::Closed), false),
            BackSide::C(state) => (Some(state), false),
            BackSide::Ours(own) => (own.xenbus(), own != BackState::Connected),
        };
        let ours = matches!(next, BackSide::Ours(_));
        if let Some(state) = state {
            if ours && !self.may_replace(state) {
                return self.back_is_refused();
            }
            if ours && state == XenbusState::Connected && !self.served {
                // The frontend has closed since, or has other rings than those that are mapped.
                self.back_wake = true;
                return;
            }
            self.back_wrote = state;
            self.described |= state == XenbusState::Connected;
            self.write_back(state);
        }
        self.back = next;
        self.back_wake |= looks_again;
    }

    /// Returns `true` if our backend may write `state`: models `may_replace()` of `xenbus.rs` for
    /// what the toolstack writes.
    fn may_replace(&self, state: XenbusState) -> bool {
        self.back_node == self.back_wrote
            || self.back_node != XenbusState::Closing
            || matches!(state, XenbusState::Closing | XenbusState::Closed)
    }

    /// Unmaps the rings, because the state was refused.
    fn back_is_refused(&mut self) {
        self.served = false;
        if let BackSide::Ours(own) = self.back {
            self.back_does(own.step(BackEvent::ToolstackClosing), own);
        }
    }

    /// Models `frontend_changed()` of the C backend.
    fn c_back(&mut self, own: XenbusState, front: XenbusState) {
        use XenbusState::*;
        let next = match (own, front) {
            (Closed, Initialising) => InitWait,
            (_, Initialising) | (Connected, Initialised | Connected) => own,
            (_, Initialised | Connected) if !self.offered => Closing,
            (_, Initialised | Connected) if self.ready => Connected,
            (_, Initialised | Connected) => own,
            (_, Closing) => Closing,
            (_, Closed) => Closed,
            (_, Unknown) => return self.forget(),
            _ => Closing,
        };
        match (own, next) {
            (Connected, Connected) => {}
            (_, Connected) => self.served = true,
            (_, Closed) => self.served = false,
            _ => {}
        }
        // In one step with its action: when the frontend closes and offers other rings in
        // between, it shows Connected and serves the old ones, whatever the frontend is.
        self.back_writes(BackSide::C(next));
        if front == Closed && !self.online {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.served = false;
        self.back_read = None;
        self.back_write = None;
        self.back_writes(BackSide::Removed);
    }

    /// Returns the state after a disturbance, or `None` if that is not possible in this state.
    fn disturb(mut self, disturbance: Disturbance) -> Option<Model> {
        match disturbance {
            Disturbance::Detach => self.detach()?,
            Disturbance::AskToClose => self.ask_to_close()?,
            Disturbance::BackRebind => self.back_rebind()?,
            Disturbance::BackFailure => self.back_failure(Failure::Frontend)?,
            Disturbance::BackShortage => self.back_shortage()?,
            Disturbance::FrontUnbind => self.front_unbind()?,
            Disturbance::FrontBind if self.front == FrontSide::Absent => self.front_bind(),
            Disturbance::FrontBind => return None,
            Disturbance::FrontCrash if matches!(self.front, FrontSide::Ours(_)) => {
                self.front_bind()
            }
            Disturbance::FrontCrash => return None,
            Disturbance::FrontFailure => self.front_event(FrontEvent::Failed)?,
            Disturbance::FrontUnusable => {
                self.front_event(FrontEvent::ConnectionFailed)?;
                // One that could not make an offer tries again.
                self.front_wake = true;
            }
            Disturbance::Deadline => self.front_event(FrontEvent::Deadline { disk: true })?,
            Disturbance::Migration => self.migration()?,
            Disturbance::DeviceReady => {
                self.ready = true;
                self.wrong = false;
                self.back_wake = true;
            }
            Disturbance::DeviceWrong if self.ready => return None,
            Disturbance::DeviceWrong => {
                self.wrong = true;
                self.back_failure(self.unusable())?;
            }
            Disturbance::DeviceTaken => self.device_taken()?,
        }
        Some(self)
    }

    fn detach(&mut self) -> Option<()> {
        if !self.online {
            return None;
        }
        self.online = false;
        self.toolstack = Toolstack::Detaches;
        Some(())
    }

    fn ask_to_close(&mut self) -> Option<()> {
        if !self.online || self.back == BackSide::Removed || self.back_node == XenbusState::Closed {
            return None;
        }
        self.back_node = XenbusState::Closing;
        self.front_wake = true;
        Some(())
    }

    /// Replaces the driver of the backend. The old one completes the requests that it took and
    /// writes no state, but the bus writes Closed if it finds Closing.
    fn back_rebind(&mut self) -> Option<()> {
        let c_would_be_lost = matches!(self.back, BackSide::C(_)) && !self.online;
        let at_rest = self.back != BackSide::Removed && self.back_write.is_none();
        if !at_rest || c_would_be_lost || self.c_front_would_offer_again() {
            return None;
        }
        if self.back_node == XenbusState::Closing {
            self.back_wrote = XenbusState::Closed;
            self.write_back(XenbusState::Closed);
        }
        self.served = false;
        self.back_wake = true;
        self.back_read = None;
        self.back = self.fresh_back();
        *self = self.with_probed_back();
        Some(())
    }

    /// Returns `true` if a C frontend that is about to close would offer rings again to the next
    /// backend.
    ///
    /// The frontend is about to close because the backend has asked it to. It offers rings again if
    /// it finds the next backend Connected afterwards, which cannot tell. That is the same between
    /// two C drivers, so a backend that asked a C frontend to close is not replaced here.
    fn c_front_would_offer_again(&self) -> bool {
        matches!(self.front, FrontSide::C(_)) && self.back_node == XenbusState::Closing
    }

    fn fresh_back(&self) -> BackSide {
        match self.back {
            BackSide::C(_) => BackSide::C(XenbusState::InitWait),
            BackSide::Ours(_) | BackSide::Removed => BackSide::Ours(match self.back_wrote {
                XenbusState::Closing | XenbusState::Closed => BackState::StartingClosed,
                _ => BackState::Starting,
            }),
        }
    }

    /// Fails an action of our backend for a temporary reason. The C backend closes after any
    /// failure.
    fn back_shortage(&mut self) -> Option<()> {
        if matches!(self.back, BackSide::C(_)) {
            return None;
        }
        self.back_failure(Failure::Temporary)
    }

    fn device_taken(&mut self) -> Option<()> {
        let starting = matches!(
            self.back,
            BackSide::Ours(BackState::Starting | BackState::StartingClosed)
        );
        if !starting || !self.ready {
            return None;
        }
        self.ready = false;
        self.wrong = true;
        Some(())
    }

    fn back_failure(&mut self, failure: Failure) -> Option<()> {
        if self.back_write.is_some() {
            return None;
        }
        self.back_read = None;
        match self.back {
            BackSide::Removed => return None,
            BackSide::Ours(own) => self.back_fails(failure, own),
            BackSide::C(_) => self.back_writes(BackSide::C(XenbusState::Closing)),
        }
        // A read that was in progress is repeated.
        self.back_wake = true;
        Some(())
    }

    fn front_unbind(&mut self) -> Option<()> {
        if !matches!(self.front, FrontSide::Ours(_)) || self.front_write.is_some() {
            return None;
        }
        self.front = FrontSide::Absent;
        self.front_read = None;
        self.unshare();
        self.write_front(XenbusState::Closed);
        Some(())
    }

    /// Binds the frontend's driver. A frontend that restarts after a crash does the same, without
    /// having closed before.
    fn front_bind(&mut self) {
        self.front = FrontSide::Ours(FrontState::Waiting);
        self.front_read = None;
        self.front_write = None;
        self.disk = false;
        self.front_wake = true;
        self.unshare();
        self.write_front(XenbusState::Initialising);
    }

    fn front_event(&mut self, event: FrontEvent) -> Option<()> {
        let FrontSide::Ours(own) = self.front else {
            return None;
        };
        if self.front_write.is_some() {
            return None;
        }
        self.front_does(own.step(event));
        Some(())
    }

    /// Migrates the frontend to another host, where the toolstack has created new nodes.
    fn migration(&mut self) -> Option<()> {
        let FrontSide::Ours(own) = self.front else {
            return None;
        };
        let possible = self.online && self.back != BackSide::Removed && self.front_write.is_none();
        if own == FrontState::Removed || !possible {
            return None;
        }
        let back = match self.back {
            BackSide::C(_) => C_BACK,
            BackSide::Ours(_) | BackSide::Removed => OUR_BACK,
        };
        *self = Model {
            ready: self.ready,
            disk: self.disk,
            ..Model::new(self.front, back)
        };
        self.front_event(FrontEvent::Resume)
    }

    /// Returns `true` if the steps may end in this state.
    fn is_expected_end(&self) -> bool {
        let front_over = match self.front {
            FrontSide::Absent => true,
            FrontSide::Ours(own) => own == FrontState::Removed,
            FrontSide::C(own) => own == XenbusState::Closed,
        };
        let back_over = match self.back {
            BackSide::Removed => true,
            BackSide::Ours(own) => own == BackState::Closed,
            BackSide::C(own) => own == XenbusState::Closed,
        };
        self.in_use() || self.awaits_the_device() || front_over && (back_over || self.back_asks())
    }

    fn in_use(&self) -> bool {
        let nodes = (self.front_node, self.back_node);
        self.online && self.served && nodes == (XenbusState::Connected, XenbusState::Connected)
    }

    /// Returns `true` if the backend waits for the physical device: the script has not named it
    /// yet, or it cannot be opened now. A frontend that was Connected before stays so. The C
    /// backend does not look again for a device that was wrong.
    fn awaits_the_device(&self) -> bool {
        let offered = matches!(
            self.front_node,
            XenbusState::Initialised | XenbusState::Connected
        );
        let c_back = matches!(self.back, BackSide::C(_));
        let connected = self.unusable() == Failure::Unusable { connected: true };
        let awaited = !self.ready && (!self.wrong || c_back || connected);
        self.online && awaited && offered && self.back_node == XenbusState::InitWait
    }

    /// Returns `true` if the frontend has a disk and the backend cannot open its device.
    fn is_refused(&self) -> bool {
        let ours = matches!(self.front, FrontSide::Ours(_));
        ours && self.disk && self.wrong && !self.ready
    }

    /// Returns `true` if no driver is bound to the frontend's device and the backend waits for one.
    fn back_asks(&self) -> bool {
        self.front == FrontSide::Absent && self.back_node == XenbusState::InitWait
    }
}

/// Returns all reachable states, each with the state and the disturbance that lead to it.
fn reachable(start: Model) -> BTreeMap<Model, Option<(Model, Option<Disturbance>)>> {
    let mut from = BTreeMap::from([(start, None)]);
    let mut todo = vec![start];
    while let Some(state) = todo.pop() {
        let steps = state.steps().into_iter().map(|next| (next, None));
        let disturbances = DISTURBANCES
            .iter()
            .filter_map(|disturbance| Some((state.disturb(*disturbance)?, Some(*disturbance))));
        for (next, disturbance) in steps.chain(disturbances) {
            if let std::collections::btree_map::Entry::Vacant(entry) = from.entry(next) {
                entry.insert(Some((state, disturbance)));
                todo.push(next);
            }
        }
    }
    from
}

/// States from which the steps alone end as expected.
#[derive(Default)]
struct Ends {
    expected: BTreeSet<Model>,
    path: Vec<Model>,
}

impl Ends {
    /// Follows all steps from a state. An error is the path to an unexpected end or around a cycle.
    fn follow(&mut self, state: Model) -> Result<(), Vec<Model>> {
        if self.expected.contains(&state) {
            return Ok(());
        }
        let cycle = self.path.contains(&state);
        if cycle && state.is_refused() {
            // The frontend limits the rate of its offers, and the deadline ends them.
            return Ok(());
        }
        self.path.push(state);
        let steps = state.steps();
        if state.crashed || cycle || steps.is_empty() && !state.is_expected_end() {
            return Err(self.path.clone());
        }
        for next in steps {
            self.follow(next)?;
        }
        self.path.pop();
        self.expected.insert(state);
        Ok(())
    }
}

/// Searches all states of a pair of drivers and returns their number.
fn search(front: FrontSide, back: BackSide) -> usize {
    let states = reachable(Model::new(front, back));
    let mut ends = Ends::default();
    for state in states.keys() {
        if let Err(path) = ends.follow(*state) {
            panic!("unexpected end:\n{}", format_path(&states, &path));
        }
    }
    assert!(states
        .keys()
        .any(|state| state.in_use() && state.steps().is_empty()));
    states.len()
}

/// Formats the steps and disturbances that lead to an unexpected end.
fn format_path(
    from: &BTreeMap<Model, Option<(Model, Option<Disturbance>)>>,
    path: &[Model],
) -> String {
    let mut lines = Vec::new();
    let mut at = path[0];
    while let Some((before, disturbance)) = from[&at] {
        lines.push(format!("{disturbance:?} -> {at:?}"));
        at = before;
    }
    lines.reverse();
    lines.extend(path.iter().skip(1).map(|state| format!("then {state:?}")));
    lines.join("\n")
}

const OUR_FRONT: FrontSide = FrontSide::Ours(FrontState::Waiting);
const C_FRONT: FrontSide = FrontSide::C(XenbusState::Initialising);
const OUR_BACK: BackSide = BackSide::Ours(BackState::Starting);
const C_BACK: BackSide = BackSide::C(XenbusState::InitWait);

#[test]
fn our_pair() {
    let states = search(OUR_FRONT, OUR_BACK);
    println!("{states} states");
    assert!(states > 1000);
}

#[test]
fn our_frontend_with_the_c_backend() {
    let states = search(OUR_FRONT, C_BACK);
    println!("{states} states");
    assert!(states > 1000);
}

#[test]
fn the_c_frontend_with_our_backend() {
    let states = search(C_FRONT, OUR_BACK);
    println!("{states} states");
    assert!(states > 100);
}
