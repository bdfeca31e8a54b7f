// SPDX-License-Identifier: GPL-2.0-only

//! The directory of sockets and records.

use crate::agent::Record;
use crate::disk::DiskId;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The directory that `rblkd`, `rblktap` and `rblk` share, normally [`RunDir::DEFAULT`].
///
/// | file | contents |
/// |---|---|
/// | `sock` | the socket of `rblkd` |
/// | `D-N.json` | the [`Record`] of disk `D/N` |
/// | `D-N.sock` | the control socket of its `rblktap` |
/// | `D-N.inflight` | the table of its requests in flight |
/// | `D-N.nbd` | the NBD socket that the device model of an HVM guest opens |
/// | `D-N.log` | the messages of its `rblktap` |
/// | `D.paused` | the guest is paused because its storage does not answer |
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The path unless another one is configured.
    pub const DEFAULT: &str = "/run/rblk";

    /// Names a directory. It is not created.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the path of `rblkd`'s socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.0.join("sock")
    }

    /// Returns the path of the control socket of a disk's `rblktap`.
    pub fn control_socket(&self, disk: DiskId) -> PathBuf {
        self.file(disk, "sock")
    }

    /// Returns the path of the table of a disk's requests in flight.
    fn in_flight_table(&self, disk: DiskId) -> PathBuf {
        self.file(disk, "inflight")
    }

    /// Returns the path of the NBD socket of a disk's image.
    pub fn nbd_socket(&self, disk: DiskId) -> PathBuf {
        self.file(disk, "nbd")
    }

    /// Returns the path of the messages of a disk's `rblktap`.
    pub fn log(&self, disk: DiskId) -> PathBuf {
        self.file(disk, "log")
    }

    /// Returns the path of a disk's record.
    fn record(&self, disk: DiskId) -> PathBuf {
        self.file(disk, "json")
    }

    fn file(&self, disk: DiskId, suffix: &str) -> PathBuf {
        self.0
            .join(format!("{}-{}.{suffix}", disk.domid, disk.devid))
    }

    /// Reads a disk's record. Returns `None` if there is none.
    pub fn read_record(&self, disk: DiskId) -> io::Result<Option<Record>> {
        read_json(&self.record(disk))
    }

    /// Writes a disk's record, in place of an earlier one.
    ///
    /// A reader finds the earlier one or the new one, also after a kill at any moment. An error
    /// names the file, and what to do if its file system is full.
    pub fn write_record(&self, record: &Record) -> io::Result<()> {
        let path = self.record(record.disk);
        self.replace_record(&path, record).map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::StorageFull => "; make room in its file system",
                _ => "",
            };
            let text = format!("{}: {error}{remedy}", path.display());
            io::Error::new(error.kind(), text)
        })
    }

    fn replace_record(&self, path: &Path, record: &Record) -> io::Result<()> {
        let mut text = serde_json::to_vec(record)?;
        text.push(b'\n');
        let new = self.file(record.disk, "json.new");
        let replaced = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
        if replaced.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(new);
        }
        replaced
    }

    /// Reads all records, in the order of the disks. Files that are no records are left out.
    pub fn records(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.extension().is_some_and(|suffix| suffix == "json") {
                records.extend(read_json::<Record>(&path).ok().flatten());
            }
        }
        records.sort_by_key(|record| record.disk);
        Ok(records)
    }

    /// Records that a guest is paused, or that it is not.
    pub fn set_paused(&self, domid: u16, is_paused: bool) -> io::Result<()> {
        let path = self.0.join(format!("{domid}.paused"));
        if is_paused {
            return fs::write(path, "");
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the guests that are recorded as paused.
    pub fn paused_guests(&self) -> io::Result<BTreeSet<u16>> {
        let mut guests = BTreeSet::new();
        for entry in fs::read_dir(&self.0)? {
            let name = entry?.file_name();
            let domid = name.to_str().and_then(|name| name.strip_suffix(".paused"));
            guests.extend(domid.and_then(|domid| domid.parse::<u16>().ok()));
        }
        Ok(guests)
    }

    /// Removes all files of a disk, the record last.
    pub fn remove(&self, disk: DiskId) -> io::Result<()> {
        for path in [
            self.control_socket(disk),
            self.in_flight_table(disk),
            self.nbd_socket(disk),
            self.log(disk),
            self.record(disk),
        ] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Phase;

    fn record(domid: u16, devid: u32) -> Record {
        Record {
            disk: DiskId { domid, devid },
            name: "xvda".to_owned(),
            domain: None,
            image: "aio:/a".to_owned(),
            restarts: 0,
            replaced: None,
            phase: Phase::Running {
                pid: 7,
                start_time: 9,
            },
        }
    }

    #[test]
    fn records_are_written_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let [first, mut second] = [record(5, 51712), record(10, 51712)];
        assert_eq!(run.read_record(first.disk).unwrap(), None);
        run.write_record(&second).unwrap();
        run.write_record(&first).unwrap();
        second.phase = Phase::Starting;
        run.write_record(&second).unwrap();
        fs::write(dir.path().join("1-1.json"), "{").unwrap();
        assert_eq!(run.records().unwrap(), [first.clone(), second.clone()]);
        assert_eq!(run.read_record(second.disk).unwrap(), Some(second));
        run.remove(first.disk).unwrap();
        run.remove(first.disk).unwrap();
        assert_eq!(run.read_record(first.disk).unwrap(), None);
    }

    #[test]
    fn paused_guests_are_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        fs::write(dir.path().join("x.paused"), "").unwrap();
        for domid in [7, 5, 7] {
            run.set_paused(domid, true).unwrap();
        }
        assert_eq!(run.paused_guests().unwrap(), [5, 7].into());
        run.set_paused(7, false).unwrap();
        run.set_paused(7, false).unwrap();
        assert_eq!(run.paused_guests().unwrap(), [5].into());
    }
}
