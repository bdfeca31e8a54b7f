// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! The interrupt of a closed channel may belong to another channel: keep a notifier instead.

use kernel_ext::xen::events::{
    EventChannel,
    Handler, //
};

fn misuse<T: Handler>(channel: EventChannel<T>) {
    drop(channel);
    channel.notify();
}
