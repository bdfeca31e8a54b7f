// SPDX-License-Identifier: GPL-2.0-only

//! `rblktap`: serves one disk of a Xen guest from an image, in user space.
//!
//! It corresponds to `rblkback` in the kernel, blktap's `tapdisk` and QEMU's
//! `hw/block/xen-block.c`. Wire layouts, checks of requests, negotiation and connection states are
//! those of [`blkif`].
//!
//! | module | |
//! |---|---|
//! | [`device`] | the life of the disk in xenstore, in the main thread |
//! | [`confine`] | takes away from the process what serving a guest does not take |
//! | [`cluster`] | the same for a process with the library of Ceph |
//! | [`launch`] | runs QEMU's programs, which parse images, with little but their files |
//! | [`monitor`] | the process beside it, which does the little that it cannot do |
//! | `connect` | reads what the frontend has chosen and maps its rings |
//! | `queue` | serves one ring, in a thread of its own |
//! | `memory` | moves data between the frontend's pages and the image |
//! | `barrier` | orders the requests of all rings around a barrier |
//! | `inflight` | the in-flight table, from which a successor completes requests after a kill |
//! | `drain` | the flush of a disk before its process is replaced |
//! | `control` | the socket for `rblkd` |
//! | `nbd` | the NBD socket for the device model of an HVM guest |
//! | `listen` | creates these two sockets |
//! | `stats` | counters, as JSON and for `xentop` |
//!
//! The main thread and each queue wait in one `poll` without a timeout: an idle disk causes no
//! wakeups. The only exceptions are a retry that is due, and one scan a minute after the last
//! request for pages that are still mapped.

#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]
#![deny(missing_docs)]

mod barrier;
pub mod cluster;
pub mod confine;
mod connect;
mod control;
pub mod device;
mod disk;
mod drain;
mod error;
mod filter;
mod handover;
mod inflight;
pub mod launch;
mod listen;
mod memory;
pub mod monitor;
mod nbd;
mod queue;
mod ring;
mod root;
mod stats;
mod wakeup;
mod xenstore;

pub use disk::Disk;
pub use error::Error;
