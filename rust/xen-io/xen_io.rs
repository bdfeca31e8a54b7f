// SPDX-License-Identifier: GPL-2.0-only

//! The parts of the protocol that all split drivers of Xen share, without kernel code.
//!
//! A device has a frontend in one domain and a backend in another. They find each other in
//! xenstore, where each side has a state ([`xenbus`]) and nodes with numbers ([`node`]), and then
//! they exchange requests and responses in rings of shared memory ([`ring`]). The nodes and the
//! requests are defined by the protocol of the device, for block devices in the crate `blkif`.
//!
//! The reference is `xen/include/public/io/xenbus.h` and `ring.h` of the Xen project.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

pub mod node;
pub mod ring;
pub mod xenbus;
