// SPDX-License-Identifier: GPL-2.0-only

//! Disks and their requests, independent of Xen.
//!
//! - [`bdev`]: open block devices.
//! - [`bio`]: I/O on them.
//! - [`mq`]: drivers of disks.
//! - [`major`]: ownership of a block major number and of minors.

pub mod bdev;
pub mod bio;
pub mod major;
pub mod mq;
