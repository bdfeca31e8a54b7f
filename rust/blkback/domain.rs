// SPDX-License-Identifier: GPL-2.0-only

//! Frontend domains: limits on the pages of a domain that the queues of all its disks have mapped.
//!
//! Each domain has two quotas: one for the pages of requests in flight, one for persistent grants.
//! Each queue of the domain has a *guarantee* in both, which follows from the module parameters
//! `max_buffer_pages` and `max_persistent_grants`. A quota is the sum of the guarantees, and the
//! queues reserve from it the pages that they need. So a busy queue may have more than its
//! guarantee as long as other queues do not need theirs, and the number of pages that may be mapped
//! for a domain depends only on the number of its queues, not on the disks that they belong to.
//! When a queue does not get its guarantee, a *shortage* begins: all queues are woken, and those
//! that have more than their guarantee return the rest.
//!
//! Each queue may map the pages of one request of the largest size, with those of its segments, in
//! addition to the quotas: see [`MAX_REQUEST_PAGES`](crate::disk::MAX_REQUEST_PAGES).
//!
//! # A full maptrack
//!
//! Xen limits how many pages of other domains this domain may have mapped in total (its
//! *maptrack*). When Xen refuses to map a page for that reason, [`reclaim_mappings`] suspends the
//! guarantees of all queues of all domains for a while. So each queue unmaps its unused persistent
//! grants, keeps none mapped after a request, and has no more pages in flight than one request of
//! the largest size needs. The request that could not be mapped waits and is tried again; it does
//! not fail.
//!
//! # Locking
//!
//! `DEVICES` is taken before a domain's `queues`. While either is held, memory is allocated without
//! I/O, because queue threads take both.

use kernel::{
    new_mutex,
    prelude::*,
    str::{
        CStr,
        CString, //
    },
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

use kernel_ext::{
    base::{
        global_mutex::GlobalMutex,
        jiffies::{
            self,
            msecs_to_jiffies,
            Jiffies, //
        },
        memalloc::NoioScope, //
    },
    xen::{
        xenbus,
        DomId, //
    },
};

use crate::wakeup::QueueWakeup;

/// Time for which no queue may exceed its guarantee, after a queue did not get its own or Xen
/// allowed no more mappings.
const SHORTAGE_MS: u32 = 10_000;

/// Largest number of pages that a queue adds to a quota.
const MAX_GUARANTEE: usize = 1 << 20;

/// Number of pages that are reserved or returned at a time.
const RESERVE_BATCH: usize = 64;

/// All devices that the driver is bound to, or was bound to and whose queue threads still run.
static DEVICES: GlobalMutex<KVec<Arc<DeviceEntry>>> = GlobalMutex::new(KVec::new());

/// A device in `DEVICES`.
struct DeviceEntry {
    nodename: CString,
    domain: Arc<Domain>,
    /// `true` if the driver was unbound while queue threads still wait for the disk. They will
    /// write responses into rings that the next driver of the device would use.
    orphaned: Atomic<bool>,
}

/// Registration of a device in `DEVICES`, removed when it is dropped.
pub(crate) struct DeviceRegistration(Arc<DeviceEntry>);

impl DeviceRegistration {
    /// Registers a device.
    pub(crate) fn new(xbdev: &xenbus::Device) -> Result<Self> {
        // Queue threads take the lock too, and freeing memory may need their disks.
        let _noio = NoioScope::new();
        let mut devices = DEVICES.lock();
        let id = xbdev.otherend_id();
        let known = devices.iter().find(|entry| entry.domain.id == id);
        let domain = match known {
            Some(entry) => entry.domain.clone(),
            None => Arc::pin_init(Domain::new(id), GFP_KERNEL)?,
        };
        let entry = DeviceEntry {
            nodename: CString::try_from_fmt(fmt!("{}", xbdev.nodename()))?,
            domain,
            orphaned: Atomic::new(false),
        };
        let entry = Arc::new(entry, GFP_KERNEL)?;
        devices.push(entry.clone(), GFP_KERNEL)?;
        Ok(Self(entry))
    }

    /// Returns the domain of the frontend.
    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.0.domain
    }

    /// Returns the flag that is set while queue threads run without a driver.
    pub(crate) fn orphaned(&self) -> &Atomic<bool> {
        &self.0.orphaned
    }
}

impl Drop for DeviceRegistration {
    fn drop(&mut self) {
        let mut devices = DEVICES.lock();
        devices.retain(|entry| !Arc::ptr_eq(entry, &self.0));
        if devices.is_empty() {
            // A static is not dropped when the module is unloaded, so free its memory.
            *devices = KVec::new();
        }
    }
}

/// Returns `true` if queue threads of a driver that was unbound from this device still run.
pub(crate) fn is_orphaned(nodename: &CStr) -> bool {
    let devices = DEVICES.lock();
    let mut same = devices.iter().filter(|entry| &*entry.nodename == nodename);
    same.any(|entry| entry.orphaned.load(Acquire))
}

/// Makes all queues of all domains unmap pages that they do not need to serve one request each,
/// because the maptrack is full.
///
/// Context: may sleep. Takes `DEVICES` and each domain's `queues`.
pub(crate) fn reclaim_mappings() {
    for entry in DEVICES.lock().iter() {
        entry.domain.reclaim_mappings();
    }
}

/// The domain of a frontend, shared by the queues of all its disks.
#[pin_data]
pub(crate) struct Domain {
    pub(crate) id: DomId,
    /// Quota of the pages of requests in flight.
    in_flight: PageQuota,
    /// Quota of persistent grants.
    persistent: PageQuota,
    /// The queues, which are woken when a shortage begins.
    #[pin]
    queues: Mutex<KVec<Arc<QueueWakeup>>>,
}

impl Domain {
    fn new(id: DomId) -> impl PinInit<Self> {
        pin_init!(Self {
            id,
            in_flight: PageQuota::new(),
            persistent: PageQuota::new(),
            queues <- new_mutex!(KVec::new()),
        })
    }

    /// Returns `true` during a shortage, in which each queue has to unmap its pages beyond its
    /// guarantee.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.in_flight.is_short() || self.persistent.is_short()
    }

    /// Returns the quota of a kind of pages.
    #[inline]
    fn quota(&self, kind: PageKind) -> &PageQuota {
        match kind {
            PageKind::InFlight => &self.in_flight,
            PageKind::Persistent => &self.persistent,
        }
    }

    /// Suspends the guarantees of all queues of the domain for a while, and wakes them.
    fn reclaim_mappings(&self) {
        let quotas = [&self.in_flight, &self.persistent];
        if quotas
            .into_iter()
            .fold(false, |notify, quota| quota.suspend_guarantees() || notify)
        {
            self.notify_queues();
        }
    }

    /// Wakes the queues, which then check for a shortage.
    fn notify_queues(&self) {
        self.queues
            .lock()
            .iter()
            .for_each(|wakeup| wakeup.set_pending());
    }
}

/// A queue of a domain, which is woken when a shortage begins.
///
/// Dropping it removes the queue.
pub(crate) struct ShortageSubscriber {
    domain: Arc<Domain>,
    wakeup: Arc<QueueWakeup>,
}

impl ShortageSubscriber {
    /// Adds a queue to its domain.
    pub(crate) fn new(domain: &Arc<Domain>, wakeup: &Arc<QueueWakeup>) -> Result<Self> {
        // As in `DeviceRegistration::new`.
        let _noio = NoioScope::new();
        domain.queues.lock().push(wakeup.clone(), GFP_KERNEL)?;
        Ok(Self {
            domain: domain.clone(),
            wakeup: wakeup.clone(),
        })
    }

    /// Returns `true` during a shortage, see [`Domain::is_short`].
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.domain.is_short()
    }
}

impl Drop for ShortageSubscriber {
    fn drop(&mut self) {
        let mut queues = self.domain.queues.lock();
        queues.retain(|wakeup| !Arc::ptr_eq(wakeup, &self.wakeup));
    }
}

/// A limit on the number of pages that the queues of a domain have in total.
struct PageQuota {
    /// Sum of the guarantees.
    limit: Atomic<usize>,
    /// Number of pages that the queues have reserved.
    reserved: Atomic<usize>,
    /// Time until which a shortage lasts.
    short_until: Atomic<Jiffies>,
    /// Time until which no queue has a guarantee.
    suspended_until: Atomic<Jiffies>,
}

impl PageQuota {
    fn new() -> Self {
        Self {
            limit: Atomic::new(0),
            reserved: Atomic::new(0),
            short_until: Atomic::new(jiffies::now()),
            suspended_until: Atomic::new(jiffies::now()),
        }
    }

    fn is_short(&self) -> bool {
        !jiffies::is_past(self.short_until.load(Relaxed))
    }

    /// Returns `true` if no queue has a guarantee now.
    ///
    /// There is a shortage then, too.
    fn guarantees_suspended(&self) -> bool {
        !jiffies::is_past(self.suspended_until.load(Relaxed))
    }

    /// Reserves pages, if there are enough left.
    fn try_reserve(&self, pages: usize) -> bool {
        let limit = self.limit.load(Relaxed);
        let mut reserved = self.reserved.load(Relaxed);
        loop {
            let sum = reserved.wrapping_add(pages);
            if sum > limit {
                return false;
            }
            // An attempt that fails changes nothing, so it takes no pages from another queue.
            match self.reserved.cmpxchg(reserved, sum, Relaxed) {
                Ok(_) => return true,
                Err(found) => reserved = found,
            }
        }
    }

    /// Begins or extends a shortage, because a queue did not get its guarantee.
    ///
    /// Returns `true` if the queues have to be woken.
    fn mark_exhausted(&self) -> bool {
        extend_shortage(&self.short_until)
    }

    /// Suspends the guarantees for a while.
    ///
    /// Returns `true` if the queues have to be woken.
    fn suspend_guarantees(&self) -> bool {
        self.mark_exhausted();
        extend_shortage(&self.suspended_until)
    }
}

/// Sets the end of a shortage to [`SHORTAGE_MS`] from now.
///
/// Returns `true` if the queues have to be woken. That is not necessary while more than half of the
/// time of an earlier shortage is left, for which they were woken already.
fn extend_shortage(until: &Atomic<Jiffies>) -> bool {
    let half = msecs_to_jiffies(SHORTAGE_MS / 2);
    let known = !jiffies::is_past(until.load(Relaxed).wrapping_sub(half));
    let end = jiffies::now().wrapping_add(msecs_to_jiffies(SHORTAGE_MS));
    until.store(end, Relaxed);
    !known
}

/// A kind of pages that has a quota of its own.
#[derive(Clone, Copy)]
pub(crate) enum PageKind {
    /// Pages of requests in flight.
    InFlight,
    /// Persistent grants.
    Persistent,
}

/// A queue's share of a quota.
pub(crate) struct QuotaShare {
    domain: Arc<Domain>,
    kind: PageKind,
    /// Pages that the queue has added to the quota.
    guarantee: usize,
    /// Pages that the queue has reserved.
    reserved: usize,
}

impl QuotaShare {
    /// Creates the share of a queue that adds `guarantee` pages.
    pub(crate) fn new(domain: &Arc<Domain>, kind: PageKind, guarantee: usize) -> Self {
        let guarantee = guarantee.min(MAX_GUARANTEE);
        domain.quota(kind).limit.fetch_add(guarantee, Relaxed);
        Self {
            domain: domain.clone(),
            kind,
            guarantee,
            reserved: 0,
        }
    }

    #[inline]
    fn quota(&self) -> &PageQuota {
        self.domain.quota(self.kind)
    }

    /// Returns the number of pages that the queue is guaranteed now.
    fn guaranteed(&self) -> usize {
        if self.quota().guarantees_suspended() {
            0
        } else {
            self.guarantee
        }
    }

    /// Reserves pages so that the queue has `pages` in total.
    ///
    /// Returns `true` if it has them.
    #[inline]
    pub(crate) fn try_reserve(&mut self, pages: usize) -> bool {
        pages <= self.reserved || self.grow(pages)
    }

    fn grow(&mut self, pages: usize) -> bool {
        let quota = self.quota();
        let beyond = pages > self.guaranteed();
        if beyond && quota.is_short() {
            return false;
        }
        let missing = pages.saturating_sub(self.reserved);
        let step = if quota.is_short() {
            missing
        } else {
            missing.next_multiple_of(RESERVE_BATCH)
        };
        let mut sizes = [step, missing].into_iter();
        match sizes.find(|pages| quota.try_reserve(*pages)) {
            Some(more) => {
                self.reserved = self.reserved.wrapping_add(more);
                true
            }
            None => {
                if !beyond && quota.mark_exhausted() {
                    self.domain.notify_queues();
                }
                false
            }
        }
    }

    /// Returns the number of its `pages` that the queue has to unmap, because other queues of the
    /// domain need them.
    ///
    /// Gives reserved pages that are not used back to the quota.
    pub(crate) fn over_guarantee(&mut self, pages: usize) -> usize {
        if !self.quota().is_short() {
            return 0;
        }
        let guaranteed = self.guaranteed();
        if self.reserved <= guaranteed {
            return 0;
        }
        self.shrink(pages.max(guaranteed));
        pages.saturating_sub(guaranteed)
    }

    /// Gives the reserved pages beyond `pages` back to the quota, if there are at least
    /// [`RESERVE_BATCH`].
    #[inline]
    pub(crate) fn trim(&mut self, pages: usize) {
        if self.reserved.saturating_sub(pages) >= RESERVE_BATCH {
            self.shrink(pages);
        }
    }

    fn shrink(&mut self, pages: usize) {
        let unused = self.reserved.saturating_sub(pages);
        self.quota().reserved.fetch_sub(unused, Relaxed);
        self.reserved = self.reserved.wrapping_sub(unused);
    }
}

impl Drop for QuotaShare {
    fn drop(&mut self) {
        let quota = self.quota();
        quota.reserved.fetch_sub(self.reserved, Relaxed);
        quota.limit.fetch_sub(self.guarantee, Relaxed);
    }
}
