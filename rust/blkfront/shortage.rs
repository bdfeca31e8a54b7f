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

use crate::signal::{
    Cause,
    Signal, //
};

/// For how long other disks are held back.
const CLAIM_MS: i64 = 5_000;
/// How long after that they may be held back again.
const PAUSE_MS: i64 = 30_000;

/// The devices of this guest.
static DEVICES: GlobalMutex<KVec<Arc<Signal>>> = GlobalMutex::new(KVec::new());

/// How many devices hold the others back.
static CLAIMS: Atomic<i32> = Atomic::new(0);

/// Returns `true` if a device waits for grants. Any context.
#[inline]
pub(crate) fn is_claimed() -> bool {
    CLAIMS.load(Relaxed) != 0
}

/// A device that is asked for grants that it does not use, until this is dropped.
pub(crate) struct Member(Arc<Signal>);

impl Member {
    /// Adds a device.
    pub(crate) fn new(signal: Arc<Signal>) -> Result<Self> {
        DEVICES.lock().push(signal.clone(), GFP_KERNEL)?;
        Ok(Self(signal))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut devices = DEVICES.lock();
        devices.retain(|signal| !Arc::ptr_eq(signal, &self.0));
        if devices.is_empty() {
            // What is in a static is not dropped with the module.
            *devices = KVec::new();
        }
    }
}

/// Counts in [`CLAIMS`].
struct Claim(Instant<Monotonic>);

impl Claim {
    fn new() -> Self {
        CLAIMS.fetch_add(1, Relaxed);
        Self(Instant::now())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMS.fetch_sub(1, Relaxed);
    }
}

/// What a device does about a shortage.
#[derive(Default)]
pub(crate) struct Shortage {
    claim: Option<Claim>,
    /// When the last claim ended without success.
    ended: Option<Instant<Monotonic>>,
}

impl Shortage {
    /// There are no grants: asks all devices for those that they do not use.
    pub(crate) fn ask(&mut self) {
        let over = |since: &Instant<Monotonic>, limit| since.elapsed().as_millis() >= limit;
        match &self.claim {
            Some(claim) if over(&claim.0, CLAIM_MS) => {
                self.claim = None;
                self.ended = Some(Instant::now());
            }
            Some(_) => {}
            None if self
                .ended
                .as_ref()
                .is_none_or(|ended| over(ended, PAUSE_MS)) =>
            {
                self.claim = Some(Claim::new());
            }
            None => {}
        }
        for signal in DEVICES.lock().iter() {
            signal.raise(Cause::Shortage);
        }
    }

    /// The device has what it needs, or needs it no more.
    pub(crate) fn finish(&mut self) {
        *self = Self::default();
    }
}
