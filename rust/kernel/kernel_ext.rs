// SPDX-License-Identifier: GPL-2.0-only

//! Abstractions that the stock `kernel` crate lacks.
//!
//! Layer 2, beside `kernel`, shaped like the kernel's own
//! `rust/kernel/` so that its parts can go there one day. It holds mechanisms,
//! no policy, and all the `unsafe` code of the project: **no safe function
//! here can be driven to undefined behaviour by any argument.**
//!
//! What the kernel may call back into holds a reference to the module, see
//! [`module_ref`](base::module_ref), so leaking it keeps the module loaded. There are two
//! exceptions. The end of an I/O of [`bio`](block::bio) runs code of the module: who submits one
//! waits for its end before the module can be unloaded. A [`workqueue`](base::workqueue) is dropped
//! by the module that created it, which waits for its work.
//!
//! - [`base`]: what any driver may need.
//! - [`block`]: disks and requests. Knows nothing of Xen.
//! - [`xen`]: xenbus, grants, event channels. Knows nothing of disks.

pub mod base;
pub mod block;
pub mod xen;

/// The prefix of messages of this crate; the modules have prefixes of their own.
const __LOG_PREFIX: &[u8] = b"rblkif\0";
