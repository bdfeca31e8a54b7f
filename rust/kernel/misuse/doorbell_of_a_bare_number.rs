// SPDX-License-Identifier: GPL-2.0-only
// error: E0423

//! A doorbell is that of a channel of ours, no number that one likes.

use kernel_ext::xen::events::Doorbell;

fn misuse() {
    Doorbell(7).ring();
}
