// SPDX-License-Identifier: GPL-2.0-only

//! The frontend: disks that another domain serves.
//!
//! | file | idea |
//! |---|---|
//! | `vbd` | a device of xenbus: its driver |
//! | `control` | the connection of a device and its disk, step by step |
//! | `keeper` | the thread of a device: lets the disk go, keeps deadlines |
//! | `nodes` | what is read from and written to xenstore |
//! | `disk` | the block device: limits, requests of the block layer |
//! | `queue` | a ring: the way of a request to the backend |
//! | `slots` | which request an answer belongs to |
//! | `answer` | the way of an answer back |
//! | `carry` | what a request carries: granted pages, or pages to bounce its data |
//! | `pool` | pages that stay granted |
//! | `link` | a ring and its event channel |
//! | `registry` | the disks that there are, removed ones included |
//! | `signal` | what wakes the thread |
//! | `retry` | when to connect again after an attempt that failed for now |
//! | `shortage` | grants that a device needs and other disks have |
//! | `timeout` | requests that are not answered in time |
//! | `params` | module parameters |
//!
//! # Who owns what
//!
//! The connection and the disk belong to [`control::Control`], under a mutex. The queues are shared by
//! it, the block layer and the event handlers; each has a lock, under which nothing sleeps,
//! allocates, or notifies.
//!
//! The order is: the mutex, quiescing the block layer's queue, the lock of a queue.

#![deny(unsafe_code)]

mod answer;
mod carry;
mod control;
mod disk;
mod keeper;
mod link;
mod nodes;
mod params;
mod pool;
mod queue;
mod registry;
mod retry;
mod shortage;
mod signal;
mod slots;
mod timeout;
mod vbd;

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

use crate::vbd::Vbd;

module! {
    type: Blkfront,
    name: "rblkfront",
    authors: ["The rblkif developers"],
    description: "Xen virtual block device frontend",
    license: "GPL",
    alias: ["xen:vbd", "xenblk", "block-major-202-*"],
}

/// Takes the major of disks of other domains, if there can be any.
fn register_major() -> Result<Major> {
    if !xen::has_pv_disks() {
        return Err(ENODEV);
    }
    params::check();
    Major::register(MAJOR, c"xvd").inspect_err(|_| {
        pr_err!(
            "major {} is taken: is xen_blkfront loaded? Unload it first\n",
            MAJOR
        );
    })
}

/// The module: a driver for all devices. Fields go in this order.
#[pin_data]
struct Blkfront {
    #[pin]
    driver: Registration<Adapter<Vbd>>,
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
