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

use crate::events::QueueEvents;

/// The fence of a disk's connection.
#[pin_data]
pub(crate) struct BarrierGate {
    /// Some queue has a barrier. A copy of what `queues` says, to be looked at for each request; who
    /// sees it late is waited for.
    closed: Atomic<bool>,
    #[pin]
    queues: Mutex<Queues>,
}

/// The queues of a connection.
struct Queues {
    /// The queue whose turn it is.
    owner: Option<u32>,
    members: KVec<Member>,
}

/// What the fence knows of a queue.
struct Member {
    index: u32,
    events: Arc<QueueEvents>,
    quiesced: bool,
}

impl Queues {
    /// Whether all queues but the owner have arrived.
    fn all_quiesced(&self) -> bool {
        self.members
            .iter()
            .all(|member| member.quiesced || self.owner == Some(member.index))
    }

    /// Lets a queue arrive, and tells the owner if it was the last one.
    fn set_quiesced(&mut self, index: u32) {
        let mut here = self
            .members
            .iter_mut()
            .filter(|member| member.index == index);
        if here.all(|member| core::mem::replace(&mut member.quiesced, true)) {
            return;
        }
        if self.all_quiesced() {
            self.kick(|member| self.owner == Some(member.index));
        }
    }

    fn kick(&self, who: impl Fn(&Member) -> bool) {
        let them = self.members.iter().filter(|member| who(member));
        them.for_each(|member| member.events.kick());
    }
}

impl BarrierGate {
    pub(crate) fn new() -> impl PinInit<Self> {
        let queues = Queues {
            owner: None,
            members: KVec::new(),
        };
        pin_init!(Self {
            closed: Atomic::new(false),
            queues <- new_mutex!(queues),
        })
    }

    /// Gives the turn to a queue, or to none.
    fn set_owner(&self, queues: &mut Queues, owner: Option<u32>) {
        queues.owner = owner;
        self.closed.store(owner.is_some(), Relaxed);
        queues
            .members
            .iter_mut()
            .for_each(|member| member.quiesced = false);
        queues.kick(|member| owner != Some(member.index));
    }
}

/// The place of a queue at the fence. Dropping it leaves.
pub(crate) struct GateMember {
    gate: Arc<BarrierGate>,
    index: u32,
}

impl GateMember {
    /// For the queue with that number, which is told over its inbox when there is something to do.
    pub(crate) fn new(
        gate: &Arc<BarrierGate>,
        index: u32,
        events: &Arc<QueueEvents>,
    ) -> Result<Self> {
        let member = Member {
            index,
            events: events.clone(),
            quiesced: false,
        };
        gate.queues.lock().members.push(member, GFP_KERNEL)?;
        Ok(Self {
            gate: gate.clone(),
            index,
        })
    }

    /// Whether some queue has a barrier, so that nothing may be taken.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.gate.closed.load(Relaxed)
    }

    /// This queue has nothing in flight, and takes nothing while the fence is raised.
    pub(crate) fn set_quiesced(&self) {
        let mut queues = self.gate.queues.lock();
        if queues.owner.is_some() {
            queues.set_quiesced(self.index);
        }
    }

    /// This queue has a barrier, and `idle` if nothing else of it is in flight. Whether the barrier
    /// may run now; if not, the queue is told when to ask again.
    pub(crate) fn may_run(&self, idle: bool) -> bool {
        let mut queues = self.gate.queues.lock();
        if queues.owner.is_none() {
            self.gate.set_owner(&mut queues, Some(self.index));
        }
        let own = queues.owner == Some(self.index);
        if idle && !own {
            queues.set_quiesced(self.index);
        }
        idle && own && queues.all_quiesced()
    }

    /// The barrier of this queue has ended.
    pub(crate) fn open(&self) {
        self.gate.set_owner(&mut self.gate.queues.lock(), None);
    }
}

impl Drop for GateMember {
    fn drop(&mut self) {
        let mut queues = self.gate.queues.lock();
        queues.members.retain(|member| member.index != self.index);
        if queues.owner == Some(self.index) {
            self.gate.set_owner(&mut queues, None);
        } else if queues.all_quiesced() {
            queues.kick(|member| queues.owner == Some(member.index));
        }
    }
}
