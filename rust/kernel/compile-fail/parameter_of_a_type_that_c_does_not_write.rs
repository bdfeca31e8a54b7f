// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A parameter has a type that the kernel's parameter code writes as one word.

use kernel_ext::base::module_param::Param;

static CHOICE: Param<char> = Param::new('a');
