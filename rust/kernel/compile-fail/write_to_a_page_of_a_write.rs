// SPDX-License-Identifier: GPL-2.0-only
// error: E0599

//! The pages of a write must not be changed.

use kernel_ext::block::mq::*;

fn scribble<T: Operations>(rq: &Request<T, InFlight>) {
    for segment in rq.segments() {
        segment.write(&[0]);
    }
}
