// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! An I/O owns its memory: a borrowed page is not accepted.

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

fn misuse<C>(device: &Arc<BlockDevice>, page: &'static Page, context: C) -> Result
where
    C: bio::BioContext<&'static Page>,
{
    let io = KBox::new(bio::BioRequest::new(page, context), GFP_KERNEL)?;
    bio::submit(device, bio::Operation::Read, 0, io).map_err(|(error, _)| error)
}
