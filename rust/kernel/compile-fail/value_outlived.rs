// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! The bytes of a node's value cannot outlive the value.

use kernel_ext::xen::xenstore::Value;

fn late(value: Value) -> usize {
    let bytes = value.as_bytes();
    drop(value);
    bytes.len()
}
