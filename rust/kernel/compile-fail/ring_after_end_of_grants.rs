// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! The words of a ring of this domain cannot outlive the ring.

use kernel_ext::xen::ring::{
    RingPages,
    SharedWords, //
};

fn misuse(ring: RingPages) {
    let words: &SharedWords = &ring;
    drop(ring);
    words.store(0, 1);
}
