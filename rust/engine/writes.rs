// SPDX-License-Identifier: GPL-2.0-only

//! Numbers of writes, to know what a server that ends may lose.

use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers of writes, discards and write zeroes.
#[derive(Default)]
pub(crate) struct Writes {
    completed: AtomicU64,
    /// Number of those that were flushed.
    flushed: AtomicU64,
}

impl Writes {
    /// Returns the number of those that have completed.
    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }

    /// Takes the completion of one into account.
    pub(crate) fn add(&self) {
        self.completed.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes the completion of a flush into account, at whose submission there were `completed`
    /// writes.
    pub(crate) fn flush(&self, completed: u64) {
        self.flushed.fetch_max(completed, Ordering::AcqRel);
    }

    /// Returns `true` if there are completed writes that were not flushed.
    pub(crate) fn is_dirty(&self) -> bool {
        self.flushed.load(Ordering::Acquire) < self.completed()
    }
}
