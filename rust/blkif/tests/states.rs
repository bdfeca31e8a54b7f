// SPDX-License-Identifier: GPL-2.0

//! Search of everything that two sides and a toolstack can do to each other.
//!
//! A *world* is a frontend, a backend, their nodes, and what each has yet to notice. Moves are what
//! the sides do by themselves; blows are what befalls them: a detach, a driver that is unbound or
//! bound, a crash, a failure, a migration, a deadline. The search visits every world that any
//! sequence of moves and blows leads to, and then looks at the moves alone: from no world do they
//! go on for ever, and wherever they end is a good end.
//!
//! A side reads the other's state in one move and acts on it in another, so that the other may
//! change in between. A watch that fires several times is noticed once.
//!
//! The C drivers take part, modelled after what they do with each state of the other side.

use blkif::state::Back;
use blkif::state::BackAction;
use blkif::state::BackEvent;
use blkif::state::Front;
use blkif::state::FrontAction;
use blkif::state::FrontEvent;
use blkif::state::XenbusState;
use std::collections::BTreeMap;
use std::collections::BTreeSet;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum FrontSide {
    /// No driver is bound.
    Absent,
    Ours(Front),
    /// The C driver, which knows the state that it wrote last.
    C(XenbusState),
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum BackSide {
    /// The device was removed.
    Gone,
    Ours(Back),
    /// The C driver, which knows the state that it wrote last.
    C(XenbusState),
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct World {
    front: FrontSide,
    back: BackSide,
    front_node: XenbusState,
    back_node: XenbusState,
    online: bool,
    /// The physical device is open.
    ready: bool,
    /// The hotplug script has named one that cannot be opened.
    wrong: bool,
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
    /// The frontend's state, `online` and `ready` as the backend read them.
    back_read: Option<(XenbusState, bool, bool)>,
}

/// What befalls a world.
#[derive(Clone, Copy, Debug)]
enum Blow {
    Detach,
    BackRebind,
    BackFailure,
    FrontUnbind,
    FrontBind,
    FrontCrash,
    FrontFailure,
    Deadline,
    Migration,
    DeviceReady,
    DeviceWrong,
}

const BLOWS: [Blow; 11] = [
    Blow::Detach,
    Blow::BackRebind,
    Blow::BackFailure,
    Blow::FrontUnbind,
    Blow::FrontBind,
    Blow::FrontCrash,
    Blow::FrontFailure,
    Blow::Deadline,
    Blow::Migration,
    Blow::DeviceReady,
    Blow::DeviceWrong,
];

impl World {
    fn new(front: FrontSide, back: BackSide) -> Self {
        World {
            front,
            back,
            front_node: XenbusState::Initialising,
            back_node: XenbusState::InitWait,
            online: true,
            ready: false,
            wrong: false,
            offered: false,
            served: false,
            front_wake: true,
            back_wake: true,
            front_read: None,
            back_read: None,
        }
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

    /// The worlds that a move leads to, at most one for each side.
    fn moves(&self) -> Vec<World> {
        [self.front_move(), self.back_move()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn front_move(mut self) -> Option<World> {
        if let Some((state, online)) = self.front_read.take() {
            match self.front {
                FrontSide::Absent => {}
                FrontSide::Ours(own) => {
                    self.front_does(own.step(FrontEvent::Backend { state, online }))
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
            FrontAction::Connect => assert!(self.offered),
            FrontAction::Reset | FrontAction::Restart | FrontAction::Detach => self.unshare(),
        }
        if let Some(next) = action.leads_to() {
            self.front = FrontSide::Ours(next);
            self.write_front(next.xenbus());
        }
    }

    /// `blkback_changed` of the C frontend.
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
            (_, Initialised | Connected) => self.share(),
            (_, Closed) => self.unshare(),
            _ => {}
        }
        self.front = FrontSide::C(next);
        self.write_front(next);
    }

    fn back_move(mut self) -> Option<World> {
        if let Some((state, online, ready)) = self.back_read.take() {
            match self.back {
                BackSide::Gone => {}
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

    /// After a step it looks again, but for one that has found its own node as it was: what the
    /// frontend does meanwhile is told.
    fn back_does(&mut self, action: BackAction, own: Back) {
        let unchanged = own.xenbus() == Some(self.back_node);
        match action {
            BackAction::Attach if self.offered => self.served = true,
            // The frontend has torn its rings down in the meantime: they cannot be mapped.
            BackAction::Attach => return self.back_does(BackAction::Fail, own),
            BackAction::Open if self.wrong => return self.back_does(BackAction::Fail, own),
            BackAction::Open => {}
            BackAction::Drain => self.served = false,
            BackAction::Wait | BackAction::Close | BackAction::Fail => {}
            BackAction::Restart | BackAction::Finish => {}
            BackAction::Forget => self.served = false,
        }
        if let Some(next) = action.leads_to() {
            self.back_wake |= action != BackAction::Attach || !unchanged;
            self.back = if next == Back::Gone {
                BackSide::Gone
            } else {
                BackSide::Ours(next)
            };
            if let Some(state) = next.xenbus() {
                self.write_back(state);
            }
        }
    }

    /// `frontend_changed` of the C backend.
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
        self.back = BackSide::C(next);
        self.write_back(next);
        if front == Closed && !self.online {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.served = false;
        self.back = BackSide::Gone;
        self.write_back(XenbusState::Closed);
    }

    /// The world after a blow, if it can befall this one.
    fn befall(mut self, blow: Blow) -> Option<World> {
        match blow {
            Blow::Detach => self.detach()?,
            Blow::BackRebind => self.back_rebind()?,
            Blow::BackFailure => self.back_failure()?,
            Blow::FrontUnbind => self.front_unbind()?,
            Blow::FrontBind if self.front == FrontSide::Absent => self.front_bind(),
            Blow::FrontBind => return None,
            Blow::FrontCrash if matches!(self.front, FrontSide::Ours(_)) => self.front_bind(),
            Blow::FrontCrash => return None,
            Blow::FrontFailure => self.front_event(FrontEvent::Failed)?,
            Blow::Deadline => self.front_event(FrontEvent::Deadline { disk: true })?,
            Blow::Migration => self.migration()?,
            Blow::DeviceReady => {
                self.ready = true;
                self.wrong = false;
                self.back_wake = true;
            }
            Blow::DeviceWrong if self.ready => return None,
            Blow::DeviceWrong => {
                self.wrong = true;
                self.back_failure()?;
            }
        }
        Some(self)
    }

    /// The toolstack removes a device at once if the backend is Closed, else it asks it to close.
    fn detach(&mut self) -> Option<()> {
        if !self.online {
            return None;
        }
        self.online = false;
        if self.back_node == XenbusState::Closed {
            self.forget();
        } else {
            self.back_node = XenbusState::Closing;
        }
        self.front_wake = true;
        Some(())
    }

    /// A backend that is unbound finishes what it took and says nothing, unless the toolstack wants
    /// it to close. The next one starts like any.
    fn back_rebind(&mut self) -> Option<()> {
        if self.back == BackSide::Gone || !self.online || self.wakes_the_dead() {
            return None;
        }
        self.served = false;
        self.back_wake = true;
        self.back_read = None;
        self.back = self.fresh_back();
        self.write_back(XenbusState::InitWait);
        Some(())
    }

    /// A C frontend that is about to close offers rings again if it finds the backend Connected
    /// afterwards. The backend cannot tell them from the first ones. That is the same between two C
    /// drivers, so a backend that asked a C frontend to close is not replaced here.
    fn wakes_the_dead(&self) -> bool {
        matches!(self.front, FrontSide::C(_)) && self.back_node == XenbusState::Closing
    }

    fn fresh_back(&self) -> BackSide {
        match self.back {
            BackSide::C(_) => BackSide::C(XenbusState::InitWait),
            BackSide::Ours(_) | BackSide::Gone => BackSide::Ours(Back::Waiting),
        }
    }

    fn back_failure(&mut self) -> Option<()> {
        self.back_read = None;
        match self.back {
            BackSide::Gone => return None,
            BackSide::Ours(own) => self.back_does(own.step(BackEvent::Failed), own),
            BackSide::C(_) => {
                self.back = BackSide::C(XenbusState::Closing);
                self.write_back(XenbusState::Closing);
            }
        }
        // A read that was under way is done anew.
        self.back_wake = true;
        Some(())
    }

    fn front_unbind(&mut self) -> Option<()> {
        if !matches!(self.front, FrontSide::Ours(_)) {
            return None;
        }
        self.front = FrontSide::Absent;
        self.front_read = None;
        self.unshare();
        self.write_front(XenbusState::Closed);
        Some(())
    }

    /// Also what a frontend does after a crash: the same, but nobody has closed anything.
    fn front_bind(&mut self) {
        self.front = FrontSide::Ours(Front::Waiting);
        self.front_read = None;
        self.front_wake = true;
        self.unshare();
        self.write_front(XenbusState::Initialising);
    }

    fn front_event(&mut self, event: FrontEvent) -> Option<()> {
        let FrontSide::Ours(own) = self.front else {
            return None;
        };
        self.front_does(own.step(event));
        Some(())
    }

    /// The frontend moves to another host, where a toolstack has made new nodes.
    fn migration(&mut self) -> Option<()> {
        let FrontSide::Ours(own) = self.front else {
            return None;
        };
        if own == Front::Dead || !self.online || self.back == BackSide::Gone {
            return None;
        }
        *self = World {
            ready: self.ready,
            ..World::new(self.front, self.fresh_back())
        };
        self.front_event(FrontEvent::Resume)
    }

    /// Whether nothing more needs to happen here.
    fn is_good_end(&self) -> bool {
        let front_over = match self.front {
            FrontSide::Absent => true,
            FrontSide::Ours(own) => own == Front::Dead,
            FrontSide::C(own) => own == XenbusState::Closed,
        };
        let back_over = match self.back {
            BackSide::Gone => true,
            BackSide::Ours(own) => own == Back::Closed,
            BackSide::C(own) => own == XenbusState::Closed,
        };
        self.in_use() || self.awaits_the_device() || front_over && (back_over || self.back_asks())
    }

    fn in_use(&self) -> bool {
        let nodes = (self.front_node, self.back_node);
        self.online && self.served && nodes == (XenbusState::Connected, XenbusState::Connected)
    }

    /// The hotplug script has still to say what to serve. A frontend that was Connected before
    /// stays so. The C backend does not look again for a device that was wrong.
    fn awaits_the_device(&self) -> bool {
        let offered = matches!(
            self.front_node,
            XenbusState::Initialised | XenbusState::Connected
        );
        let awaited = !self.ready && (!self.wrong || matches!(self.back, BackSide::C(_)));
        self.online && awaited && offered && self.back_node == XenbusState::InitWait
    }

    /// No driver is bound to the frontend's device, and the backend would serve one.
    fn back_asks(&self) -> bool {
        self.front == FrontSide::Absent && self.back_node == XenbusState::InitWait
    }
}

/// Every world that moves and blows lead to, and the way to it.
fn reachable(start: World) -> BTreeMap<World, Option<(World, Option<Blow>)>> {
    let mut from = BTreeMap::from([(start, None)]);
    let mut todo = vec![start];
    while let Some(world) = todo.pop() {
        let moves = world.moves().into_iter().map(|next| (next, None));
        let blows = BLOWS
            .iter()
            .filter_map(|blow| Some((world.befall(*blow)?, Some(*blow))));
        for (next, blow) in moves.chain(blows) {
            if let std::collections::btree_map::Entry::Vacant(entry) = from.entry(next) {
                entry.insert(Some((world, blow)));
                todo.push(next);
            }
        }
    }
    from
}

/// Worlds from which the moves alone have been seen to end well.
#[derive(Default)]
struct Ends {
    good: BTreeSet<World>,
    path: Vec<World>,
}

impl Ends {
    /// Follows all moves from a world. An error is the path to a bad end or around a circle.
    fn follow(&mut self, world: World) -> Result<(), Vec<World>> {
        if self.good.contains(&world) {
            return Ok(());
        }
        let circle = self.path.contains(&world);
        self.path.push(world);
        let moves = world.moves();
        if circle || moves.is_empty() && !world.is_good_end() {
            return Err(self.path.clone());
        }
        for next in moves {
            self.follow(next)?;
        }
        self.path.pop();
        self.good.insert(world);
        Ok(())
    }
}

/// Searches all worlds of a pair of drivers and gives their number.
fn search(front: FrontSide, back: BackSide) -> usize {
    let worlds = reachable(World::new(front, back));
    let mut ends = Ends::default();
    for world in worlds.keys() {
        if let Err(path) = ends.follow(*world) {
            panic!("no good end:\n{}", tell(&worlds, &path));
        }
    }
    assert!(worlds
        .keys()
        .any(|world| world.in_use() && world.moves().is_empty()));
    worlds.len()
}

/// The story of a bad end.
fn tell(from: &BTreeMap<World, Option<(World, Option<Blow>)>>, path: &[World]) -> String {
    let mut lines = Vec::new();
    let mut at = path[0];
    while let Some((before, blow)) = from[&at] {
        lines.push(format!("{blow:?} -> {at:?}"));
        at = before;
    }
    lines.reverse();
    lines.extend(path.iter().skip(1).map(|world| format!("then {world:?}")));
    lines.join("\n")
}

const OUR_FRONT: FrontSide = FrontSide::Ours(Front::Waiting);
const C_FRONT: FrontSide = FrontSide::C(XenbusState::Initialising);
const OUR_BACK: BackSide = BackSide::Ours(Back::Waiting);
const C_BACK: BackSide = BackSide::C(XenbusState::InitWait);

#[test]
fn our_pair() {
    let worlds = search(OUR_FRONT, OUR_BACK);
    println!("{worlds} worlds");
    assert!(worlds > 1000);
}

#[test]
fn our_frontend_with_the_c_backend() {
    let worlds = search(OUR_FRONT, C_BACK);
    println!("{worlds} worlds");
    assert!(worlds > 1000);
}

#[test]
fn the_c_frontend_with_our_backend() {
    let worlds = search(C_FRONT, OUR_BACK);
    println!("{worlds} worlds");
    assert!(worlds > 100);
}
