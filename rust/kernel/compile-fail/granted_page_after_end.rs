// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! A page whose grant has ended is no longer a granted page.

use kernel_ext::{
    base::page::Page,
    xen::grant::GrantedPage, //
};

fn misuse(granted: GrantedPage) -> (Option<Page>, bool) {
    let page = granted.try_end().ok();
    (page, granted.slice(0, 16).is_some())
}
