// SPDX-License-Identifier: GPL-2.0-only

//! Writes that may be lost: their numbers, and a file of the disk for the process after this one.

use crate::error::{Error, Result};
use crate::options::Options;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The contents of a record: nothing can be lost, a server that ends may lose something, a flush
/// has failed.
const CLEAN: &[u8] = b"0";
const DIRTY: &[u8] = b"1";
const LOST: &[u8] = b"2";

/// Numbers of writes, discards and write zeroes.
#[derive(Default)]
pub(crate) struct Writes {
    completed: AtomicU64,
    /// Number of those that were flushed.
    flushed: AtomicU64,
    record: Option<Record>,
}

/// A file that says if there are completed writes that were not flushed, for the process after this
/// one.
struct Record {
    file: File,
    is_dirty: AtomicBool,
    /// Is locked while the file changes.
    changing: Mutex<()>,
}

impl Writes {
    /// Returns numbers whose state is in a file, which is created.
    pub(crate) fn in_file(path: &Path) -> io::Result<Self> {
        Ok(Self {
            record: Some(Record {
                file: create(path)?,
                is_dirty: AtomicBool::new(false),
                changing: Mutex::default(),
            }),
            ..Self::default()
        })
    }

    /// Returns the number of those that have completed.
    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::SeqCst)
    }

    /// Takes the completion of one into account.
    pub(crate) fn add(&self) {
        self.completed.fetch_add(1, Ordering::SeqCst);
        if let Some(record) = &self.record {
            record.add();
        }
    }

    /// Takes the completion of a flush into account, at whose submission there were `completed`
    /// writes.
    pub(crate) fn flush(&self, completed: u64) {
        self.flushed.fetch_max(completed, Ordering::SeqCst);
        if let Some(record) = &self.record {
            record.flush(|| self.is_dirty());
        }
    }

    /// Returns `true` if there are completed writes that were not flushed.
    pub(crate) fn is_dirty(&self) -> bool {
        self.flushed.load(Ordering::SeqCst) < self.completed()
    }
}

impl Record {
    /// Records that a write has completed.
    fn add(&self) {
        if self.is_dirty.load(Ordering::SeqCst) {
            return;
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_dirty.load(Ordering::SeqCst) {
            self.change(true);
        }
    }

    /// Records that a flush has completed.
    fn flush(&self, is_dirty: impl Fn() -> bool) {
        if is_dirty() {
            return;
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_dirty.swap(false, Ordering::SeqCst) {
            // A write that completes after this question finds that the flag is not set, and waits
            // for the lock.
            self.change(is_dirty());
        }
    }

    /// Changes the file, which is locked.
    fn change(&self, is_dirty: bool) {
        let written = self.file.write_all_at(contents(is_dirty), 0);
        // After an error, which a file of this size has only if its file system fails, the next
        // write tries again.
        self.is_dirty
            .store(is_dirty && written.is_ok(), Ordering::SeqCst);
    }
}

fn contents(is_dirty: bool) -> &'static [u8] {
    match is_dirty {
        true => DIRTY,
        false => CLEAN,
    }
}

/// Returns the path of the record of a disk.
pub(crate) fn record(runtime_dir: &Path, disk: u64) -> PathBuf {
    runtime_dir.join(format!("rblk-{disk:x}.writes"))
}

/// Removes the record of a disk that has ended.
pub(crate) fn remove(options: &Options) -> Result<()> {
    let Some(disk) = options.disk else {
        return Ok(());
    };
    let path = record(&options.runtime_dir, disk);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error(&error, &path)),
        _ => Ok(()),
    }
}

/// Returns the error of a record that cannot be used.
pub(crate) fn file_error(error: &io::Error, path: &Path) -> Error {
    Error::from_io(error, path.display(), "check the directory of sockets")
}

/// Creates a record without writes, in place of one that is there.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let file = File::create(path)?;
    file.write_all_at(CLEAN, 0)?;
    Ok(file)
}

/// Returns `true` if a process has left a record with completed writes that it had not flushed.
pub(crate) fn is_dirty(path: &Path) -> bool {
    fs::read(path).is_ok_and(|contents| contents == DIRTY)
}

/// The fact that a flush has failed, so that writes before it may be lost.
#[derive(Default)]
pub(crate) struct LostWrites {
    is_set: AtomicBool,
    record: Option<File>,
}

impl LostWrites {
    /// Returns the flag of a disk, which is set if a process before this one has set it and the
    /// guest is still the same.
    pub(crate) fn of_disk(disk: u64, options: &Options) -> Result<Self> {
        let path = record(&options.runtime_dir, disk);
        let is_set = options.continues && fs::read(&path).is_ok_and(|contents| contents == LOST);
        let file = match is_set {
            true => File::options().write(true).open(&path),
            false => create(&path),
        };
        Ok(Self {
            is_set: is_set.into(),
            record: Some(file.map_err(|error| file_error(&error, &path))?),
        })
    }

    /// Returns `true` if a flush has failed.
    pub(crate) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// Records that a flush has failed.
    pub(crate) fn set(&self) {
        self.is_set.store(true, Ordering::Release);
        if let Some(record) = &self.record {
            // The file keeps its size. If its file system fails, this process knows it at least.
            let _ = record.write_all_at(LOST, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    #[test]
    fn the_record_says_what_was_not_flushed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        assert!(!is_dirty(&path));
        let writes = Writes::in_file(&path).unwrap();
        assert!(!is_dirty(&path));
        for _ in 0..2 {
            writes.add();
            assert!(is_dirty(&path));
            let before = writes.completed();
            writes.add();
            // The second one may not be durable.
            writes.flush(before);
            assert!(is_dirty(&path));
            writes.flush(writes.completed());
            assert!(!is_dirty(&path));
        }
        writes.add();
        drop(writes);
        assert!(is_dirty(&path));
        Writes::in_file(&path).unwrap();
        assert!(!is_dirty(&path));
    }

    #[test]
    fn a_write_is_recorded_while_another_queue_flushes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let writes = Writes::in_file(&path).unwrap();
        let step = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..1000 {
                    step.wait();
                    writes.flush(writes.completed());
                    step.wait();
                }
            });
            for _ in 0..1000 {
                step.wait();
                writes.add();
                let was_recorded = is_dirty(&path) || !writes.is_dirty();
                step.wait();
                assert!(was_recorded);
                assert_eq!(is_dirty(&path), writes.is_dirty());
            }
        });
    }

    #[test]
    fn a_failed_flush_is_known_to_the_guest_of_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let options = |continues| Options {
            continues,
            runtime_dir: dir.path().to_owned(),
            ..Options::default()
        };
        let lost = LostWrites::of_disk(7, &options(true)).unwrap();
        assert!(!lost.is_set());
        lost.set();
        for _ in 0..2 {
            assert!(LostWrites::of_disk(7, &options(true)).unwrap().is_set());
        }
        assert!(!LostWrites::of_disk(8, &options(true)).unwrap().is_set());
        assert!(!is_dirty(&record(dir.path(), 7)));
        assert!(!LostWrites::of_disk(7, &options(false)).unwrap().is_set());
        assert!(!LostWrites::of_disk(7, &options(true)).unwrap().is_set());
    }
}
