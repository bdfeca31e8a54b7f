// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! The bytes of a page cannot outlive the page.

use kernel_ext::base::page::{
    Page,
    PageSlice, //
};

fn late(page: Page) -> Option<usize> {
    let slice = PageSlice::new(&page, 0, 8)?;
    drop(page);
    Some(slice.len())
}
