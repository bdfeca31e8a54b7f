// SPDX-License-Identifier: GPL-2.0-only
// error: E0423

//! A number is not a grant reference of this domain.

use kernel_ext::xen::grant::GrantRef;

fn misuse() -> GrantRef {
    GrantRef(8)
}
