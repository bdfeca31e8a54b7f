// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A request can be rejected only in the call that offers it.

use kernel_ext::block::mq::*;

fn other<'q, 'p, T: Operations>(
    _offered: Request<T, Queued<'q>>,
    earlier: Request<T, Queued<'p>>,
) -> Result<(), Rejected<'q, T>> {
    Err(earlier.reject())
}
