// SPDX-License-Identifier: GPL-2.0-only

//! Grants that a device needs to connect, and that other disks of the guest have.
//!
//! All disks share the grant table of the guest. A device that finds it full asks the others for the
//! grants that they do not use at the moment. While it waits, their pools do not grow, and a queue
//! whose requests use grants of their own has one request in flight. A pool never gives up the pages
//! for one request, so each disk goes on. The wait has a limit: the shortage may be caused by
//! somebody else, such as a network interface.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        Instant,
        Monotonic, //
    },
};

use kernel_ext::base::global_mutex::GlobalMutex;

use crate::events::{
    DeviceEvents,
    Event, //
};

/// For how long other disks are issued back.
const ACTIVE_MS: i64 = 5_000;
/// How long after that they may be issued back again.
const PAUSE_MS: i64 = 30_000;

/// The devices of this guest.
static DEVICES: GlobalMutex<KVec<Arc<DeviceEvents>>> = GlobalMutex::new(KVec::new());

/// How many devices hold the others back.
static ACTIVE: Atomic<i32> = Atomic::new(0);

/// Returns `true` if a device waits for grants. Any context.
#[inline]
pub(crate) fn is_active() -> bool {
    ACTIVE.load(Relaxed) != 0
}

/// A device that is asked for grants that it does not use, until this is dropped.
pub(crate) struct ShortageSubscriber(Arc<DeviceEvents>);

impl ShortageSubscriber {
    /// Adds a device.
    pub(crate) fn new(events: Arc<DeviceEvents>) -> Result<Self> {
        DEVICES.lock().push(events.clone(), GFP_KERNEL)?;
        Ok(Self(events))
    }
}

impl Drop for ShortageSubscriber {
    fn drop(&mut self) {
        let mut devices = DEVICES.lock();
        devices.retain(|events| !Arc::ptr_eq(events, &self.0));
        if devices.is_empty() {
            // What is in a static is not dropped with the module.
            *devices = KVec::new();
        }
    }
}

/// Counts in [`ACTIVE`].
struct ActiveShortage(Instant<Monotonic>);

impl ActiveShortage {
    fn new() -> Self {
        ACTIVE.fetch_add(1, Relaxed);
        Self(Instant::now())
    }
}

impl Drop for ActiveShortage {
    fn drop(&mut self) {
        ACTIVE.fetch_sub(1, Relaxed);
    }
}

/// What a device does about a shortage.
#[derive(Default)]
pub(crate) struct Shortage {
    active: Option<ActiveShortage>,
    /// When the last active shortage ended without success.
    ended: Option<Instant<Monotonic>>,
}

impl Shortage {
    /// There are no grants: asks all devices for those that they do not use.
    pub(crate) fn ask(&mut self) {
        let over = |since: &Instant<Monotonic>, limit| since.elapsed().as_millis() >= limit;
        match &self.active {
            Some(active) if over(&active.0, ACTIVE_MS) => {
                self.active = None;
                self.ended = Some(Instant::now());
            }
            Some(_) => {}
            None if self
                .ended
                .as_ref()
                .is_none_or(|ended| over(ended, PAUSE_MS)) =>
            {
                self.active = Some(ActiveShortage::new());
            }
            None => {}
        }
        for events in DEVICES.lock().iter() {
            events.set(Event::Shortage);
        }
    }

    /// The device has what it needs, or needs it no more.
    pub(crate) fn finish(&mut self) {
        *self = Self::default();
    }
}
