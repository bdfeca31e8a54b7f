// SPDX-License-Identifier: GPL-2.0-only
// error: E0499

//! A new batch forgets the copies of the last one: there is one at a time.

use kernel_ext::xen::grant::copy::Copier;

fn misuse(copier: &mut Copier) -> usize {
    let batch = copier.batch();
    let other = copier.batch();
    batch.len() + other.len()
}
