// SPDX-License-Identifier: GPL-2.0-only
// error: E0499

//! A new batch reuses the memory of the previous one, so a copier has one batch at a time.

use kernel_ext::xen::grant::copy::Copier;

fn misuse(copier: &mut Copier) -> usize {
    let batch = copier.batch();
    let other = copier.batch();
    batch.len() + other.len()
}
