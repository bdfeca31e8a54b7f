// SPDX-License-Identifier: GPL-2.0-only

//! A RAM disk that tests `kernel_ext::block` without Xen.
//!
//! The disk is `/dev/rblk0`. Parameters choose how each request is completed, see [`mode`]. Changes
//! of `size_mib`, of `gone`, and from mode 3 to another one take effect when the disk is next
//! opened, for instance by `blockdev --getsz`. The module can be unloaded after `gone` has removed
//! the disk. `lose` leaks memory, which the leak check of the tests must find.

#![deny(unsafe_code)]

mod disk;
mod mode;
mod params;
mod store;

use kernel::prelude::*;

use kernel_ext::base::kthread::{
    KThread,
    KThreadOptions, //
};

use crate::disk::Control;

module! {
    type: Ramdisk,
    name: "rblk_ramdisk",
    authors: ["The rblkif developers"],
    description: "RAM disk to test the block layer of rblkif",
    license: "GPL",
}

/// The module: one disk with a thread. Both hold the module until the disk is removed.
struct Ramdisk {
    _thread: KThread,
}

impl kernel::Module for Ramdisk {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let control = Control::new()?;
        Control::create_disk(&control)?;
        let runner = control.clone();
        // Nothing fails after this: if `init` fails, the kernel frees the module regardless of its
        // reference count.
        let thread = KThread::spawn(fmt!("rblk0"), KThreadOptions::default(), move |current| {
            runner.run(current);
        })
        .inspect_err(|_| control.remove())?;
        if let Err(error) = control.add_disk() {
            pr_err!("rblk0: not added: {:?}\n", error);
            thread.stop();
        }
        for number in 0..params::LOSE.get() {
            if let Ok(lost) = KBox::new([number; 16], GFP_KERNEL) {
                KBox::leak(lost);
            }
        }
        Ok(Self { _thread: thread })
    }
}
