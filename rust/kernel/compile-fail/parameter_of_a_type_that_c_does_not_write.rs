// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A parameter's type is one that the kernel's code writes whole.

use kernel_ext::base::module_param::Param;

static CHOICE: Param<char> = Param::new('a');
