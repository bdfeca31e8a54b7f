// SPDX-License-Identifier: GPL-2.0-only

//! Xen's devices for user space: `/dev/xen/gntdev`, `/dev/xen/evtchn` and `/dev/xen/xenbus`.
//!
//! The corresponding C headers are `include/uapi/xen/gntdev.h`, `include/uapi/xen/evtchn.h` and
//! `xen/include/public/io/xs_wire.h`. The crate knows nothing about disks.
//!
//! | module | device |
//! |---|---|
//! | [`grant`] | maps pages of other domains, and copies from and to them |
//! | [`event`] | binds event channels, notifies, and says which have been notified |
//! | [`xenstore`] | reads and writes xenstore, and watches it |
//! | [`proxy`] | restricts a connection to xenstore, for a process that is not trusted |
//! | [`memory`] | memory that others may change at any time |
//!
//! Each device is a trait, implemented by the device of Linux and, with the feature `fake`, by
//! `fake::Host`, which is Xen as far as two ends of a connection in one process need it.
//!
//! # Safety
//!
//! All `unsafe` code is in `grant`, `unmapper`, `event` and `memory`. No argument of a safe
//! function, and nothing that another domain does, leads to undefined behaviour: memory that is
//! shared is never borrowed, only read and written by atomic accesses of at most 8 bytes, or by the
//! kernel.

#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![deny(clippy::undocumented_unsafe_blocks)]

pub mod event;
#[cfg(feature = "fake")]
pub mod fake;
pub mod grant;
mod ioctl;
pub mod memory;
pub mod proxy;
mod unmapper;
pub mod xenstore;
