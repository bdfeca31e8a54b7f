// SPDX-License-Identifier: GPL-2.0-only

//! The state of `rblkd` and of its storage, and events.

use crate::disk::DiskId;
use serde::{Deserialize, Serialize};

/// The state of `rblkd`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HostStatus {
    /// The version.
    pub version: String,
    /// The process.
    pub pid: u32,
    /// Seconds since it was ready.
    pub uptime: u64,
    /// The steps of its start.
    pub startup: Vec<Step>,
    /// The storage domains.
    pub storages: Vec<StorageStatus>,
}

/// A step of the start.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Step {
    /// The name of the step.
    pub name: String,
    /// Its duration in microseconds.
    pub microseconds: u64,
}

/// A storage domain: an image that is read regularly, to know that the storage that it is on
/// answers.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct StorageStatus {
    /// The name.
    pub name: String,
    /// The image that is read.
    pub image: String,
    /// The state.
    pub state: StorageState,
    /// The time when this state began, in seconds since 1970.
    pub since: u64,
    /// The reason, unless the state is `up`.
    pub cause: Option<String>,
    /// The duration of the last check, in milliseconds.
    pub latency_ms: Option<u64>,
    /// The number of checks.
    pub checks: u64,
    /// The number of checks that failed.
    pub failures: u64,
    /// The states of the last day before this one, the oldest first.
    pub history: Vec<StorageChange>,
}

/// A state in which a storage domain was.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct StorageChange {
    /// The time when it began, in seconds since 1970.
    pub since: u64,
    /// The state.
    pub state: StorageState,
}

/// The state of a storage domain.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageState {
    /// The first check has not ended.
    Unknown,
    /// The last check was answered in time.
    Up,
    /// The last check took more than two seconds.
    Slow,
    /// The last check failed, or was not answered within ten seconds.
    Down,
}

/// An event.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Event {
    /// The number of the event, which grows by one.
    pub number: u64,
    /// The time, in seconds since 1970.
    pub time: u64,
    /// The disk that it is about, if any.
    pub disk: Option<DiskId>,
    /// The kind.
    pub kind: EventKind,
    /// A description for people.
    pub text: String,
}

/// The kind of an event.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// A process serves a disk.
    Served,
    /// No process serves a disk, or one has ended.
    Failed,
    /// A disk is detached.
    Detached,
    /// The state of a storage domain has changed.
    Storage,
}
