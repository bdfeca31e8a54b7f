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
//! *maptrack*). When it refuses to map a page for that reason, [`share_mappings`] is called: for a
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
        noio::Noio, //
    },
    xen::{
        xenbus::Device,
        DomId, //
    },
};

use crate::inbox::Inbox;

/// For so long after a queue did not get its part nobody gets more than its own.
const SHORTAGE_MS: u32 = 10_000;

/// What a queue adds to a budget, at most.
const MAX_PART: usize = 1 << 20;

/// Pages that are taken and given back at once.
const STEP: usize = 64;

/// Each device that the driver is bound to, or was, if its threads still run.
static SEATS: GlobalMutex<KVec<Arc<Seat>>> = GlobalMutex::new(KVec::new());

/// The place of a device among the others.
struct Seat {
    device: CString,
    domain: Arc<Domain>,
    /// The driver was unbound, and threads still wait for the disk. They will answer in rings that
    /// another driver of the device would take for its own.
    left_alone: Atomic<bool>,
}

/// The seat of a device, until this is dropped.
pub(crate) struct Seated(Arc<Seat>);

impl Seated {
    /// Takes a seat for a device.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        // The threads of queues take the lock too, and memory may have to be written to their disks.
        let _noio = Noio::new();
        let mut seats = SEATS.lock();
        let id = device.otherend_id();
        let known = seats.iter().find(|seat| seat.domain.id == id);
        let domain = match known {
            Some(seat) => seat.domain.clone(),
            None => Arc::pin_init(Domain::new(id), GFP_KERNEL)?,
        };
        let seat = Seat {
            device: CString::try_from_fmt(fmt!("{}", device.nodename()))?,
            domain,
            left_alone: Atomic::new(false),
        };
        let seat = Arc::new(seat, GFP_KERNEL)?;
        seats.push(seat.clone(), GFP_KERNEL)?;
        Ok(Self(seat))
    }

    /// The domain of the frontend.
    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.0.domain
    }

    /// Whether threads still run without a driver.
    pub(crate) fn left_alone(&self) -> &Atomic<bool> {
        &self.0.left_alone
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        let mut seats = SEATS.lock();
        seats.retain(|seat| !Arc::ptr_eq(seat, &self.0));
        if seats.is_empty() {
            // Nobody drops a static.
            *seats = KVec::new();
        }
    }
}

/// Whether threads of a driver that was unbound from this device still run.
pub(crate) fn is_left_alone(device: &CStr) -> bool {
    let seats = SEATS.lock();
    let mut same = seats.iter().filter(|seat| &*seat.device == device);
    same.any(|seat| seat.left_alone.load(Acquire))
}

/// Has all queues of all domains give up mappings that they can do without: Xen has none left.
pub(crate) fn share_mappings() {
    for seat in SEATS.lock().iter() {
        seat.domain.share_mappings();
    }
}

/// The domain of a frontend, shared by the queues of all its disks.
#[pin_data]
pub(crate) struct Domain {
    pub(crate) id: DomId,
    /// Pages of requests on their way.
    pub(crate) moving: Budget,
    /// Pages that stay mapped.
    pub(crate) staying: Budget,
    /// Where its queues are told of a shortage.
    #[pin]
    inboxes: Mutex<KVec<Arc<Inbox>>>,
}

impl Domain {
    fn new(id: DomId) -> impl PinInit<Self> {
        pin_init!(Self {
            id,
            moving: Budget::new(),
            staying: Budget::new(),
            inboxes <- new_mutex!(KVec::new()),
        })
    }

    /// Whether some queue did not get its part a while ago, so that each queue has to give back what
    /// it has beyond its own.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.moving.is_short() || self.staying.is_short()
    }

    /// Guarantees no queue of the domain a mapping for a while, and tells them.
    fn share_mappings(&self) {
        let budgets = [&self.moving, &self.staying];
        if budgets
            .into_iter()
            .fold(false, |tell, budget| budget.withhold() || tell)
        {
            self.tell();
        }
    }

    /// Has the queues look whether there is a shortage.
    fn tell(&self) {
        self.inboxes.lock().iter().for_each(|inbox| inbox.nudge());
    }
}

/// A queue of a domain that is told of shortages, until this is dropped.
pub(crate) struct Listener {
    domain: Arc<Domain>,
    inbox: Arc<Inbox>,
}

impl Listener {
    pub(crate) fn new(domain: &Arc<Domain>, inbox: &Arc<Inbox>) -> Result<Self> {
        // As for the seats.
        let _noio = Noio::new();
        domain.inboxes.lock().push(inbox.clone(), GFP_KERNEL)?;
        Ok(Self {
            domain: domain.clone(),
            inbox: inbox.clone(),
        })
    }

    /// See [`Domain::is_short`].
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.domain.is_short()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut inboxes = self.domain.inboxes.lock();
        inboxes.retain(|inbox| !Arc::ptr_eq(inbox, &self.inbox));
    }
}

/// A number of pages that the queues of a domain share.
pub(crate) struct Budget {
    /// The sum of their parts.
    limit: Atomic<usize>,
    /// The sum of what they have taken.
    used: Atomic<usize>,
    /// Until when it counts as used up.
    short_until: Atomic<Jiffies>,
    /// Until when no queue is guaranteed its part.
    withheld_until: Atomic<Jiffies>,
}

impl Budget {
    fn new() -> Self {
        Self {
            limit: Atomic::new(0),
            used: Atomic::new(0),
            short_until: Atomic::new(jiffies::now()),
            withheld_until: Atomic::new(jiffies::now()),
        }
    }

    fn is_short(&self) -> bool {
        !jiffies::is_past(self.short_until.load(Relaxed))
    }

    /// Returns `true` if no queue is guaranteed its part now. The budget is short then, too.
    fn is_withheld(&self) -> bool {
        !jiffies::is_past(self.withheld_until.load(Relaxed))
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
    fn is_used_up(&self) -> bool {
        prolong(&self.short_until)
    }

    /// Guarantees no queue its part for a while. Returns `true` if the queues have to be told.
    fn withhold(&self) -> bool {
        self.is_used_up();
        prolong(&self.withheld_until)
    }
}

/// Sets the end of a shortage, from now on. Returns `true` if the queues have to be told: not again
/// while they know, but well before it is over.
fn prolong(until: &Atomic<Jiffies>) -> bool {
    let half = msecs_to_jiffies(SHORTAGE_MS / 2);
    let known = !jiffies::is_past(until.load(Relaxed).wrapping_sub(half));
    let end = jiffies::now().wrapping_add(msecs_to_jiffies(SHORTAGE_MS));
    until.store(end, Relaxed);
    !known
}

/// What one queue has of a budget.
pub(crate) struct Share {
    domain: Arc<Domain>,
    which: fn(&Domain) -> &Budget,
    /// What it has added.
    part: usize,
    /// What it has taken.
    has: usize,
}

impl Share {
    /// The share of a queue that adds `part` pages.
    pub(crate) fn new(domain: &Arc<Domain>, which: fn(&Domain) -> &Budget, part: usize) -> Self {
        let part = part.min(MAX_PART);
        which(domain).limit.fetch_add(part, Relaxed);
        Self {
            domain: domain.clone(),
            which,
            part,
            has: 0,
        }
    }

    fn budget(&self) -> &Budget {
        (self.which)(&self.domain)
    }

    /// Returns how many pages the queue is guaranteed now.
    fn guaranteed(&self) -> usize {
        if self.budget().is_withheld() {
            0
        } else {
            self.part
        }
    }

    /// Whether the queue may have so many pages; takes what is missing.
    #[inline]
    pub(crate) fn covers(&mut self, pages: usize) -> bool {
        pages <= self.has || self.grow(pages)
    }

    fn grow(&mut self, pages: usize) -> bool {
        let budget = self.budget();
        let beyond = pages > self.guaranteed();
        if beyond && budget.is_short() {
            return false;
        }
        let missing = pages.saturating_sub(self.has);
        let step = if budget.is_short() {
            missing
        } else {
            missing.next_multiple_of(STEP)
        };
        let mut sizes = [step, missing].into_iter();
        match sizes.find(|pages| budget.take(*pages)) {
            Some(taken) => {
                self.has = self.has.wrapping_add(taken);
                true
            }
            None => {
                if !beyond && budget.is_used_up() {
                    self.domain.tell();
                }
                false
            }
        }
    }

    /// How many of its pages the queue has to give up, because others of the domain need them. Gives
    /// back what it has taken and does not use.
    pub(crate) fn excess(&mut self, pages: usize) -> usize {
        if !self.budget().is_short() {
            return 0;
        }
        let guaranteed = self.guaranteed();
        if self.has <= guaranteed {
            return 0;
        }
        self.shrink(pages.max(guaranteed));
        pages.saturating_sub(guaranteed)
    }

    /// Gives back what is not needed for so many pages, if that is much.
    #[inline]
    pub(crate) fn keep(&mut self, pages: usize) {
        if self.has.saturating_sub(pages) >= STEP {
            self.shrink(pages);
        }
    }

    fn shrink(&mut self, pages: usize) {
        let spare = self.has.saturating_sub(pages);
        self.budget().used.fetch_sub(spare, Relaxed);
        self.has = self.has.wrapping_sub(spare);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let budget = self.budget();
        budget.used.fetch_sub(self.has, Relaxed);
        budget.limit.fetch_sub(self.part, Relaxed);
    }
}
