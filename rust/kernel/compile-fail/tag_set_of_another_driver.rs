// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! The operations of a disk are those of its tag set, so both have the same driver.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::block::mq::*;

fn misuse<T: Operations, U: Operations>(
    builder: GenDiskBuilder,
    tag_set: Arc<TagSet<T>>,
    data: Arc<U::QueueData>,
) -> Result<GenDisk<U>> {
    builder.build(fmt!("misuse"), tag_set, data)
}
