// SPDX-License-Identifier: GPL-2.0-only

//! The name of a disk, and the commands that its process `rblktap` answers.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The exit status of `rblktap` for a disk that must not be served any more: its guest is
/// connected, and another disk has used the volume meanwhile.
pub const EXIT_STALE: u8 = 4;

/// The numbers of a disk: its guest's domain id and the virtual device number.
///
/// Its text is `DOMID/DEVID`, for example `5/51712`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskId {
    /// The domain id of the frontend.
    pub domid: u16,
    /// The virtual device number, for example 51712 for `xvda`.
    pub devid: u32,
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domid, self.devid)
    }
}

impl FromStr for DiskId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| format!("{text:?} is not DOMID/DEVID"))
    }
}

/// Parses the one text that is written for a disk: no sign, no leading zero.
fn parse(text: &str) -> Option<DiskId> {
    let (domid, devid) = text.split_once('/')?;
    let disk = DiskId {
        domid: domid.parse().ok()?,
        devid: devid.parse().ok()?,
    };
    (disk.to_string() == text).then_some(disk)
}

impl TryFrom<String> for DiskId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DiskId> for String {
    fn from(disk: DiskId) -> Self {
        disk.to_string()
    }
}

/// A command that `rblktap` answers on its control socket.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum DiskCommand {
    /// Returns a [`DiskStatus`].
    Stats,
    /// Takes no more requests from the rings. Those in flight continue. A process that replaces
    /// this one does not take any either.
    Pause,
    /// The same, until [`Self::Resume`], the end of this process, or some time has passed.
    Drain,
    /// Takes requests again.
    Resume,
    /// Enlarges the image if there is a size, reads its size again, and tells the guest.
    Resize {
        /// The new size in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// Limits the disk to its share of what its domain may use.
    SetQuota(Quota),
}

/// The greatest amounts that a disk may use at a time.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Quota {
    /// Pages of 4 KiB for data of requests.
    pub pages: u32,
    /// Requests in flight.
    pub requests: u32,
}

impl Quota {
    /// Returns the quota of one of `count` users that share this one: at least one page and one
    /// request.
    pub fn share(self, count: usize) -> Self {
        let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
        Self {
            pages: (self.pages / count).max(1),
            requests: (self.requests / count).max(1),
        }
    }
}

/// The answer of `rblktap` to a command.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum DiskAnswer {
    /// To [`DiskCommand::Stats`].
    Status(Box<DiskStatus>),
    /// To [`DiskCommand::Pause`], [`DiskCommand::Drain`] and [`DiskCommand::Resume`].
    Paused {
        /// No more requests are taken.
        paused: bool,
    },
    /// To [`DiskCommand::SetQuota`].
    Quota(Quota),
    /// To [`DiskCommand::Resize`].
    Resized {
        /// The size in sectors of 512 bytes.
        sectors: u64,
    },
}

/// The properties and the state of a disk, and its counters since its process was started.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DiskStatus {
    /// The process.
    pub pid: u32,
    /// The size in sectors of 512 bytes.
    pub sectors: u64,
    /// The logical block size in bytes.
    pub block_size: u32,
    /// The disk is paused, or drained.
    pub paused: bool,
    /// The disk is paused for a successor too.
    #[serde(default)]
    pub stays_paused: bool,
    /// The pages and requests that the disk may use.
    pub quota: Quota,
    /// The queues, of which there are none while no frontend is connected.
    pub queues: Vec<QueueStatus>,
    /// The counters of the disk.
    pub counters: Counters,
}

/// The state of a queue.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct QueueStatus {
    /// The number of requests in flight.
    pub in_flight: u64,
    /// The oldest one.
    pub oldest: Option<OldestRequest>,
    /// The queue is paused and has no request in flight.
    pub paused: bool,
}

/// A request in flight.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct OldestRequest {
    /// The operation.
    pub operation: Operation,
    /// The first sector of 512 bytes.
    pub sector: u64,
    /// The number of sectors.
    pub sectors: u64,
    /// The number of tries after an error of the image that may pass.
    pub retries: u32,
    /// The time since it was taken from the ring, in milliseconds.
    pub age_ms: u64,
}

/// The operation of a request.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Data is read.
    Read,
    /// Data is written.
    Write,
    /// Written data becomes durable.
    Flush,
    /// A flush or a write that no other request passes.
    Barrier,
    /// Data is discarded.
    Discard,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Barrier => "barrier",
            Self::Discard => "discard",
        })
    }
}

/// The counters of a disk since its process was started.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Counters {
    /// Reads that were started.
    pub reads_started: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Sectors of 512 bytes that were read.
    pub sectors_read: u64,
    /// Writes that were started.
    pub writes_started: u64,
    /// Writes that were answered.
    pub writes: u64,
    /// Sectors of 512 bytes that were written.
    pub sectors_written: u64,
    /// Flushes and barriers.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Requests that were refused because they were not valid.
    pub refused: u64,
    /// Tries after an error of the image that may pass.
    pub retries: u64,
    /// Requests that had to wait for memory, or for others of the domain.
    pub waited: u64,
    /// Requests that were reported because they took too long.
    pub stuck: u64,
    /// The time that reads have taken together, in microseconds.
    pub read_us: u64,
    /// The time that writes have taken together, in microseconds.
    pub write_us: u64,
    /// Requests that a killed process had taken and its successor has started again.
    pub adopted: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_and_their_answers_are_those_of_rblktap() {
        let json = serde_json::to_string(&DiskCommand::Pause).unwrap();
        assert_eq!(json, r#"{"command":"pause"}"#);
        let answer = r#"{"domain":5,"device":51712,"pid":7,"sectors":8,"block_size":512,
            "paused":false,"queues":[{"in_flight":1,"oldest":null,"paused":false}],
            "quota":{"pages":8,"requests":4},
            "counters":{"reads":3,"other":1}}"#;
        let answer: DiskAnswer = serde_json::from_str(answer).unwrap();
        let DiskAnswer::Status(status) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!((status.counters.reads, status.queues.len()), (3, 1));
        for (text, answer) in [
            (r#"{"paused":true}"#, DiskAnswer::Paused { paused: true }),
            (
                r#"{"pages":8,"requests":4}"#,
                DiskAnswer::Quota(Quota {
                    pages: 8,
                    requests: 4,
                }),
            ),
            (r#"{"sectors":8}"#, DiskAnswer::Resized { sectors: 8 }),
        ] {
            assert_eq!(serde_json::to_string(&answer).unwrap(), text);
            assert_eq!(serde_json::from_str::<DiskAnswer>(text).unwrap(), answer);
        }
    }

    #[test]
    fn a_quota_is_shared_equally() {
        let quota = Quota {
            pages: 100,
            requests: 2,
        };
        for (count, pages, requests) in [(0, 100, 2), (1, 100, 2), (3, 33, 1), (1000, 1, 1)] {
            assert_eq!(quota.share(count), Quota { pages, requests });
        }
        let json = serde_json::to_string(&DiskCommand::SetQuota(quota)).unwrap();
        assert_eq!(json, r#"{"command":"set-quota","pages":100,"requests":2}"#);
    }

    #[test]
    fn other_texts_name_no_disk() {
        for text in [
            "", "5", "5/", "/5", "+5/1", "05/1", "5/1/2", "65536/1", "5/x", "5/ 1",
        ] {
            assert!(text.parse::<DiskId>().is_err(), "{text}");
        }
        assert!(serde_json::from_str::<DiskId>(r#""../x""#).is_err());
    }

    proptest! {
        #[test]
        fn each_disk_has_one_text(domid: u16, devid: u32) {
            let disk = DiskId { domid, devid };
            prop_assert_eq!(disk.to_string().parse::<DiskId>().unwrap(), disk);
        }

        #[test]
        fn any_text_is_a_disk_or_refused(text in "[0-9/+ ]{0,12}") {
            if let Ok(disk) = text.parse::<DiskId>() {
                prop_assert_eq!(disk.to_string(), text);
            }
        }
    }
}
