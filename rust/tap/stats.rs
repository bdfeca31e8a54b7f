// SPDX-License-Identifier: GPL-2.0-only

//! Counters of a disk, in the file that `xentop` reads.
//!
//! The layout is that of `struct stats` of blktap's `drivers/tapdisk-stats.h`, which
//! `tools/libs/stat/xenstat_linux.c` of Xen reads from `/dev/shm/td3-PID/vbd-DOMAIN-DEVICE`.

use serde_json::json;
use serde_json::Value;
use std::fs;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use xen_user::memory::Pages;

/// A counter, by its place in the file in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub(crate) enum Counter {
    /// Requests that had to wait for memory.
    Waited = 8,
    /// Reads that were started.
    ReadsStarted = 16,
    /// Reads that were answered.
    Reads = 24,
    /// Sectors of reads.
    SectorsRead = 32,
    /// Writes that were started.
    WritesStarted = 48,
    /// Writes that were answered.
    Writes = 56,
    /// Sectors of writes.
    SectorsWritten = 64,
    /// Requests that were answered with an error.
    Errors = 80,
    // Behind what xentop reads.
    /// Flushes and barriers.
    Flushes = 96,
    /// Discards.
    Discards = 104,
    /// Requests that were refused, because they were not valid.
    Refused = 112,
    /// Tries of requests after an error of the image that passes.
    Retries = 120,
    /// Requests that a killed process had taken and this one has started again.
    Adopted = 128,
}

const ALL: [(&str, Counter); 13] = [
    ("waited", Counter::Waited),
    ("reads_started", Counter::ReadsStarted),
    ("reads", Counter::Reads),
    ("sectors_read", Counter::SectorsRead),
    ("writes_started", Counter::WritesStarted),
    ("writes", Counter::Writes),
    ("sectors_written", Counter::SectorsWritten),
    ("errors", Counter::Errors),
    ("flushes", Counter::Flushes),
    ("discards", Counter::Discards),
    ("refused", Counter::Refused),
    ("retries", Counter::Retries),
    ("adopted", Counter::Adopted),
];

/// Counters of a disk. Dropping them removes the file.
pub(crate) struct Stats {
    counters: Pages,
    dir: Option<PathBuf>,
}

impl Stats {
    /// Creates the file in a directory below `root`, which is `/dev/shm`.
    pub(crate) fn in_file(root: &Path, domain: u16, device: u32) -> io::Result<Self> {
        let dir = root.join(format!("td3-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let path = dir.join(format!("vbd-{domain}-{device}"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let counters = Pages::of_file(&file, 1)?;
        // The version of the layout.
        counters.store(0, 1);
        Ok(Self {
            counters,
            dir: Some(dir),
        })
    }

    /// Returns counters without a file.
    pub(crate) fn private() -> io::Result<Self> {
        Ok(Self {
            counters: Pages::anonymous(1)?,
            dir: None,
        })
    }

    #[inline]
    pub(crate) fn add(&self, counter: Counter, value: u64) {
        self.counters.add(counter as usize, value);
    }

    fn get(&self, counter: Counter) -> u64 {
        let mut bytes = [0; 8];
        self.counters.read(counter as usize, &mut bytes);
        u64::from_ne_bytes(bytes)
    }

    /// Returns all counters by their names.
    pub(crate) fn to_json(&self) -> Value {
        let all = ALL.iter();
        let object = all.map(|(name, counter)| (name.to_string(), json!(self.get(*counter))));
        Value::Object(object.collect())
    }
}

impl Drop for Stats {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            // A file that stays does no harm: its process is gone.
            let _ = fs::remove_dir_all(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_the_layout_that_xentop_reads() {
        let root = tempfile::tempdir().unwrap();
        let stats = Stats::in_file(root.path(), 5, 51712).unwrap();
        stats.add(Counter::Reads, 2);
        stats.add(Counter::Reads, 1);
        stats.add(Counter::SectorsWritten, 8);
        let dir = root.path().join(format!("td3-{}", std::process::id()));
        let bytes = fs::read(dir.join("vbd-5-51712")).unwrap();
        let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((number(0), number(24), number(64)), (1, 3, 8));
        assert_eq!(stats.to_json()["reads"], 3);
        drop(stats);
        assert!(!dir.exists());
    }
}
