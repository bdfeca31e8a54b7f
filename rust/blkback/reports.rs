// SPDX-License-Identifier: GPL-2.0-only

//! Reports of a queue thread to its device.
//!
//! A broken ring and a rejected feature are reported once, a new size until it was written.

use kernel::prelude::*;

use blkif::ring::RingError;

/// Receiver of the reports of a queue thread: its device.
///
/// Context: the queue thread. Takes the lock of the device, and may sleep.
pub(crate) trait QueueReports {
    /// Withdraws a feature that the disk does not support: writes 0 to its node.
    fn withdraw_feature(&self, node: &str);

    /// Closes the device, because the frontend has written an invalid index to the ring.
    fn ring_broken(&self, error: RingError);

    /// Writes the new size of the disk for the frontend.
    fn size_changed(&self);
}

/// Status of a ring.
pub(crate) enum RingStatus {
    /// Requests may be taken.
    Usable,
    /// The frontend has written an invalid index. No more requests are taken from the ring.
    Broken(RingError),
    /// The ring is broken, and this was reported to the device.
    Reported,
}

impl RingStatus {
    /// Returns `true` if requests may be taken from the ring.
    #[inline]
    pub(crate) fn is_usable(&self) -> bool {
        matches!(self, Self::Usable)
    }

    /// Returns the error of a broken ring, the first time.
    fn take_error(&mut self) -> Option<RingError> {
        let Self::Broken(error) = *self else {
            return None;
        };
        *self = Self::Reported;
        Some(error)
    }
}

/// Features that were offered and that the disk does not support.
///
/// Each is withdrawn once, however often the frontend asks for it.
pub(crate) struct RejectedFeatures {
    nodes: KVec<&'static str>,
    /// Number of `nodes`, from the start of the list, that were withdrawn.
    withdrawn: usize,
}

impl RejectedFeatures {
    /// Creates a list with space for `max` features.
    pub(crate) fn new(max: usize) -> Result<Self> {
        Ok(Self {
            nodes: KVec::with_capacity(max, GFP_KERNEL)?,
            withdrawn: 0,
        })
    }

    /// Adds a feature, unless the list has it.
    pub(crate) fn add(&mut self, node: &'static str) {
        if !self.nodes.contains(&node) {
            // There is space for all features that can be rejected.
            let _ = self.nodes.push_within_capacity(node);
        }
    }

    /// Returns the next feature that was not withdrawn yet.
    fn take_next(&mut self) -> Option<&'static str> {
        let node = *self.nodes.get(self.withdrawn)?;
        self.withdrawn = self.withdrawn.wrapping_add(1);
        Some(node)
    }
}

/// Reports changes to the device of a queue.
pub(crate) fn report(
    reports: &impl QueueReports,
    ring: &mut RingStatus,
    features: &mut RejectedFeatures,
    size_changed: bool,
) {
    if let Some(error) = ring.take_error() {
        reports.ring_broken(error);
    }
    while let Some(node) = features.take_next() {
        reports.withdraw_feature(node);
    }
    if size_changed {
        reports.size_changed();
    }
}
