// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! The pages of a vector contain typed values, to which arbitrary bytes must not be written.

use kernel::{
    page::AsPageIter,
    prelude::*, //
};

use kernel_ext::base::page::PageSliceMut;

fn misuse(names: &mut VVec<&'static str>) {
    for page in names.page_iter() {
        if let Some(bytes) = PageSliceMut::new(&page, 0, 16) {
            bytes.write(&[0; 16]);
        }
    }
}
