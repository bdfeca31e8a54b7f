// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! An I/O cannot be used while the device uses its memory.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::page::Page,
    block::{
        bdev::BlockDevice,
        bio, //
    },
};

fn misuse<C: bio::BioContext<Page>>(device: &Arc<BlockDevice>, io: KBox<bio::BioRequest<Page, C>>) {
    let _ = bio::submit(device, bio::Operation::Read, 0, io);
    let _ = io.data();
}
