// SPDX-License-Identifier: GPL-2.0-only

//! The frontend: disks that another domain serves.
//!
//! | file | contents |
//! |---|---|
//! | `driver` | the xenbus driver: probe, remove, resume, changes of the backend |
//! | `device` | the state of a device: its connection and its disk |
//! | `worker` | the kernel thread of a device: deadlines, removal of the disk, memory |
//! | `xenstore` | the nodes that are read and written |
//! | `mq_ops` | the operations of blk-mq |
//! | `disk` | the block device: its data for the block layer, its limits |
//! | `submit` | the path of requests to the backend |
//! | `completion` | the path of responses back |
//! | `queue` | a ring and its pool: connecting and disconnecting |
//! | `shadow` | the shadow table: maps responses to requests |
//! | `pending_request` | a request in the ring, or one whose grants have not ended |
//! | `request_data` | the driver's data of each request: fragments, granted pages |
//! | `pool` | pages that stay granted |
//! | `ring_channel` | a ring and its event channel |
//! | `registry` | the disks of the guest, removed ones included |
//! | `wakeup` | wakes the device worker |
//! | `retry` | when to connect again after a failure |
//! | `shortage` | grants that a device needs and other devices hold |
//! | `timeout` | requests that get no response in time |
//! | `params` | module parameters |
//!
//! # Locking
//!
//! The connection and the disk belong to [`device::Device`], which a mutex protects. The queues are
//! shared by the device, the block layer and the event handlers. Each queue has a spinlock; code
//! that holds it does not sleep and does not notify the backend. It allocates no memory itself;
//! when it frees a granted page that is still mapped, the kernel allocates an entry of its list of
//! deferred grants (`gnttab_add_deferred()`), with `GFP_ATOMIC`.
//!
//! Lock order:
//!
//! 1. the mutex of the device,
//! 2. quiescing the block layer's queue,
//! 3. the lock of a queue.
//!
//! The mutexes of [`registry`] and [`shortage`] are taken with or without the mutex of the device;
//! no other lock but that of a wait queue is taken under them. The mutex
//! `DeviceWorker::retry_watch` is never held together with the mutex of the device.

#![deny(unsafe_code)]

mod completion;
mod device;
mod disk;
mod driver;
mod mq_ops;
mod params;
mod pending_request;
mod pool;
mod queue;
mod registry;
mod request_data;
mod retry;
mod ring_channel;
mod shadow;
mod shortage;
mod submit;
mod timeout;
mod wakeup;
mod worker;
mod xenstore;

use kernel::{
    driver::Registration,
    prelude::*, //
};

use kernel_ext::{
    block::major::Major,
    xen::{
        self,
        xenbus::Adapter, //
    },
};

use blkif::vdev::MAJOR;

use crate::driver::VbdDriver;

module! {
    type: Blkfront,
    name: "rblkfront",
    authors: ["The rblkif developers"],
    description: "Xen virtual block device frontend",
    license: "GPL",
    alias: ["xen:vbd", "xenblk", "block-major-202-*"],
}

/// Checks the module parameters and registers the major number of Xen disks.
///
/// Fails with `ENODEV` if the domain cannot have Xen disks.
fn register_major() -> Result<Major> {
    if !xen::has_pv_disks() {
        return Err(ENODEV);
    }
    params::check();
    Major::register(MAJOR, c"xvd").inspect_err(|&error| {
        if error == EBUSY {
            pr_err!("major {MAJOR} is taken: is xen_blkfront loaded? Unload it first\n");
        } else {
            pr_err!("cannot register major {MAJOR}: {error:?}\n");
        }
    })
}

/// The module: a driver for all devices. The fields are dropped in this order.
#[pin_data]
struct Blkfront {
    #[pin]
    driver: Registration<Adapter<VbdDriver>>,
    major: Major,
}

impl kernel::InPlaceModule for Blkfront {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            major: register_major()?,
            driver <- Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
        })
    }
}
