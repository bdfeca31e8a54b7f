// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A queue map is there to be filled in the call that asks for it.

use kernel_ext::block::mq::QueueMap;

fn keep<'a>(map: &'a mut QueueMap<'_>) -> &'a mut QueueMap<'static> {
    map
}
