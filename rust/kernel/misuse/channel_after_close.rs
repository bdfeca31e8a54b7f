// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! The interrupt of a channel that is closed may be somebody else's: what can be kept is a doorbell.

use kernel_ext::xen::events::{
    Channel,
    Handler, //
};

fn misuse<T: Handler>(channel: Channel<T>) {
    drop(channel);
    channel.notify();
}
