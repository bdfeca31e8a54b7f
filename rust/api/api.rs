// SPDX-License-Identifier: GPL-2.0-only

//! The protocol of the sockets of `rblkd` and `rblktap`.
//!
//! Both are stream sockets in the [`RunDir`]. A request is one line of JSON, and so is its reply.
//! The calls of `rblkd` have the shape of [Varlink](https://varlink.org/Method-Call):
//!
//! ```text
//! {"method":"rblkd.Pause","parameters":{"disk":"5/51712"}}
//! {"parameters":null}
//! {"method":"rblkd.Pause","parameters":{"disk":"9/51712"}}
//! {"error":"NoSuchDisk","parameters":{"cause":"there is no disk 9/51712","remedy":"see rblk disk list"}}
//! ```
//!
//! `rblktap` answers one request for each connection:
//!
//! ```text
//! {"command":"pause"}
//! {"paused":true}
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`disk`] | how a disk is named, and the commands that its process `rblktap` answers |
//! | [`agent`] | the calls that `rblkd` answers |
//! | [`host`] | the state of `rblkd` and of its storage, and events |
//! | [`defaults`] | the defaults of the options of `rblkd` and `rblktap` |
//! | [`failure`] | errors on the wire |
//! | [`socket`] | both ends of a connection |
//! | [`run_dir`] | the directory of sockets and records |
//! | [`message`] | messages of programs that serve disks |

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod agent;
pub mod defaults;
pub mod disk;
pub mod failure;
pub mod host;
pub mod message;
pub mod run_dir;
pub mod socket;

pub use agent::{AgentCall, DiskEntry, Phase, Record, Replaced};
pub use disk::{Counters, DiskAnswer, DiskCommand, DiskId, DiskStatus, EXIT_STALE};
pub use disk::{OldestRequest, Operation, QueueStatus, Quota};
pub use failure::{Failure, FailureKind};
pub use host::{Event, EventKind, HostStatus, Step};
pub use host::{StorageChange, StorageState, StorageStatus};
pub use run_dir::RunDir;
