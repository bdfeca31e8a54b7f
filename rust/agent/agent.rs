// SPDX-License-Identifier: GPL-2.0-only

//! `rblkd`: starts, adopts and restarts the processes that serve disks.
//!
//! It corresponds to blktap's `tapback`, without the I/O: each disk has a process `rblktap` of its
//! own, which does not depend on `rblkd`. When `rblkd` is killed, disks are served as before, and
//! the next `rblkd` adopts their processes; only new disks have to wait for it.
//!
//! | module | contents |
//! |---|---|
//! | [`backend`] | what xenstore says about a disk |
//! | [`process`] | a process `rblktap` |
//! | [`options`] | the options of these processes, and what each disk may use |
//! | [`disk`] | one disk: which process it has, and what is done next |
//! | [`supervisor`] | all disks: waits for events and updates the disks that they are about |
//! | [`server`] | the socket for `rblk` |
//! | [`host`], [`events`] | the state of `rblkd`, and the last events |
//! | [`storage`] | checks of storage |
//! | [`guests`] | guests that wait for storage are paused and resumed |
//! | `threads` | work in several threads |
//! | [`volumes`] | guests learn the new size of a volume |
//! | [`config`], [`signals`] | the configuration, and the signal to read it again |
//!
//! # Attach
//!
//! libxl creates the directory `backend/vbd3/D/N` with state Initialising and waits 10 seconds for
//! InitWait, then runs the hotplug script and waits 40 seconds for its end. `rblkd` writes the
//! disk's record, then starts `rblktap D N IMAGE`, which opens the image and writes its pid, the
//! features and InitWait. `rblkd` records that.
//!
//! If the image is not open after 4 seconds, `rblkd` writes InitWait in place of the process, and
//! what a frontend reads then: the largest ring and the number of rings. The other features depend
//! on the image, and Linux reads them in state Connected. If the image cannot be opened, or is
//! not open after 30 seconds, `rblkd` writes the reason to the record and InitWait to the state.
//! The script waits for the outcome in the record. It fails with the reason, which `xl` prints.
//!
//! # End of a process
//!
//! A process that ends while its disk is attached is replaced. The new one takes over the rings,
//! and the requests in flight from the table of the old one; the guest sees a delay. A process that
//! fails again and again is started every 5 seconds.

#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]
#![deny(missing_docs)]

pub mod backend;
pub mod config;
#[cfg(test)]
mod crash;
pub mod disk;
pub mod events;
pub mod guests;
pub mod host;
pub mod options;
pub mod process;
pub mod server;
pub mod signals;
pub mod storage;
pub mod supervisor;
mod threads;
pub mod volumes;
