// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! The pages of a cache are linked to its address, so it must not move.

use core::pin::Pin;

use kernel_ext::xen::grant::map::PageCache;

fn misuse(cache: Pin<&mut PageCache>, other: Pin<&mut PageCache>) {
    core::mem::swap(cache.get_mut(), other.get_mut());
}
