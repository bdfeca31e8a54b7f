// SPDX-License-Identifier: GPL-2.0-only

//! Disks and their requests. Knows nothing of Xen.
//!
//! - [`bdev`]: open block devices.
//! - [`bio`]: I/O on them.
//! - [`mq`]: for drivers that offer a disk.
//! - [`major`]: ownership of a block major number and of minors.

pub mod bdev;
pub mod bio;
pub mod major;
pub mod mq;
