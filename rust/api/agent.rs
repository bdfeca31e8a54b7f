// SPDX-License-Identifier: GPL-2.0-only

//! The calls that `rblkd` answers.

use crate::disk::{DiskId, DiskStatus};
use serde::{Deserialize, Serialize};

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
    /// Reads the size of a disk's image again and tells the guest.
    #[serde(rename = "rblkd.Resize")]
    Resize {
        /// The disk.
        disk: DiskId,
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
    /// The number of processes that were started in place of one that died.
    pub restarts: u32,
    /// The phase of the disk's life.
    pub phase: Phase,
}

/// A phase of a disk's life.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "state")]
pub enum Phase {
    /// A process is about to be started.
    Starting,
    /// A process was started.
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
    /// Returns the process that serves the disk.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Running { pid, .. } => Some(*pid),
            Self::Starting | Self::Failed { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
