// SPDX-License-Identifier: GPL-2.0-only

//! Backend of the Xen virtual block device: serves disks of this domain to other domains
//! (`drivers/block/xen-blkback`).
//!
//! It binds to devices `vbd` of the bus `xen-backend`, which the toolstack creates. `params` has
//! its parameters; `Documentation/loading.rst` says how to load it in place of `xen-blkback`.
//!
//! `Documentation/terminology.rst` defines the terms. The files, from the highest level to the
//! lowest:
//!
//! | file | content | in `xen-blkback` |
//! |---|---|---|
//! | `driver` | callbacks of the bus | `xen_blkbk_driver` |
//! | `device` | the state machine of a device, from probe to removal | `struct backend_info` |
//! | `connect` | negotiation: reads the frontend's nodes, writes the backend's | `connect_ring()`, `connect()` |
//! | `queue` | a ring's kernel thread: its main loop, how it sleeps | `struct xen_blkif_ring` |
//! | `submit` | from requests in the ring to I/O in flight | `dispatch_rw_block_io()` |
//! | `completion` | from completed I/O to responses in the ring | `end_block_io_op()` |
//! | `handoff` | lending the ring to I/O completion | none |
//! | `wakeup` | the flags that wake a queue thread | `waiting_reqs` |
//! | `pending_req` | a request from the ring to its response | `struct pending_req` |
//! | `data_path` | grant copy, mapping, persistent grants | `xen_blkbk_map()` |
//! | `persistent` | pages that stay mapped | `struct persistent_gnt` |
//! | `barrier` | barriers, which order the requests of all queues | `xen_blk_drain_io()` |
//! | `domain` | quotas for the pages of a frontend's domain that this domain has mapped | none |
//! | `disk` | the block device that is served | `struct xen_vbd` |
//! | `io_accounting` | cgroup and priority of the I/O | none |
//! | `ring_channel` | a mapped ring with its event channel | `xen_blkif_map()` |
//! | `xenstore`, `error` | nodes of a device, errors of a connection | |
//! | `reports` | reports of a queue thread to its device | |
//! | `stats`, `params` | counters in sysfs, module parameters | |
//! | `list` | linked list of requests | |
//!
//! Imports have no cycles. The crate [`blkif`] has the parts of the protocol that need no kernel
//! code.

#![deny(unsafe_code)]

use kernel::{
    driver::Registration,
    prelude::*, //
};

use kernel_ext::xen::xenbus::Adapter;

mod barrier;
mod completion;
mod connect;
mod data_path;
mod device;
mod disk;
mod domain;
mod driver;
mod error;
mod handoff;
mod io_accounting;
mod list;
mod params;
mod pending_req;
mod persistent;
mod queue;
mod reports;
mod ring_channel;
mod stats;
mod submit;
mod wakeup;
mod xenstore;

module! {
    type: Module,
    name: "rblkback",
    authors: ["The rblkif developers"],
    description: "Xen virtual block device backend",
    license: "GPL",
    alias: ["xen-backend:vbd"],
}

/// The module: registers the driver.
#[pin_data]
struct Module {
    #[pin]
    driver: Registration<Adapter<driver::VbdDriver>>,
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
