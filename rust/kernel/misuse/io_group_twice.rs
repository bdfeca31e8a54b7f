// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! There is one owner of a reference to a cgroup, so that it is put once.

use kernel_ext::base::io_owner::IoGroup;

fn misuse(group: &IoGroup) -> IoGroup {
    group.clone()
}
