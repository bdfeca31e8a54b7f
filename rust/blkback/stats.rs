// SPDX-License-Identifier: GPL-2.0-only

//! What was served, counted, and shown in sysfs.
//!
//! Each queue counts for itself; a reader of sysfs gets the sums. The counters stay when a frontend
//! disconnects, so that they only ever grow while the device exists.

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

use crate::device::Device;

/// What one queue has done.
#[derive(Default)]
pub(crate) struct Counters {
    /// Requests that had to wait for memory.
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

/// A number that grows. Only the thread of its queue adds to it.
pub(crate) struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
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
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self { queues <- new_mutex!(KVec::new()) })
    }

    /// The counters of a queue, made when the first frontend has so many queues.
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

/// A file that shows the sum of a counter.
const fn file(
    name: &'static CStr,
    show: fn(&Stats, &mut Output<'_>) -> fmt::Result,
) -> Attribute<Stats> {
    Attribute { name, show }
}

/// The directory `statistics`. `xentop` reads it.
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

/// The files in the directory of the device itself.
pub(crate) static DEVICE: [Attribute<Device>; 2] = [
    Attribute {
        name: c"physical_device",
        show: |device, out| device.show_physical_device(out),
    },
    Attribute {
        name: c"mode",
        show: |device, out| device.show_mode(out),
    },
];
