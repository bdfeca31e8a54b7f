// SPDX-License-Identifier: GPL-2.0-only
// error: E0423

//! A notifier is that of a channel, not any number.

use kernel_ext::xen::events::Notifier;

fn misuse() {
    Notifier(7).notify();
}
