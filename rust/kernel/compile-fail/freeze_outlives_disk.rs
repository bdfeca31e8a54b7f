// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! A disk that is frozen cannot be removed: that would wait for ever.

use kernel_ext::block::mq::*;

fn stuck<T: Operations>(disk: GenDisk<T>) {
    let frozen = disk.freeze();
    drop(disk);
    drop(frozen);
}
