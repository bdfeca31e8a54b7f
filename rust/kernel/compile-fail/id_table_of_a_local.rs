// SPDX-License-Identifier: GPL-2.0-only
// error: E0597

//! The bus looks at the types of devices for as long as there is the driver.

use kernel_ext::xen::xenbus::{
    DeviceId,
    IdArray,
    IdTable, //
};

fn misuse() -> IdTable {
    let ids = IdArray::new([DeviceId::new(c"vbd")]);
    ids.as_table()
}
