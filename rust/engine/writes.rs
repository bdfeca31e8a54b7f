// SPDX-License-Identifier: GPL-2.0-only

//! Numbers of writes, to know what a server that ends may lose.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The contents of a record.
const CLEAN: &[u8] = b"0";
const DIRTY: &[u8] = b"1";

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
}
