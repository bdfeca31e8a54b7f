// SPDX-License-Identifier: GPL-2.0-only

//! Keeps block devices claimed while the backend module is replaced.
//!
//! `rblkback` claims the devices that it serves for writing, so that nothing else in its domain
//! uses them. Once it is unloaded, a volume manager, a mount or `swapon` could claim them. This
//! module claims them for the same holder as `rblkback` while it is loaded, and does nothing else.
//! `packaging/sbin/rblkback-replace` loads and unloads it.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h) (`bdev_file_open_by_dev()`)

#![deny(unsafe_code)]

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::module_param::module_param_lists,
    block::bdev::{
        Access,
        BlockDevice,
        Claim,
        DeviceNumber, //
    },
};

module! {
    type: Module,
    name: "rblkclaim",
    authors: ["The rblkif developers"],
    description: "Claims disks while rblkback is replaced",
    license: "GPL",
}

/// Largest number of devices in a list.
///
/// The text of a parameter is not limited.
const MAX_DEVICES: usize = 4096;

/// Minor numbers of a major number, as in the kernel's `dev_t`.
const MINORS: u32 = 1 << 20;

module_param_lists! {
    /// Devices to claim.
    static EXCLUSIVE("exclusive"): [u32; MAX_DEVICES] = 0,
        "Devices to claim: major number * 1048576 + minor number";

    /// Devices to keep open without a claim, which others may claim or have claimed.
    static SHARED("shared"): [u32; MAX_DEVICES] = 0,
        "Devices to keep open without a claim, so that they stay: numbers as for exclusive";
}

/// The devices, which are closed when the module is unloaded.
struct Module {
    _devices: KVec<Arc<BlockDevice>>,
}

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let mut devices = KVec::new();
        open(&mut devices, EXCLUSIVE.get(), Claim::Exclusive)?;
        open(&mut devices, SHARED.get(), Claim::None)?;
        Ok(Self { _devices: devices })
    }
}

/// Opens devices.
///
/// Logs the first one that cannot be opened.
fn open(devices: &mut KVec<Arc<BlockDevice>>, numbers: &[u32], claim: Claim) -> Result {
    for number in numbers {
        let (major, minor) = (number / MINORS, number % MINORS);
        let device = DeviceNumber::new(major, minor)
            .ok_or(EINVAL)
            .and_then(|number| BlockDevice::open(number, Access::ReadOnly, claim))
            .inspect_err(|error| pr_err!("{major}:{minor} cannot be claimed: {error:?}\n"))?;
        devices.push(device, GFP_KERNEL)?;
    }
    Ok(())
}
