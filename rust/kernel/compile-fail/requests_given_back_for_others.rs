// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! Requests of a plug can be returned only by the call that offers them.

use kernel_ext::block::mq::*;

fn others<'q, 'p, T: Operations>(
    _offered: RequestList<T, Queued<'q>>,
    earlier: RequestList<T, Queued<'p>>,
) -> RequestList<T, Queued<'q>> {
    earlier
}
