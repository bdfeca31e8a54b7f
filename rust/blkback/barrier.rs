// SPDX-License-Identifier: GPL-2.0-only

//! Barriers, which order the requests of all rings of a disk.
//!
//! All requests that were taken from any ring before a barrier complete before it, and none is
//! taken from any ring until the barrier has completed. Requests in different rings have no order
//! before the backend takes them, so the order in which they are taken counts. `xen-blkback` drains
//! one ring only (`xen_blk_drain_io()`).
//!
//! A [`BarrierGate`] does this. The queue that has taken a barrier *closes* the gate. The other
//! queues see that, take no more requests, and are *drained* once they have none in flight. Then
//! the barrier runs; when it has completed, its queue *opens* the gate. A queue that gets a barrier
//! of its own meanwhile counts as drained, and closes the gate for its own barrier when it is open
//! again.
//!
//! A queue is removed from the gate when its thread ends, so that no other queue waits for it.

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

use crate::wakeup::QueueWakeup;

/// The barrier gate of a connection.
#[pin_data]
pub(crate) struct BarrierGate {
    /// `true` if a queue has a barrier: a copy of `queues.owner.is_some()` for the check before
    /// each request. A queue that sees a new value late takes a few more requests, and the barrier
    /// waits for these.
    closed: Atomic<bool>,
    #[pin]
    queues: Mutex<Queues>,
}

/// The queues of a connection.
struct Queues {
    /// The queue whose barrier waits or runs.
    owner: Option<u32>,
    members: KVec<Member>,
}

/// The gate's record of a queue.
struct Member {
    index: u32,
    wakeup: Arc<QueueWakeup>,
    drained: bool,
}

impl Queues {
    /// Returns `true` if all queues but the owner are drained.
    fn all_drained(&self) -> bool {
        self.members
            .iter()
            .all(|member| member.drained || self.owner == Some(member.index))
    }

    /// Marks a queue as drained, and wakes the owner if it was the last one.
    fn set_drained(&mut self, index: u32) {
        let mut here = self
            .members
            .iter_mut()
            .filter(|member| member.index == index);
        if here.all(|member| core::mem::replace(&mut member.drained, true)) {
            return;
        }
        if self.all_drained() {
            self.wake(|member| self.owner == Some(member.index));
        }
    }

    fn wake(&self, which: impl Fn(&Member) -> bool) {
        let members = self.members.iter().filter(|member| which(member));
        members.for_each(|member| member.wakeup.set_pending());
    }
}

impl BarrierGate {
    /// Creates an open gate without members.
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

    /// Sets the owner, and wakes the other queues.
    ///
    /// A queue as the owner closes the gate, `None` opens it.
    fn set_owner(&self, queues: &mut Queues, owner: Option<u32>) {
        queues.owner = owner;
        self.closed.store(owner.is_some(), Relaxed);
        queues
            .members
            .iter_mut()
            .for_each(|member| member.drained = false);
        queues.wake(|member| owner != Some(member.index));
    }
}

/// Registration of a queue with the gate.
///
/// Dropping it removes the queue.
pub(crate) struct GateMember {
    gate: Arc<BarrierGate>,
    index: u32,
}

impl GateMember {
    /// Adds the queue with this index, which is woken through `wakeup`.
    pub(crate) fn new(
        gate: &Arc<BarrierGate>,
        index: u32,
        wakeup: &Arc<QueueWakeup>,
    ) -> Result<Self> {
        let member = Member {
            index,
            wakeup: wakeup.clone(),
            drained: false,
        };
        gate.queues.lock().members.push(member, GFP_KERNEL)?;
        Ok(Self {
            gate: gate.clone(),
            index,
        })
    }

    /// Returns `true` if a queue has a barrier, so that no request may be taken.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.gate.closed.load(Relaxed)
    }

    /// Marks this queue as drained, if the gate is closed: it has no request in flight, and takes
    /// no new one.
    pub(crate) fn set_drained(&self) {
        let mut queues = self.gate.queues.lock();
        if queues.owner.is_some() {
            queues.set_drained(self.index);
        }
    }

    /// Closes the gate for the barrier of this queue, if it is open.
    ///
    /// Returns `true` if the barrier may run now; otherwise the queue is woken when it has to ask
    /// again.
    ///
    /// `idle` is `true` if the queue has no other request in flight.
    pub(crate) fn request_run(&self, idle: bool) -> bool {
        let mut queues = self.gate.queues.lock();
        if queues.owner.is_none() {
            self.gate.set_owner(&mut queues, Some(self.index));
        }
        let own = queues.owner == Some(self.index);
        if idle && !own {
            queues.set_drained(self.index);
        }
        idle && own && queues.all_drained()
    }

    /// Opens the gate, because the barrier of this queue has completed.
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
        } else if queues.all_drained() {
            queues.wake(|member| queues.owner == Some(member.index));
        }
    }
}
