// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! A segment of a request's memory cannot outlive the request.

use kernel_ext::block::mq::*;

fn late<T: Operations>(rq: Request<T, InFlight>) -> Option<usize> {
    let segment = rq.segments().next()?;
    rq.end(BlkStatus::OK);
    Some(segment.len())
}
