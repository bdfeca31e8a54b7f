// SPDX-License-Identifier: GPL-2.0-only
// error: none

//! Correct code, which compiles.

use kernel_ext::{
    base::page::Page,
    xen::grant::GrantedPage, //
};

fn right_use(granted: GrantedPage) -> Option<Page> {
    if granted.slice(0, 16).is_none() {
        return None;
    }
    granted.try_end().ok()
}
