// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A request that was not started cannot be kept after the call that offers it.

use kernel_ext::block::mq::*;

fn keep<T: Operations>(offered: Request<T, Queued<'_>>) -> Request<T, Queued<'static>> {
    offered
}
