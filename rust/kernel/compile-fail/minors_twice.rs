// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! Two disks cannot have the same minors.

use kernel_ext::block::{
    major::Minors,
    mq::*, //
};

fn both(first: GenDiskBuilder, second: GenDiskBuilder, minors: Minors) {
    first.device_numbers(minors);
    second.device_numbers(minors);
}
