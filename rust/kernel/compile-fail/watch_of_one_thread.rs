// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A watch handler runs in the `xenwatch` thread and must be `Send` and `Sync`.

use core::cell::Cell;

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::xen::xenstore::{
    Watch,
    WatchHandler, //
};

struct Misuse(Cell<u32>);

impl WatchHandler for Misuse {
    fn changed(&self) {
        self.0.set(1);
    }
}

fn misuse(dir: &CStr, handler: Arc<Misuse>) -> Result<Watch<Misuse>> {
    Watch::new(dir, fmt!("state"), handler)
}
