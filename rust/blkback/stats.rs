// SPDX-License-Identifier: GPL-2.0-only

//! Statistics of a device, in sysfs (`st_rd_req` and so on of `struct xen_blkif_ring`).
//!
//! Each queue has counters of its own; sysfs shows the sums. The counters stay when a frontend
//! disconnects, so that they never decrease while the device exists.

use core::fmt::Write;

use kernel::{
    fmt,
    new_mutex,
    prelude::*,
    str::CStr,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

use kernel_ext::base::sysfs::{
    Attribute,
    Output, //
};

/// Counters of one queue.
#[derive(Default)]
pub(crate) struct Counters {
    /// Requests that had to wait for memory or mappings (`st_oo_req`, which counts each attempt).
    pub(crate) out_of_memory: Counter,
    /// Reads.
    pub(crate) reads: Counter,
    /// Writes.
    pub(crate) writes: Counter,
    /// Flushes and barriers.
    pub(crate) flushes: Counter,
    /// Discards.
    pub(crate) discards: Counter,
    /// Sectors read.
    pub(crate) sectors_read: Counter,
    /// Sectors written.
    pub(crate) sectors_written: Counter,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "oo {} | rd {} | wr {} | f {} | ds {}",
            self.out_of_memory.get(),
            self.reads.get(),
            self.writes.get(),
            self.flushes.get(),
            self.discards.get()
        )
    }
}

/// A counter that only the thread of its queue changes.
pub(crate) struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    /// Adds to the counter, without an atomic read-modify-write.
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(more), Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counters of a device.
#[pin_data]
pub(crate) struct Stats {
    #[pin]
    queues: Mutex<KVec<Arc<Counters>>>,
}

impl Stats {
    /// Creates statistics without queues.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self { queues <- new_mutex!(KVec::new()) })
    }

    /// Returns the counters of a queue.
    ///
    /// They are created for the first frontend with that many queues.
    pub(crate) fn queue(&self, index: usize) -> Result<Arc<Counters>> {
        let mut queues = self.queues.lock();
        while queues.len() <= index {
            queues.push(Arc::new(Counters::default(), GFP_KERNEL)?, GFP_KERNEL)?;
        }
        queues.get(index).cloned().ok_or(EINVAL)
    }

    fn sum(&self, counter: fn(&Counters) -> &Counter) -> u64 {
        let queues = self.queues.lock();
        queues
            .iter()
            .fold(0, |sum, queue| counter(queue).get().wrapping_add(sum))
    }
}

/// Creates a file that shows the sum of a counter.
const fn file(
    name: &'static CStr,
    show: fn(&Stats, &mut Output<'_>) -> fmt::Result,
) -> Attribute<Stats> {
    Attribute { name, show }
}

/// Files of the directory `statistics`, which `xentop` reads.
pub(crate) static STATISTICS: [Attribute<Stats>; 7] = [
    file(c"oo_req", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.out_of_memory))
    }),
    file(c"rd_req", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.reads))
    }),
    file(c"wr_req", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.writes))
    }),
    file(c"f_req", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.flushes))
    }),
    file(c"ds_req", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.discards))
    }),
    file(c"rd_sect", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.sectors_read))
    }),
    file(c"wr_sect", |stats, out| {
        writeln!(out, "{}", stats.sum(|queue| &queue.sectors_written))
    }),
];
