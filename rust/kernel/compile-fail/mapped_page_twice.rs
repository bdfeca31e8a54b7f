// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! A mapping has one owner, so that it is unmapped once.

use kernel_ext::xen::grant::map::MappedPage;

fn misuse(page: &MappedPage) -> MappedPage {
    page.clone()
}
