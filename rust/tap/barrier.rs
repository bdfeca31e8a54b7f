// SPDX-License-Identifier: GPL-2.0-only

//! Barriers, which order the requests of all rings of a disk.
//!
//! Requests that were taken from any ring before a barrier complete before it, and no request is
//! taken from any ring until it has completed. Requests in different rings have no order until the
//! backend takes them.
//!
//! The queue that has taken a barrier *closes* the gate. The others take no more requests, and are
//! *drained* when they have none in flight. Then the barrier is executed, and its queue *opens*
//! the gate. A queue that has taken a barrier meanwhile waits for its turn and counts as drained.
//! A queue leaves when its thread ends, so that no queue waits for it.

use crate::wakeup::Wakeup;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

/// The gate of a connection.
#[derive(Default)]
pub(crate) struct BarrierGate {
    /// A queue has a barrier. A copy of `members.owner.is_some()` that is read for each request.
    /// The barrier waits for a queue that sees it late.
    closed: AtomicBool,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    /// The queue whose barrier is next.
    owner: Option<u32>,
    all: Vec<Member>,
}

struct Member {
    index: u32,
    wakeup: Arc<Wakeup>,
    drained: bool,
}

impl Members {
    /// Returns `true` if all queues but the owner are drained.
    fn all_drained(&self) -> bool {
        self.all
            .iter()
            .all(|member| member.drained || self.owner == Some(member.index))
    }

    /// Marks a queue drained, and wakes the owner if it was the last one.
    fn set_drained(&mut self, index: u32) {
        let mut own = self.all.iter_mut().filter(|member| member.index == index);
        if own.all(|member| std::mem::replace(&mut member.drained, true)) {
            return;
        }
        if self.all_drained() {
            self.wake(|member| self.owner == Some(member.index));
        }
    }

    fn wake(&self, which: impl Fn(&Member) -> bool) {
        let woken = self.all.iter().filter(|member| which(member));
        woken.for_each(|member| member.wakeup.set());
    }
}

impl BarrierGate {
    fn lock(&self) -> MutexGuard<'_, Members> {
        // The members are valid between any two statements that change them.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_owner(&self, members: &mut Members, owner: Option<u32>) {
        members.owner = owner;
        self.closed.store(owner.is_some(), Relaxed);
        members
            .all
            .iter_mut()
            .for_each(|member| member.drained = false);
        members.wake(|member| owner != Some(member.index));
    }
}

/// A queue at the gate. Dropping it leaves.
pub(crate) struct GateMember {
    gate: Arc<BarrierGate>,
    index: u32,
}

impl GateMember {
    pub(crate) fn new(gate: &Arc<BarrierGate>, index: u32, wakeup: &Arc<Wakeup>) -> Self {
        gate.lock().all.push(Member {
            index,
            wakeup: wakeup.clone(),
            drained: false,
        });
        Self {
            gate: gate.clone(),
            index,
        }
    }

    /// Returns `true` if a queue has a barrier, so that no request may be taken.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.gate.closed.load(Relaxed)
    }

    /// Marks this queue drained if the gate is closed: it has nothing in flight, and takes no
    /// request.
    pub(crate) fn set_drained(&self) {
        let mut members = self.gate.lock();
        if members.owner.is_some() {
            members.set_drained(self.index);
        }
    }

    /// Returns `true` if the barrier of this queue may be executed now. If not, the queue is woken
    /// when it has to call this again. `idle`: the queue has nothing else in flight.
    pub(crate) fn may_run(&self, idle: bool) -> bool {
        let mut members = self.gate.lock();
        if members.owner.is_none() {
            self.gate.set_owner(&mut members, Some(self.index));
        }
        let own = members.owner == Some(self.index);
        if idle && !own {
            members.set_drained(self.index);
        }
        idle && own && members.all_drained()
    }

    /// Opens the gate: the barrier of this queue has completed.
    pub(crate) fn open(&self) {
        self.gate.set_owner(&mut self.gate.lock(), None);
    }
}

impl Drop for GateMember {
    fn drop(&mut self) {
        let mut members = self.gate.lock();
        members.all.retain(|member| member.index != self.index);
        if members.owner == Some(self.index) {
            self.gate.set_owner(&mut members, None);
        } else if members.all_drained() {
            members.wake(|member| members.owner == Some(member.index));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_waits_for_all_queues() {
        let gate = Arc::new(BarrierGate::default());
        let wakeup = || Arc::new(Wakeup::new().unwrap());
        let queues: Vec<_> = (0..3)
            .map(|index| GateMember::new(&gate, index, &wakeup()))
            .collect();
        assert!(!queues[0].is_closed());
        assert!(!queues[0].may_run(true));
        assert!(queues[2].is_closed());
        queues[1].set_drained();
        assert!(!queues[0].may_run(true));
        // Its own barrier comes second.
        assert!(!queues[2].may_run(true));
        assert!(!queues[0].may_run(false));
        assert!(queues[0].may_run(true));
        queues[0].open();
        assert!(!queues[2].may_run(true));
        queues[0].set_drained();
        queues[1].set_drained();
        assert!(queues[2].may_run(true));
        queues[2].open();
        assert!(!queues[1].is_closed());
    }

    #[test]
    fn a_queue_that_has_ended_is_not_waited_for() {
        let gate = Arc::new(BarrierGate::default());
        let wakeup = || Arc::new(Wakeup::new().unwrap());
        let first = GateMember::new(&gate, 0, &wakeup());
        let second = GateMember::new(&gate, 1, &wakeup());
        assert!(!first.may_run(true));
        drop(second);
        assert!(first.may_run(true));
        drop(first);
        assert!(!gate.closed.load(Relaxed));
    }
}
