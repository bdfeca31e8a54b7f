// SPDX-License-Identifier: GPL-2.0-only
// error: E0507

//! The owner of granted pages cannot be taken out before the grants have ended.

use kernel_ext::{
    base::page::Page,
    xen::grant::Granted, //
};

fn misuse(granted: Granted<Page>) -> Page {
    *granted.owner()
}
