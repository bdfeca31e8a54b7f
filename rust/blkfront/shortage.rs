// SPDX-License-Identifier: GPL-2.0-only

//! Shortage of grants: a device needs grants to connect, and other disks of the guest hold them.
//!
//! All disks share the grant table of the guest. A device whose attempt to connect fails with
//! ENOSPC asks the others to free the grants that no request uses; if event channels or nodes of
//! xenstore are exhausted instead, that does not help it. While it waits, their pools do not grow,
//! and a queue without bounce buffers has one request in flight. A pool keeps the pages for one
//! request, so each disk makes progress. The worker of the device ends this after a limited time,
//! because another driver, such as that of a network interface, may have caused the shortage.

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

use crate::wakeup::{
    DeviceWakeup,
    WakeReason, //
};

/// Time for which the other disks are throttled, in milliseconds.
const THROTTLE_MS: i64 = 5_000;
/// Number of attempts to connect that have to fail before that ends.
const ATTEMPTS: u32 = 2;
/// Time after which it ends although there were fewer attempts, in milliseconds.
const MAX_THROTTLE_MS: i64 = 30_000;
/// Time after which the same device may throttle them again, in milliseconds.
const THROTTLE_INTERVAL_MS: i64 = 30_000;

/// The devices of this guest.
static DEVICES: GlobalMutex<KVec<Arc<DeviceWakeup>>> = GlobalMutex::new(KVec::new());

/// Number of devices that wait for grants.
static ACTIVE: Atomic<i32> = Atomic::new(0);

/// Returns `true` if a device waits for grants.
///
/// Context: any.
#[inline]
pub(crate) fn is_active() -> bool {
    ACTIVE.load(Relaxed) != 0
}

/// The registration of a device that is asked to free unused grants; it ends when it is dropped.
pub(crate) struct ShortageSubscriber(Arc<DeviceWakeup>);

impl ShortageSubscriber {
    /// Registers a device.
    pub(crate) fn new(wakeup: Arc<DeviceWakeup>) -> Result<Self> {
        DEVICES.lock().push(wakeup.clone(), GFP_KERNEL)?;
        Ok(Self(wakeup))
    }
}

impl Drop for ShortageSubscriber {
    fn drop(&mut self) {
        let mut devices = DEVICES.lock();
        devices.retain(|wakeup| !Arc::ptr_eq(wakeup, &self.0));
        if devices.is_empty() {
            // A static is not dropped when the module is unloaded, so free its memory.
            *devices = KVec::new();
        }
    }
}

/// A device that waits for grants, counted in [`ACTIVE`].
struct ActiveShortage {
    /// When the wait began.
    began: Instant<Monotonic>,
    /// Number of attempts to connect that have failed since.
    attempts: u32,
}

impl ActiveShortage {
    fn new() -> Self {
        ACTIVE.fetch_add(1, Relaxed);
        Self {
            began: Instant::now(),
            attempts: 0,
        }
    }

    /// Returns the time until the other disks are no longer throttled, in milliseconds.
    ///
    /// On a busy machine an attempt may take as long as [`THROTTLE_MS`].
    fn wait_ms(&self) -> i64 {
        let limit = if self.attempts < ATTEMPTS {
            MAX_THROTTLE_MS
        } else {
            THROTTLE_MS
        };
        limit.saturating_sub(self.began.elapsed().as_millis())
    }
}

impl Drop for ActiveShortage {
    fn drop(&mut self) {
        ACTIVE.fetch_sub(1, Relaxed);
    }
}

/// The shortage of one device.
#[derive(Default)]
pub(crate) struct Shortage {
    active: Option<ActiveShortage>,
    /// Time when the last wait ended without success.
    ended: Option<Instant<Monotonic>>,
}

impl Shortage {
    /// Asks all devices to free unused grants, and throttles them until [`Self::check`] ends that.
    pub(crate) fn ask(&mut self) {
        let may_throttle = (self.ended.as_ref())
            .is_none_or(|ended| ended.elapsed().as_millis() >= THROTTLE_INTERVAL_MS);
        match &mut self.active {
            Some(active) => active.attempts = active.attempts.saturating_add(1),
            None if may_throttle => self.active = Some(ActiveShortage::new()),
            None => {}
        }
        for wakeup in DEVICES.lock().iter() {
            wakeup.set(WakeReason::Shortage);
        }
    }

    /// Returns the time until the other disks are no longer throttled, in milliseconds, or `None`
    /// if they are not throttled.
    pub(crate) fn wait_ms(&self) -> Option<u64> {
        let left = self.active.as_ref()?.wait_ms();
        Some(left.max(0) as u64)
    }

    /// Ends the shortage if its time is over, even if the device does not have its grants.
    pub(crate) fn check(&mut self) {
        if self.wait_ms() == Some(0) {
            self.active = None;
            self.ended = Some(Instant::now());
        }
    }

    /// Ends the shortage, because the device has its grants or no longer needs them.
    pub(crate) fn finish(&mut self) {
        *self = Self::default();
    }
}
