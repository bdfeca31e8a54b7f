// SPDX-License-Identifier: GPL-2.0-only
// error: E0597

//! The bus uses the table of device types as long as the driver is registered.

use kernel_ext::xen::xenbus::{
    DeviceId,
    IdArray,
    IdTable, //
};

fn misuse() -> IdTable {
    let ids = IdArray::new([DeviceId::new(c"vbd")]);
    ids.as_table()
}
