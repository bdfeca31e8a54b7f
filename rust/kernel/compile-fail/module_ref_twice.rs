// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! A reference is put once: who wants two of them takes two.

use kernel_ext::base::module_ref::ModuleRef;

fn misuse(reference: &ModuleRef) -> ModuleRef {
    reference.clone()
}
