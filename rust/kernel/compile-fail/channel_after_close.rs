// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! The interrupt of a channel that is closed may be somebody else's: what can be kept is a notifier.

use kernel_ext::xen::events::{
    EventChannel,
    Handler, //
};

fn misuse<T: Handler>(channel: EventChannel<T>) {
    drop(channel);
    channel.notify();
}
