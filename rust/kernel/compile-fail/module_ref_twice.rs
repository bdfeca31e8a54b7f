// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! A reference is put once, so it cannot be copied.

use kernel_ext::base::module_ref::ModuleRef;

fn misuse(reference: &ModuleRef) -> ModuleRef {
    reference.clone()
}
