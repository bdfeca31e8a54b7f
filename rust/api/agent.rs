// SPDX-License-Identifier: GPL-2.0-only

//! The calls that `rblkd` answers.

use crate::disk::{DiskId, DiskStatus};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The description of all calls, in the style of a Varlink interface.
pub const INTERFACE: &str = include_str!("rblkd.varlink");

/// Limit for the wait of [`AgentCall::Events`] for an event.
pub const EVENTS_WAIT: Duration = Duration::from_secs(30);

/// A call that `rblkd` answers.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "method", content = "parameters")]
pub enum AgentCall {
    /// Returns a [`DiskEntry`] for each disk.
    #[serde(rename = "rblkd.List")]
    List,
    /// Returns the [`DiskStatus`] of a disk.
    #[serde(rename = "rblkd.Stats")]
    Stats {
        /// The disk.
        disk: DiskId,
    },
    /// Returns the [`HostStatus`](crate::HostStatus).
    #[serde(rename = "rblkd.HostStatus")]
    HostStatus,
    /// Returns each [`Event`](crate::Event) with a greater number.
    #[serde(rename = "rblkd.Events")]
    Events {
        /// The number of the last event that is known, or 0.
        after: u64,
        /// If there is none, one is waited for.
        wait: bool,
    },
    /// Returns [`INTERFACE`].
    #[serde(rename = "rblkd.Interface")]
    Interface,
    /// Takes no more requests of a disk, and returns when those in flight have completed.
    #[serde(rename = "rblkd.Pause")]
    Pause {
        /// The disk.
        disk: DiskId,
    },
    /// Takes requests of a disk again.
    #[serde(rename = "rblkd.Resume")]
    Resume {
        /// The disk.
        disk: DiskId,
    },
    /// Enlarges a disk's image if there is a size, reads its size again, and tells the guest.
    #[serde(rename = "rblkd.Resize")]
    Resize {
        /// The disk.
        disk: DiskId,
        /// The new size in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// Replaces the process of a disk by a new one, which uses another image, and returns its
    /// number.
    #[serde(rename = "rblkd.Retarget")]
    Retarget {
        /// The disk.
        disk: DiskId,
        /// The URI of the image.
        image: String,
    },
    /// Replaces the process of a disk by a new one, and returns its number.
    #[serde(rename = "rblkd.Restart")]
    Restart {
        /// The disk.
        disk: DiskId,
    },
}

impl AgentCall {
    /// Returns `true` if the call changes nothing.
    pub fn only_reads(&self) -> bool {
        match self {
            Self::List | Self::Stats { .. } | Self::HostStatus | Self::Events { .. } => true,
            Self::Interface => true,
            Self::Pause { .. } | Self::Resume { .. } | Self::Resize { .. } => false,
            Self::Retarget { .. } | Self::Restart { .. } => false,
        }
    }
}

/// A disk as `rblkd` lists it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DiskEntry {
    /// The record of the disk.
    pub record: Record,
    /// The answer of its process, unless it does not answer.
    pub status: Option<DiskStatus>,
}

/// The record of a disk, in a file of its own in the [`RunDir`](crate::RunDir).
///
/// It is written before the process is started, so that a disk whose process runs always has one.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Record {
    /// The disk.
    pub disk: DiskId,
    /// The name of the disk in the guest, for example `xvda`.
    pub name: String,
    /// The name of the guest, if it has one.
    pub domain: Option<String>,
    /// The image: what the toolstack wrote to the node `params`, or what replaces it.
    pub image: String,
    /// The number of processes that were started in place of one that has ended.
    pub restarts: u32,
    /// The phase of the disk's life.
    pub phase: Phase,
    /// The image that `image` replaces, until a process has opened `image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced: Option<Replaced>,
}

/// An image that is used again if the one that replaces it cannot be opened.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Replaced {
    /// The image.
    pub image: String,
    /// The process that has served it. When the node `kthread-pid` names another one, that has
    /// opened the new image.
    pub pid: u32,
}

/// A phase of a disk's life.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "state")]
pub enum Phase {
    /// A process is about to be started.
    Starting,
    /// A process was started. It has not opened the image yet.
    Opening {
        /// The process.
        pid: u32,
        /// Its start time in clock ticks after boot, which tells it from a later one of that
        /// number.
        start_time: u64,
    },
    /// A process has the image open.
    Running {
        /// The process.
        pid: u32,
        /// Its start time in clock ticks after boot, which tells it from a later one of that
        /// number.
        start_time: u64,
    },
    /// No process serves the disk.
    Failed {
        /// Why.
        cause: String,
    },
}

impl Phase {
    /// Returns the number of the process of the disk.
    pub fn pid(&self) -> Option<u32> {
        self.process().map(|(pid, _)| pid)
    }

    /// Returns number and start time of the process of the disk.
    pub fn process(&self) -> Option<(u32, u64)> {
        match self {
            Self::Opening { pid, start_time } | Self::Running { pid, start_time } => {
                Some((*pid, *start_time))
            }
            Self::Starting | Self::Failed { .. } => None,
        }
    }

    /// Returns `true` if a process has the image open.
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, EventKind, HostStatus, StorageState, StorageStatus};

    #[test]
    fn calls_have_the_shape_of_varlink() {
        let disk = "5/51712".parse().unwrap();
        for (call, json) in [
            (AgentCall::List, r#"{"method":"rblkd.List"}"#),
            (
                AgentCall::Pause { disk },
                r#"{"method":"rblkd.Pause","parameters":{"disk":"5/51712"}}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&call).unwrap(), json);
            assert_eq!(serde_json::from_str::<AgentCall>(json).unwrap(), call);
        }
    }

    /// Returns the names of the fields of a value, sorted.
    fn fields(value: &impl Serialize) -> Vec<String> {
        let value = serde_json::to_value(value).unwrap();
        let mut names: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        names.sort();
        names
    }

    /// Returns the names of the fields of a method or a type of the description, sorted.
    fn described(item: &str) -> Vec<String> {
        let text: Vec<&str> = INTERFACE
            .lines()
            .filter(|line| !line.trim().starts_with('#'))
            .collect();
        let text = text.join(" ");
        let (_, rest) = text.split_once(item).unwrap_or_else(|| panic!("no {item}"));
        let (fields, _) = rest.split_once(')').unwrap();
        let fields = fields.trim_start_matches([' ', '(']).split(',');
        let names = fields.filter_map(|field| Some(field.split_once(':')?.0.trim().to_owned()));
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn the_description_has_all_calls_and_their_parameters() {
        let disk = "5/51712".parse().unwrap();
        let image = String::new();
        let calls = [
            AgentCall::List,
            AgentCall::Stats { disk },
            AgentCall::HostStatus,
            AgentCall::Events {
                after: 0,
                wait: false,
            },
            AgentCall::Interface,
            AgentCall::Pause { disk },
            AgentCall::Resume { disk },
            AgentCall::Resize {
                disk,
                size: Some(512),
            },
            AgentCall::Retarget { disk, image },
            AgentCall::Restart { disk },
        ];
        for call in &calls {
            let json = serde_json::to_value(call).unwrap();
            let name = json["method"]
                .as_str()
                .unwrap()
                .strip_prefix("rblkd.")
                .unwrap();
            let parameters = json.get("parameters").map(fields).unwrap_or_default();
            assert_eq!(described(&format!("method {name}(")), parameters, "{name}");
        }
        let methods = INTERFACE.lines().filter(|line| line.starts_with("method "));
        assert_eq!(methods.count(), calls.len());
    }

    #[test]
    fn the_description_has_the_fields_of_the_types() {
        let event = Event {
            number: 1,
            time: 2,
            disk: None,
            kind: EventKind::Served,
            text: String::new(),
        };
        assert_eq!(described("type Event ("), fields(&event));
        let storage = StorageStatus {
            name: String::new(),
            image: String::new(),
            state: StorageState::Up,
            since: 0,
            cause: None,
            latency_ms: None,
            checks: 0,
            failures: 0,
            history: Vec::new(),
        };
        assert_eq!(described("type StorageStatus ("), fields(&storage));
        let host = HostStatus {
            version: String::new(),
            pid: 1,
            uptime: 0,
            startup: Vec::new(),
            storages: Vec::new(),
        };
        assert_eq!(described("method HostStatus() -> ("), fields(&host));
        let record = Record {
            disk: "5/51712".parse().unwrap(),
            name: String::new(),
            domain: None,
            image: String::new(),
            restarts: 0,
            replaced: Some(Replaced {
                image: String::new(),
                pid: 1,
            }),
            phase: Phase::Starting,
        };
        assert_eq!(described("type Record ("), fields(&record));
    }
}
