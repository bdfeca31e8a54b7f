// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A transaction is not used after it has ended.

use kernel::prelude::*;

use kernel_ext::xen::xenstore;

fn misuse() -> Result {
    let kept = xenstore::transaction(|transaction| Ok(transaction))?;
    xenstore::write(kept, c"data", fmt!("a"), fmt!("b"))
}
