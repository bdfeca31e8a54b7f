// SPDX-License-Identifier: GPL-2.0-only

//! The name of a disk, and the commands that its process `rblktap` answers.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

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
#[serde(tag = "command", rename_all = "lowercase")]
pub enum DiskCommand {
    /// Returns a [`DiskStatus`].
    Stats,
    /// Takes no more requests from the rings. Those in flight continue.
    Pause,
    /// Takes requests again.
    Resume,
    /// Reads the size of the image again and tells the guest.
    Resize,
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
    /// The disk is paused.
    pub paused: bool,
    /// The queues, of which there are none while no frontend is connected.
    pub queues: Vec<QueueStatus>,
    /// The counters of the disk.
    pub counters: Counters,
}

/// The state of a queue.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct QueueStatus {
    /// The number of requests in flight.
    pub in_flight: u32,
    /// The age in milliseconds of the oldest one.
    pub oldest_ms: Option<u64>,
    /// The queue is paused and has no request in flight.
    pub paused: bool,
}

/// The counters of a disk since its process was started.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Counters {
    /// Reads that were answered.
    pub reads: u64,
    /// Sectors of 512 bytes that were read.
    pub sectors_read: u64,
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
        let answer = r#"{"domain":5,"device":51712,"pid":7,"state":4,"sectors":8,"block_size":512,
            "paused":false,"queues":[{"in_flight":1,"oldest_ms":null,"paused":false}],
            "counters":{"reads":3,"waited":1}}"#;
        let status: DiskStatus = serde_json::from_str(answer).unwrap();
        assert_eq!((status.counters.reads, status.queues.len()), (3, 1));
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
