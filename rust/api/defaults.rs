// SPDX-License-Identifier: GPL-2.0-only

//! The defaults of options that `rblkd` has in common with `rblktap`.
//!
//! They are texts, as a command line has them.

/// Pages of 4 KiB that the data of a domain's requests may use.
pub const PAGES: &str = "16384";

/// Requests of a domain that may be in flight.
pub const REQUESTS: &str = "2048";

/// Action for a write for which the storage has no space.
pub const NO_SPACE: &str = "wait";

/// Time for which requests are tried again after an error that may pass, in seconds.
pub const RETRY_SECONDS: &str = "60";

/// Age at which a request that has not completed is reported, in seconds.
pub const STUCK_SECONDS: &str = "10";

/// Directory of the passphrases of LUKS containers.
pub const KEY_DIR: &str = "/etc/cryptsetup-keys.d";

/// The first user of processes that serve guests: other software that allocates users without
/// names does not use the users from here on.
pub const UID_BASE: &str = "1895825408";

/// The largest number of rings of a disk.
pub const MAX_QUEUES: &str = "4";
