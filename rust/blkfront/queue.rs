// SPDX-License-Identifier: GPL-2.0-only

//! A queue: a ring with its shadow table and its pool of granted pages.
//!
//! This file contains the life cycle of a queue: [`Queue::set_ring`] gives it a ring,
//! [`Queue::accept_requests`] makes it accept requests, and [`Queue::disconnect`] ends the
//! connection. Requests are written to the ring in [`submit`](crate::submit), and their responses
//! are taken in [`completion`](crate::completion).
//!
//! `struct blkfront_ring_info` of `xen-blkfront.c` has this role.

use kernel::{
    cpu::CpuId,
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::spinlock_irqsave::{
        new_spinlock_irqsave,
        SpinLockIrqSave, //
    },
    block::mq::BlkStatus,
    xen::{
        events::Notifier,
        grant::GrantedPage,
        ring::RingPages,
        DomId, //
    },
};

use blkif::{
    negotiate::{
        DiscardLimits,
        Flush, //
    },
    plan::SlotLimits,
    resources::Resources,
    vdev::DiskName, //
};

use crate::{
    pending_request::PendingRequest,
    pool::Pool,
    request_data::{
        IssuedRequest,
        RequestKind, //
    },
    ring_channel::RingChannel,
    shadow::ShadowTable,
    wakeup::DeviceWakeup, //
};

/// The parameters of a connection, which change only while no request is being queued.
#[derive(Clone, Copy)]
pub(crate) struct ConnectionConfig {
    /// The backend's domain, to which pages are granted.
    pub(crate) domain: DomId,
    /// The amount of data that a slot can carry.
    pub(crate) slot_limits: SlotLimits,
    /// `true` if data is bounced.
    pub(crate) bounce: bool,
    /// Number of fragments of the largest request that the disk may have in flight: more than
    /// `slot_limits` allows if an earlier backend allowed more.
    pub(crate) largest: u16,
    /// The way to flush the disk.
    pub(crate) flush: Flush,
    /// `true` if each write is flushed before it is completed.
    pub(crate) write_through: bool,
    /// Limits of discards; `None` if the backend cannot discard.
    pub(crate) discard: Option<DiscardLimits>,
    /// Number of the connection.
    pub(crate) generation: u32,
}

impl ConnectionConfig {
    /// Returns the resources that a request of `fragments` fragments needs.
    #[inline]
    pub(crate) fn resources(&self, fragments: u32) -> Resources {
        Resources::new(self.slot_limits, self.bounce, fragments)
    }

    /// Returns the status of a request that is completed without the backend, or `None` if the
    /// backend is needed.
    ///
    /// A discard that fails was queued for an earlier connection, whose backend supported it, or
    /// before the limits were changed. With `Flush::None` the block layer sends no flush, because
    /// the disk never had a write cache. With `Flush::Unavailable` all flushes fail, new ones too.
    #[inline]
    pub(crate) fn complete_locally(&self, kind: RequestKind) -> Option<BlkStatus> {
        match kind {
            RequestKind::Transfer(_) => None,
            RequestKind::Flush => match self.flush {
                // A disk that never had a cache has nothing to flush.
                Flush::None => Some(BlkStatus::OK),
                Flush::Unavailable => Some(BlkStatus::IOERR),
                Flush::Cache | Flush::Barrier => None,
            },
            RequestKind::Discard { secure } => match self.discard {
                Some(discard) if discard.secure || !secure => None,
                // A backend might treat a secure discard as an ordinary one.
                _ => Some(BlkStatus::NOTSUPP),
            },
        }
    }
}

/// State of a queue.
#[derive(Clone, Copy)]
pub(crate) enum QueueState {
    /// There is no connection now. If there is a disk, the block layer's queue is quiesced.
    Disconnected,
    /// Requests are sent to the backend.
    Connected(ConnectionConfig),
    /// There will be no other connection: requests fail.
    Removed,
}

/// The part of a queue that its lock protects.
pub(crate) struct Inner {
    pub(crate) state: QueueState,
    pub(crate) ring_channel: Option<RingChannel<Queue>>,
    pub(crate) shadow: ShadowTable,
    /// Completed requests of which the backend still has pages mapped.
    pub(crate) completed_granted: KVVec<PendingRequest>,
    pub(crate) pool: Pool,
    /// `true` if the backend violated the protocol: its responses are ignored.
    pub(crate) broken: bool,
    /// `true` if flushes were written to the ring and are not published yet.
    pub(crate) unpublished_flushes: bool,
    /// Grants of the last connection that have not ended.
    stale: Option<StaleGrants>,
}

/// Memory that the backend of a closed connection may still have mapped: the ring, and the pages of
/// the pool and of the requests that were in flight.
///
/// A page that is still mapped could be left to the kernel, which tries to end ten deferred grants
/// per second (`gnttab_handle_deferred()`). But then a backend that never unmaps could hold the
/// memory of any number of connections. So a queue has the stale grants of at most one connection,
/// and there is no new connection before they have ended.
struct StaleGrants {
    ring: RingPages,
    pool: Pool,
}

/// A queue: a ring with its shadow table and its pool.
#[pin_data]
pub(crate) struct Queue {
    /// Name of the disk.
    pub(crate) name: DiskName,
    /// Number of the queue.
    pub(crate) index: u16,
    /// Handle of the device, which each request contains.
    pub(crate) handle: u16,
    /// Wakes the device worker.
    pub(crate) wakeup: Arc<DeviceWakeup>,
    #[pin]
    pub(crate) inner: SpinLockIrqSave<Inner>,
}

/// Result of trimming a pool.
#[derive(Clone, Copy, Default)]
pub(crate) struct PoolTrim {
    /// `true` if pages were freed.
    pub(crate) freed: bool,
    /// `true` if the pool still has more pages than its minimum.
    pub(crate) grown: bool,
}

impl PoolTrim {
    /// Combines the results of trimming two pools.
    pub(crate) fn combine(self, other: Self) -> Self {
        Self {
            freed: self.freed || other.freed,
            grown: self.grown || other.grown,
        }
    }
}

impl Inner {
    /// Publishes the requests that were written to the ring.
    ///
    /// Returns the notifier if the backend has to be notified, which is done without the lock.
    pub(crate) fn publish(&mut self) -> Option<Notifier> {
        let ring_channel = self.ring_channel.as_mut()?;
        ring_channel.ring.publish().then_some(ring_channel.notifier)
    }

    /// Publishes flushes that were written while responses were taken, like [`Self::publish`].
    pub(crate) fn publish_flushes(&mut self) -> Option<Notifier> {
        if !core::mem::take(&mut self.unpublished_flushes) {
            return None;
        }
        self.publish()
    }

    /// Returns `true` if there is a connection, and the domain was not restored since it was made.
    pub(crate) fn is_open(&self) -> bool {
        (self.ring_channel.as_ref()).is_some_and(RingChannel::is_open)
    }

    /// Takes a pending request.
    ///
    /// Pages that the backend of its connection may have mapped are added to the stale grants.
    fn take_pending(&mut self) -> Option<PendingRequest> {
        let granted = self.completed_granted.pop();
        let mut pending = granted.or_else(|| self.shadow.take_pending())?;
        self.stash_pages(&mut pending.issued.data_mut().indirect_pages);
        if let IssuedRequest::Bounced(rq) = &mut pending.issued {
            self.stash_pages(&mut rq.data_mut().bounce_pages);
        }
        Some(pending)
    }

    /// Adds pages of a closed connection to the stale grants, or frees them if there are no stale
    /// grants.
    pub(crate) fn stash_pages(&mut self, pages: &mut KVec<GrantedPage>) {
        match &mut self.stale {
            Some(stale) => stale.pool.put(pages),
            None => pages.clear(),
        }
    }
}

impl Queue {
    /// Creates a queue without a ring.
    pub(crate) fn new(
        name: DiskName,
        index: u16,
        handle: u16,
        wakeup: Arc<DeviceWakeup>,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                name,
                index,
                handle,
                wakeup,
                inner <- new_spinlock_irqsave!(Inner {
                    state: QueueState::Disconnected,
                    ring_channel: None,
                    shadow: ShadowTable::empty(),
                    completed_granted: KVVec::new(),
                    pool: Pool::empty(),
                    broken: false,
                    unpublished_flushes: false,
                    stale: None,
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Gives the queue a ring.
    ///
    /// The queue must have no requests.
    ///
    /// Context: may sleep.
    pub(crate) fn set_ring(&self, ring_channel: RingChannel<Self>) -> Result {
        let epoch = self.inner.lock().shadow.epoch();
        let capacity = ring_channel.ring.capacity();
        let shadow = ShadowTable::new(capacity as u16, epoch)?;
        let completed_granted = KVVec::with_capacity(capacity as usize, GFP_KERNEL)?;

        // The old values are freed without the lock.
        let _old = {
            let mut inner = self.inner.lock();
            inner.broken = false;
            (
                core::mem::replace(&mut inner.shadow, shadow),
                core::mem::replace(&mut inner.completed_granted, completed_granted),
                inner.ring_channel.replace(ring_channel),
            )
        };
        Ok(())
    }

    /// Makes the queue accept requests.
    ///
    /// Context: may sleep.
    pub(crate) fn accept_requests(&self, config: ConnectionConfig) -> Result {
        let largest = config.resources(config.largest.into());
        let min = largest.pages();
        let capacity = self.inner.lock().shadow.capacity();
        let pool = Pool::new(config.domain, min, min.saturating_mul(capacity))?;

        let _old = {
            let mut inner = self.inner.lock();
            inner.state = QueueState::Connected(config);
            core::mem::replace(&mut inner.pool, pool)
        };
        Ok(())
    }

    /// Ends the connection: closes the event channel and passes the requests that wait for
    /// responses to `dispose`.
    ///
    /// The block layer's queue must be quiesced.
    ///
    /// The ring and the pages of the pool stay granted until [`Self::end_stale_grants`] or
    /// [`Self::free_stale_grants`]. If `dead`, requests fail from now on.
    ///
    /// Context: may sleep.
    pub(crate) fn disconnect(&self, dead: bool, mut dispose: impl FnMut(PendingRequest)) {
        let ring_channel = {
            let mut inner = self.inner.lock();
            inner.state = if dead {
                QueueState::Removed
            } else {
                QueueState::Disconnected
            };
            inner.ring_channel.take()
        };
        if let Some(ring_channel) = ring_channel {
            // This waits for the event handler, which no longer finds a ring.
            self.stash_stale(ring_channel.disconnect());
        }
        loop {
            // A statement of its own: the lock is not held while the request ends.
            let Some(pending) = self.inner.lock().take_pending() else {
                break;
            };
            dispose(pending);
        }
    }

    /// Stores the memory that the backend may have mapped.
    fn stash_stale(&self, ring: RingPages) {
        let _old = {
            let mut inner = self.inner.lock();
            let pool = core::mem::replace(&mut inner.pool, Pool::empty());
            inner.stale.replace(StaleGrants { ring, pool })
        };
    }

    /// Ends the grants of the last connection whose pages the backend has unmapped.
    ///
    /// Returns `true` if none is left.
    ///
    /// Context: may sleep.
    pub(crate) fn end_stale_grants(&self) -> bool {
        self.end_stale_pages() && self.end_stale_ring()
    }

    /// Frees the stale pages that the backend does not use.
    ///
    /// Returns `true` if none is left.
    fn end_stale_pages(&self) -> bool {
        loop {
            let pages = match &mut self.inner.lock().stale {
                Some(stale) => stale.pool.take_batch(),
                None => return true,
            };
            let (mut freed, mut used) = (false, false);
            for page in pages.into_iter().flatten() {
                match page.try_end() {
                    Ok(_page) => freed = true,
                    Err(page) => {
                        used = true;
                        if let Some(stale) = &mut self.inner.lock().stale {
                            stale.pool.put_back(page);
                        }
                    }
                }
            }
            if used || !freed {
                return !used;
            }
        }
    }

    /// Frees the stale ring.
    ///
    /// Returns `false` if the backend still uses it.
    fn end_stale_ring(&self) -> bool {
        let ended = {
            let mut inner = self.inner.lock();
            let mut stale = inner.stale.as_mut();
            if stale.as_mut().is_some_and(|stale| !stale.ring.try_end()) {
                return false;
            }
            inner.stale.take()
        };
        drop(ended);
        true
    }

    /// Drops the stale grants.
    ///
    /// The kernel frees each page when the backend has unmapped it.
    ///
    /// Context: may sleep.
    pub(crate) fn free_stale_grants(&self) {
        let stale = self.inner.lock().stale.take();
        drop(stale);
    }

    /// Returns `true` if there are stale grants.
    pub(crate) fn has_stale_grants(&self) -> bool {
        self.inner.lock().stale.is_some()
    }

    /// Frees pages of the pool that have been idle since the last call, unless the backend has them
    /// mapped.
    ///
    /// Context: any.
    pub(crate) fn trim_pool(&self) -> PoolTrim {
        let mut freed = false;
        loop {
            let pages = self.inner.lock().pool.take_idle();
            let mut freed_some = false;
            for page in pages.into_iter().flatten() {
                match page.try_end() {
                    Ok(_page) => freed_some = true,
                    Err(page) => self.inner.lock().pool.put_back(page),
                }
            }
            freed |= freed_some;
            if !freed_some {
                break;
            }
        }
        let grown = self.inner.lock().pool.restart_watermark();
        PoolTrim { freed, grown }
    }

    /// Frees the pages of the pool beyond its minimum, idle or not, unless the backend has them
    /// mapped.
    pub(crate) fn trim_unused(&self) {
        self.inner.lock().pool.restart_watermark();
        self.trim_pool();
    }

    /// Binds the event channel to a CPU, if that is possible.
    ///
    /// Context: may sleep.
    pub(crate) fn set_event_cpu(&self, cpu: CpuId) {
        let channel = (self.inner.lock().ring_channel.as_ref())
            .map(|ring_channel| ring_channel.channel.clone());
        if let Some(channel) = channel {
            let _ = channel.set_affinity(cpu);
        }
    }

    /// Returns the number of slots of the ring.
    pub(crate) fn capacity(&self) -> usize {
        self.inner.lock().shadow.capacity()
    }

    /// Returns `true` if no request waits for a response or is being prepared.
    pub(crate) fn is_idle(&self) -> bool {
        self.inner.lock().shadow.is_idle()
    }

    /// Returns a number that grows with the responses, see [`ShadowTable::responses`].
    pub(crate) fn responses(&self) -> u32 {
        self.inner.lock().shadow.responses()
    }

    /// Returns `true` if the backend violated the protocol.
    pub(crate) fn is_broken(&self) -> bool {
        self.inner.lock().broken
    }
}
