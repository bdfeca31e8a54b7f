// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! A major number has one owner, so that it is released once.

use kernel_ext::block::major::Major;

fn misuse(major: &Major) -> Major {
    major.clone()
}
