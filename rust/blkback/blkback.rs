// SPDX-License-Identifier: GPL-2.0-only

//! The backend of the Xen virtual block device: serves disks of this domain to other domains.
//!
//! # Terms
//!
//! - *Frontend*: the driver in the other domain, whose disk this is.
//! - *Queue*: one ring of a frontend, and the kernel thread that serves it.
//! - *Transfer*: a request that was taken from a ring, with the memory that it is about.
//!
//! # Where what is
//!
//! | file | |
//! |---|---|
//! | `device` | the life of a device, from probe to removal |
//! | `io_accounting` | whom the I/O counts for |
//! | `connect` | what is read from xenstore and written to it |
//! | `disk` | the block device that is served |
//! | `domain` | how many pages the disks of a frontend's domain may have mapped |
//! | `queue` | the thread of a queue: takes requests, ends requests |
//! | `barrier` | barriers, which order the requests of all queues |
//! | `request` | a request on its way |
//! | `events` | where the thread of a queue and what it waits for meet |
//! | `data_path` | how data gets between the frontend's memory and the disk |
//! | `persistent` | pages that stay mapped |
//! | `stats` | counters and files in sysfs |
//! | `params` | module parameters |
//!
//! What can be decided without the kernel is decided in the crate [`blkif`].

#![deny(unsafe_code)]

use kernel::{
    driver::Registration,
    prelude::*, //
};

use kernel_ext::xen::xenbus::Adapter;

mod barrier;
mod connect;
mod data_path;
mod device;
mod disk;
mod domain;
mod events;
mod io_accounting;
mod params;
mod pending_req;
mod persistent;
mod queue;
mod stats;

module! {
    type: Module,
    name: "rblkback",
    authors: ["The rblkif developers"],
    description: "Xen virtual block device backend",
    license: "GPL",
    alias: ["xen-backend:vbd"],
}

#[pin_data]
struct Module {
    #[pin]
    driver: Registration<Adapter<device::VbdDriver>>,
    /// Dropped after the driver.
    work: device::WorkQueue,
}

impl kernel::InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            work: device::WorkQueue::new()?,
            driver <- Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
        }? Error)
    }
}
