// SPDX-License-Identifier: GPL-2.0-only

//! Counters of a disk, in the file that `xentop` reads.
//!
//! The layout is that of `struct stats` of blktap's `drivers/tapdisk-stats.h`, which
//! `tools/libs/stat/xenstat_linux.c` of Xen reads from `/dev/shm/td3-PID/vbd-DOMAIN-DEVICE`.

use api::Counters;
use std::fs;
use std::fs::DirBuilder;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use xen_user::memory::Pages;

/// The name of the directory of a process, before its number.
const PREFIX: &str = "td3-";

/// A counter, by its place in the file in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub(crate) enum Counter {
    /// Requests that had to wait for memory, or for others of the domain.
    Waited = 8,
    /// Reads that were started.
    ReadsStarted = 16,
    /// Reads that were answered.
    Reads = 24,
    /// Sectors of reads.
    SectorsRead = 32,
    /// Microseconds that reads have taken.
    ReadTime = 40,
    /// Writes that were started.
    WritesStarted = 48,
    /// Writes that were answered.
    Writes = 56,
    /// Sectors of writes.
    SectorsWritten = 64,
    /// Microseconds that writes have taken.
    WriteTime = 72,
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
    /// Requests that were reported because they took too long.
    Stuck = 136,
}

/// Counters of a disk.
pub(crate) struct Stats(Pages);

/// Returns the directory below `root`, which is `/dev/shm`, that `xentop` looks for by the number
/// of the process.
pub(crate) fn directory(root: &Path, pid: u32) -> PathBuf {
    root.join(format!("{PREFIX}{pid}"))
}

impl Stats {
    /// Creates the file of a disk in the directory of the process, below `root`, where any user may
    /// create files. Removes the directories of processes that were killed.
    pub(crate) fn in_file(root: &Path, pid: u32, domain: u16, device: u32) -> io::Result<Self> {
        remove_stale(root);
        let dir = directory(root, pid);
        create_dir(&dir)?;
        let path = dir.join(format!("vbd-{domain}-{device}"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        let counters = Pages::of_file(&file, 1)?;
        // The version of the layout.
        counters.store(0, 1);
        Ok(Self(counters))
    }

    /// Returns counters without a file.
    pub(crate) fn private() -> io::Result<Self> {
        Ok(Self(Pages::anonymous(1)?))
    }

    #[inline]
    pub(crate) fn add(&self, counter: Counter, value: u64) {
        self.0.add(counter as usize, value);
    }

    fn get(&self, counter: Counter) -> u64 {
        let mut bytes = [0; 8];
        self.0.read(counter as usize, &mut bytes);
        u64::from_ne_bytes(bytes)
    }

    /// Returns the counters for `rblk`.
    pub(crate) fn counters(&self) -> Counters {
        Counters {
            reads_started: self.get(Counter::ReadsStarted),
            reads: self.get(Counter::Reads),
            sectors_read: self.get(Counter::SectorsRead),
            writes_started: self.get(Counter::WritesStarted),
            writes: self.get(Counter::Writes),
            sectors_written: self.get(Counter::SectorsWritten),
            flushes: self.get(Counter::Flushes),
            discards: self.get(Counter::Discards),
            errors: self.get(Counter::Errors),
            refused: self.get(Counter::Refused),
            retries: self.get(Counter::Retries),
            waited: self.get(Counter::Waited),
            stuck: self.get(Counter::Stuck),
            read_us: self.get(Counter::ReadTime),
            write_us: self.get(Counter::WriteTime),
            adopted: self.get(Counter::Adopted),
        }
    }
}

/// Creates the directory of a process. One that is there must be of this user.
fn create_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_own(dir) => Ok(()),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", dir.display()),
        )),
        Ok(()) => Ok(()),
    }
}

/// Returns `true` if a path is that of a directory of this user.
fn is_own(path: &Path) -> bool {
    let user = rustix::process::getuid().as_raw();
    fs::symlink_metadata(path).is_ok_and(|data| data.is_dir() && data.uid() == user)
}

/// Removes the directories of this user whose processes have ended.
fn remove_stale(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
        let has_ended = pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if has_ended && is_own(&entry.path()) {
            // What stays uses a page.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::chown;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_file_has_the_layout_that_xentop_reads() {
        let root = tempfile::tempdir().unwrap();
        let dir = directory(root.path(), 7);
        assert_eq!(dir.file_name().unwrap(), "td3-7");
        let stats = Stats::in_file(root.path(), 7, 5, 51712).unwrap();
        stats.add(Counter::Reads, 2);
        stats.add(Counter::Reads, 1);
        stats.add(Counter::SectorsWritten, 8);
        stats.add(Counter::ReadTime, 50);
        stats.add(Counter::WriteTime, 70);
        let bytes = fs::read(dir.join("vbd-5-51712")).unwrap();
        let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((number(0), number(24), number(64)), (1, 3, 8));
        assert_eq!((number(40), number(72)), (50, 70));
        assert_eq!(stats.counters().reads, 3);
    }

    #[test]
    fn files_of_others_are_left_alone() {
        let (root, own) = (tempfile::tempdir().unwrap(), std::process::id());
        let victim = root.path().join("victim");
        fs::write(&victim, "data").unwrap();
        let in_file = || Stats::in_file(root.path(), own, 5, 51712).map(drop);
        // A directory that is none, and a file that is a link.
        let dir = directory(root.path(), own);
        symlink(root.path(), &dir).unwrap();
        in_file().unwrap_err();
        fs::remove_file(&dir).unwrap();
        fs::create_dir(&dir).unwrap();
        symlink(&victim, dir.join("vbd-5-51712")).unwrap();
        in_file().unwrap_err();
        assert_eq!(fs::read(&victim).unwrap(), b"data");
        fs::remove_file(dir.join("vbd-5-51712")).unwrap();
        in_file().unwrap();
        in_file().unwrap();
        if rustix::process::getuid().is_root() {
            chown(&dir, Some(1), None).unwrap();
            in_file().unwrap_err();
        }
    }

    #[test]
    fn directories_of_killed_processes_are_removed() {
        let root = tempfile::tempdir().unwrap();
        // No process has this number.
        let stale = directory(root.path(), u32::MAX);
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("vbd-1-1"), "data").unwrap();
        let other = root.path().join("td3-other");
        fs::create_dir(&other).unwrap();
        let own = std::process::id();
        for _ in 0..2 {
            Stats::in_file(root.path(), own, 5, 51712).unwrap();
        }
        assert!(!stale.exists() && other.exists() && directory(root.path(), own).exists());
    }
}
