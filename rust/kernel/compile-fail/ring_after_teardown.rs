// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! The words of a ring cannot outlive the ring.

use kernel_ext::xen::ring::{
    MappedRing,
    SharedWords, //
};

fn misuse(ring: MappedRing) -> u32 {
    let words: &SharedWords = &ring;
    drop(ring);
    words.load(0)
}
