// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! Several threads may read an attribute at the same time, so its data must be `Sync`.

use core::cell::Cell;

use kernel::{
    device::{
        Bound,
        Device, //
    },
    prelude::*,
    sync::Arc, //
};

use kernel_ext::base::sysfs;

fn misuse(
    device: &Device<Bound>,
    files: &'static [sysfs::Attribute<Cell<u32>>],
    data: Arc<Cell<u32>>,
) -> Result {
    sysfs::register(device, None, files, data)
}
