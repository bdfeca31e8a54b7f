// SPDX-License-Identifier: GPL-2.0-only
// error: E0505

//! Xen copies to a page only while the page exists.

use kernel::prelude::*;

use kernel_ext::{
    base::page::{
        Page,
        PageSliceMut, //
    },
    xen::{
        grant::{
            copy::Copier,
            ForeignRef, //
        },
        DomId, //
    },
};

fn misuse(copier: &mut Copier, page: Page, domain: DomId, reference: ForeignRef) -> Result {
    let mut batch = copier.batch();
    let slice = PageSliceMut::new(&page, 0, 512).ok_or(EINVAL)?;
    batch.read(domain, reference, 0, slice)?;
    drop(page);
    batch.run()?;
    Ok(())
}
