// SPDX-License-Identifier: GPL-2.0-only

//! Abstractions that the stock `kernel` crate lacks.
//!
//! This crate is layer 2, beside `kernel`. It has the style of the kernel's own `rust/kernel/`, so
//! that its parts can move there. It contains mechanisms, no policy, and all the `unsafe` code of
//! the drivers: **no safe function here causes undefined behaviour, whatever its arguments.**
//!
//! Each object with callbacks from the kernel holds a reference to the module, see
//! [`module_ref`](base::module_ref), so leaking it keeps the module loaded. There are two
//! exceptions. The completion of an I/O of [`bio`](block::bio) runs code of the module: the
//! submitter waits for the completion before the module can be unloaded. A
//! [`workqueue`](base::workqueue) is dropped by the module that created it, which waits for its
//! work.
//!
//! - [`base`]: abstractions for any driver.
//! - [`block`]: disks and requests. Independent of Xen.
//! - [`xen`]: xenbus, grants, event channels. Independent of disks.

pub mod base;
pub mod block;
pub mod xen;

/// The prefix of messages of this crate; the modules have prefixes of their own.
const __LOG_PREFIX: &[u8] = b"rblkif\0";
