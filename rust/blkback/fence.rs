// SPDX-License-Identifier: GPL-2.0-only

//! Barriers, which order the requests of all rings of a disk.
//!
//! What was taken from any ring before a barrier ends before it, and nothing is taken from any ring
//! until the barrier has ended. What a frontend puts into one ring and what it puts into another has
//! no order before the backend takes it, so it is the taking that counts.
//!
//! The queue that has taken a barrier *raises* the fence. The others see that, take nothing more,
//! and *arrive* when nothing of theirs is in flight. Then the barrier runs, and its queue *lowers*
//! the fence. A queue that has a barrier of its own meanwhile waits for its turn, and counts as
//! arrived.
//!
//! A queue leaves when its thread ends, so that nobody waits for it.

use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

use crate::inbox::Inbox;

/// The fence of a disk's connection.
#[pin_data]
pub(crate) struct Fence {
    /// Some queue has a barrier. A copy of what `queues` says, to be looked at for each request; who
    /// sees it late is waited for.
    raised: Atomic<bool>,
    #[pin]
    queues: Mutex<Queues>,
}

/// The queues of a connection.
struct Queues {
    /// The queue whose turn it is.
    owner: Option<u32>,
    all: KVec<Place>,
}

/// What the fence knows of a queue.
struct Place {
    index: u32,
    inbox: Arc<Inbox>,
    arrived: bool,
}

impl Queues {
    /// Whether all queues but the owner have arrived.
    fn clear(&self) -> bool {
        self.all
            .iter()
            .all(|place| place.arrived || self.owner == Some(place.index))
    }

    /// Lets a queue arrive, and tells the owner if it was the last one.
    fn arrive(&mut self, index: u32) {
        let mut here = self.all.iter_mut().filter(|place| place.index == index);
        if here.all(|place| core::mem::replace(&mut place.arrived, true)) {
            return;
        }
        if self.clear() {
            self.nudge(|place| self.owner == Some(place.index));
        }
    }

    fn nudge(&self, who: impl Fn(&Place) -> bool) {
        let them = self.all.iter().filter(|place| who(place));
        them.for_each(|place| place.inbox.nudge());
    }
}

impl Fence {
    pub(crate) fn new() -> impl PinInit<Self> {
        let queues = Queues {
            owner: None,
            all: KVec::new(),
        };
        pin_init!(Self {
            raised: Atomic::new(false),
            queues <- new_mutex!(queues),
        })
    }

    /// Gives the turn to a queue, or to none.
    fn turn(&self, queues: &mut Queues, owner: Option<u32>) {
        queues.owner = owner;
        self.raised.store(owner.is_some(), Relaxed);
        queues
            .all
            .iter_mut()
            .for_each(|place| place.arrived = false);
        queues.nudge(|place| owner != Some(place.index));
    }
}

/// The place of a queue at the fence. Dropping it leaves.
pub(crate) struct Post {
    fence: Arc<Fence>,
    index: u32,
}

impl Post {
    /// For the queue with that number, which is told over its inbox when there is something to do.
    pub(crate) fn new(fence: &Arc<Fence>, index: u32, inbox: &Arc<Inbox>) -> Result<Self> {
        let place = Place {
            index,
            inbox: inbox.clone(),
            arrived: false,
        };
        fence.queues.lock().all.push(place, GFP_KERNEL)?;
        Ok(Self {
            fence: fence.clone(),
            index,
        })
    }

    /// Whether some queue has a barrier, so that nothing may be taken.
    #[inline]
    pub(crate) fn is_raised(&self) -> bool {
        self.fence.raised.load(Relaxed)
    }

    /// This queue has nothing in flight, and takes nothing while the fence is raised.
    pub(crate) fn arrive(&self) {
        let mut queues = self.fence.queues.lock();
        if queues.owner.is_some() {
            queues.arrive(self.index);
        }
    }

    /// This queue has a barrier, and `idle` if nothing else of it is in flight. Whether the barrier
    /// may run now; if not, the queue is told when to ask again.
    pub(crate) fn may_run(&self, idle: bool) -> bool {
        let mut queues = self.fence.queues.lock();
        if queues.owner.is_none() {
            self.fence.turn(&mut queues, Some(self.index));
        }
        let own = queues.owner == Some(self.index);
        if idle && !own {
            queues.arrive(self.index);
        }
        idle && own && queues.clear()
    }

    /// The barrier of this queue has ended.
    pub(crate) fn lower(&self) {
        self.fence.turn(&mut self.fence.queues.lock(), None);
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        let mut queues = self.fence.queues.lock();
        queues.all.retain(|place| place.index != self.index);
        if queues.owner == Some(self.index) {
            self.fence.turn(&mut queues, None);
        } else if queues.clear() {
            queues.nudge(|place| queues.owner == Some(place.index));
        }
    }
}
