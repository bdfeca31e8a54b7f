// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! A piece of a request's memory is the request's.

use kernel_ext::block::mq::*;

fn late<T: Operations>(rq: Request<T, InFlight>) -> Option<usize> {
    let segment = rq.segments().next()?;
    rq.end(BlkStatus::OK);
    Some(segment.len())
}
