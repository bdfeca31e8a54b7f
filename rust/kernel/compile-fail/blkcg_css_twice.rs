// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! A reference to a cgroup has one owner, so that it is put once.

use kernel_ext::base::blkcg::BlkcgCss;

fn misuse(group: &BlkcgCss) -> BlkcgCss {
    group.clone()
}
