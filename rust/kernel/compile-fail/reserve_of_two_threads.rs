// SPDX-License-Identifier: GPL-2.0-only
// error: E0596

//! Two threads that take references from a list at the same time could get the same one.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::page::Page,
    xen::{
        grant::{
            GrantAccess,
            GrantReserve,
            GrantedPage, //
        },
        DomId, //
    },
};

fn misuse(mut reserve: Arc<GrantReserve>, domain: DomId, page: Page) -> Result<GrantedPage> {
    GrantedPage::new(&mut reserve, domain, page, GrantAccess::ReadOnly)
}
