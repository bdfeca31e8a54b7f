// SPDX-License-Identifier: GPL-2.0-only
// error: E0507

//! Who owns granted pages does not come out before the grants have ended.

use kernel_ext::{
    base::page::Page,
    xen::grant::Granted, //
};

fn misuse(granted: Granted<Page>) -> Page {
    *granted.owner()
}
