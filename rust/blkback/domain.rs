// SPDX-License-Identifier: GPL-2.0-only

//! What all disks of a frontend's domain have in common: how many of its pages may be mapped.
//!
//! There are two budgets for each domain: one for the pages of requests on their way, one for pages
//! that stay mapped between requests. Each queue of the domain adds its part to both, as the module
//! parameters say, and takes from them what it needs. So a busy queue may have more than its part as
//! long as other queues do not need theirs, and a domain with many disks has no more than a domain
//! with as many queues on one disk. When a queue does not get its part, all of them are told, and
//! those who have more than theirs give the rest back.
//!
//! The budgets always leave room for one request of each queue, with the pages of its segments: see
//! [`MAX_PAGES`](crate::disk::MAX_PAGES).
//!
//! # When Xen has no mapping left
//!
//! Xen limits how many pages this domain may have mapped, of all other domains together (its
//! *maptrack*). When it refuses to map a page for that reason, [`reclaim_mappings`] is called: for a
//! while no queue of any domain is guaranteed a part of a budget. So each queue unmaps what it keeps
//! without use, keeps nothing more, and has no more under way than its largest request needs. The
//! request that was refused waits, and is tried again; it does not fail.

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

use crate::events::QueueEvents;

/// For so long after a queue did not get its part nobody gets more than its own.
const SHORTAGE_MS: u32 = 10_000;

/// What a queue adds to a budget, at most.
const MAX_GUARANTEE: usize = 1 << 20;

/// Pages that are taken and given back at once.
const RESERVE_BATCH: usize = 64;

/// Each device that the driver is bound to, or was, if its threads still run.
static DEVICES: GlobalMutex<KVec<Arc<DeviceEntry>>> = GlobalMutex::new(KVec::new());

/// The place of a device among the others.
struct DeviceEntry {
    nodename: CString,
    domain: Arc<Domain>,
    /// The driver was unbound, and threads still wait for the disk. They will answer in rings that
    /// another driver of the device would take for its own.
    orphaned: Atomic<bool>,
}

/// The seat of a device, until this is dropped.
pub(crate) struct DeviceRegistration(Arc<DeviceEntry>);

impl DeviceRegistration {
    /// Takes a seat for a device.
    pub(crate) fn new(xbdev: &xenbus::Device) -> Result<Self> {
        // The threads of queues take the lock too, and memory may have to be written to their disks.
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

    /// The domain of the frontend.
    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.0.domain
    }

    /// Whether threads still run without a driver.
    pub(crate) fn orphaned(&self) -> &Atomic<bool> {
        &self.0.orphaned
    }
}

impl Drop for DeviceRegistration {
    fn drop(&mut self) {
        let mut devices = DEVICES.lock();
        devices.retain(|entry| !Arc::ptr_eq(entry, &self.0));
        if devices.is_empty() {
            // Nobody drops a static.
            *devices = KVec::new();
        }
    }
}

/// Whether threads of a driver that was unbound from this device still run.
pub(crate) fn is_orphaned(nodename: &CStr) -> bool {
    let devices = DEVICES.lock();
    let mut same = devices.iter().filter(|entry| &*entry.nodename == nodename);
    same.any(|entry| entry.orphaned.load(Acquire))
}

/// Has all queues of all domains give up mappings that they can do without: Xen has none left.
pub(crate) fn reclaim_mappings() {
    for entry in DEVICES.lock().iter() {
        entry.domain.reclaim_mappings();
    }
}

/// The domain of a frontend, shared by the queues of all its disks.
#[pin_data]
pub(crate) struct Domain {
    pub(crate) id: DomId,
    /// Pages of requests on their way.
    pub(crate) in_flight: PageQuota,
    /// Pages that stay mapped.
    pub(crate) persistent: PageQuota,
    /// Where its queues are told of a shortage.
    #[pin]
    queues: Mutex<KVec<Arc<QueueEvents>>>,
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

    /// Whether some queue did not get its part a while ago, so that each queue has to give back what
    /// it has beyond its own.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.in_flight.is_short() || self.persistent.is_short()
    }

    /// Guarantees no queue of the domain a mapping for a while, and tells them.
    fn reclaim_mappings(&self) {
        let quotas = [&self.in_flight, &self.persistent];
        if quotas
            .into_iter()
            .fold(false, |notify, quota| quota.suspend_guarantees() || notify)
        {
            self.notify_queues();
        }
    }

    /// Has the queues look whether there is a shortage.
    fn notify_queues(&self) {
        self.queues.lock().iter().for_each(|events| events.kick());
    }
}

/// A queue of a domain that is told of shortages, until this is dropped.
pub(crate) struct ShortageSubscriber {
    domain: Arc<Domain>,
    events: Arc<QueueEvents>,
}

impl ShortageSubscriber {
    pub(crate) fn new(domain: &Arc<Domain>, events: &Arc<QueueEvents>) -> Result<Self> {
        // As for the seats.
        let _noio = NoioScope::new();
        domain.queues.lock().push(events.clone(), GFP_KERNEL)?;
        Ok(Self {
            domain: domain.clone(),
            events: events.clone(),
        })
    }

    /// See [`Domain::is_short`].
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.domain.is_short()
    }
}

impl Drop for ShortageSubscriber {
    fn drop(&mut self) {
        let mut queues = self.domain.queues.lock();
        queues.retain(|events| !Arc::ptr_eq(events, &self.events));
    }
}

/// A number of pages that the queues of a domain share.
pub(crate) struct PageQuota {
    /// The sum of their parts.
    limit: Atomic<usize>,
    /// The sum of what they have taken.
    used: Atomic<usize>,
    /// Until when it counts as used up.
    short_until: Atomic<Jiffies>,
    /// Until when no queue is guaranteed its part.
    suspended_until: Atomic<Jiffies>,
}

impl PageQuota {
    fn new() -> Self {
        Self {
            limit: Atomic::new(0),
            used: Atomic::new(0),
            short_until: Atomic::new(jiffies::now()),
            suspended_until: Atomic::new(jiffies::now()),
        }
    }

    fn is_short(&self) -> bool {
        !jiffies::is_past(self.short_until.load(Relaxed))
    }

    /// Returns `true` if no queue is guaranteed its part now. The budget is short then, too.
    fn guarantees_suspended(&self) -> bool {
        !jiffies::is_past(self.suspended_until.load(Relaxed))
    }

    /// Takes pages, if there are so many left.
    fn take(&self, pages: usize) -> bool {
        let used = self.used.fetch_add(pages, Relaxed).wrapping_add(pages);
        let enough = used <= self.limit.load(Relaxed);
        if !enough {
            self.used.fetch_sub(pages, Relaxed);
        }
        enough
    }

    /// A queue did not get its part. Whether the others have to be told.
    fn mark_exhausted(&self) -> bool {
        extend_shortage(&self.short_until)
    }

    /// Guarantees no queue its part for a while. Returns `true` if the queues have to be told.
    fn suspend_guarantees(&self) -> bool {
        self.mark_exhausted();
        extend_shortage(&self.suspended_until)
    }
}

/// Sets the end of a shortage, from now on. Returns `true` if the queues have to be told: not again
/// while they know, but well before it is over.
fn extend_shortage(until: &Atomic<Jiffies>) -> bool {
    let half = msecs_to_jiffies(SHORTAGE_MS / 2);
    let known = !jiffies::is_past(until.load(Relaxed).wrapping_sub(half));
    let end = jiffies::now().wrapping_add(msecs_to_jiffies(SHORTAGE_MS));
    until.store(end, Relaxed);
    !known
}

/// What one queue has of a budget.
pub(crate) struct QuotaShare {
    domain: Arc<Domain>,
    which: fn(&Domain) -> &PageQuota,
    /// What it has added.
    guarantee: usize,
    /// What it has taken.
    taken: usize,
}

impl QuotaShare {
    /// The share of a queue that adds `guarantee` pages.
    pub(crate) fn new(
        domain: &Arc<Domain>,
        which: fn(&Domain) -> &PageQuota,
        guarantee: usize,
    ) -> Self {
        let guarantee = guarantee.min(MAX_GUARANTEE);
        which(domain).limit.fetch_add(guarantee, Relaxed);
        Self {
            domain: domain.clone(),
            which,
            guarantee,
            taken: 0,
        }
    }

    fn quota(&self) -> &PageQuota {
        (self.which)(&self.domain)
    }

    /// Returns how many pages the queue is guaranteed now.
    fn guaranteed(&self) -> usize {
        if self.quota().guarantees_suspended() {
            0
        } else {
            self.guarantee
        }
    }

    /// Whether the queue may have so many pages; takes what is missing.
    #[inline]
    pub(crate) fn try_reserve(&mut self, pages: usize) -> bool {
        pages <= self.taken || self.grow(pages)
    }

    fn grow(&mut self, pages: usize) -> bool {
        let quota = self.quota();
        let beyond = pages > self.guaranteed();
        if beyond && quota.is_short() {
            return false;
        }
        let missing = pages.saturating_sub(self.taken);
        let step = if quota.is_short() {
            missing
        } else {
            missing.next_multiple_of(RESERVE_BATCH)
        };
        let mut sizes = [step, missing].into_iter();
        match sizes.find(|pages| quota.take(*pages)) {
            Some(taken) => {
                self.taken = self.taken.wrapping_add(taken);
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

    /// How many of its pages the queue has to give up, because others of the domain need them. Gives
    /// back what it has taken and does not use.
    pub(crate) fn over_quota(&mut self, pages: usize) -> usize {
        if !self.quota().is_short() {
            return 0;
        }
        let guaranteed = self.guaranteed();
        if self.taken <= guaranteed {
            return 0;
        }
        self.shrink(pages.max(guaranteed));
        pages.saturating_sub(guaranteed)
    }

    /// Gives back what is not needed for so many pages, if that is much.
    #[inline]
    pub(crate) fn trim(&mut self, pages: usize) {
        if self.taken.saturating_sub(pages) >= RESERVE_BATCH {
            self.shrink(pages);
        }
    }

    fn shrink(&mut self, pages: usize) {
        let spare = self.taken.saturating_sub(pages);
        self.quota().used.fetch_sub(spare, Relaxed);
        self.taken = self.taken.wrapping_sub(spare);
    }
}

impl Drop for QuotaShare {
    fn drop(&mut self) {
        let quota = self.quota();
        quota.used.fetch_sub(self.taken, Relaxed);
        quota.limit.fetch_sub(self.guarantee, Relaxed);
    }
}
