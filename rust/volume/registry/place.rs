// SPDX-License-Identifier: GPL-2.0-only

//! Each place, which is a pool, a Gluster volume or a directory, belongs to one storage of one
//! registry.
//!
//! The name of an image at the place, its mark, says to which one. Otherwise a collection would
//! remove the images of another storage or registry, which have no name in this one.

use super::{Registry, StorageEntry};
use crate::record::{mark_name, marked_uuid, parse, uuid_of, ROOT};
use crate::storage::Storage;
use crate::store::Store;
use engine::{Errno, Error, Result};

impl<S: Store> Registry<S> {
    /// Has a place belong to a storage. The error is `EEXIST` if it belongs to another one.
    pub(super) fn take_place(&self, storage: &dyn Storage, entry: &StorageEntry) -> Result<()> {
        self.check_place(storage, entry)?;
        let mark = mark_name(&entry.uuid);
        storage.create(&mark, 0)?;
        // Of two that take a place at once, the one whose list is the later one sees both marks.
        let checked = self.check_place(storage, entry);
        if checked.is_err() {
            storage.remove(&mark, &[])?;
        }
        checked
    }

    /// Checks that a place has no mark of another storage.
    fn check_place(&self, storage: &dyn Storage, entry: &StorageEntry) -> Result<()> {
        let images = storage.list()?;
        let mut marks = images.iter().filter_map(|image| marked_uuid(image));
        match marks.find(|uuid| *uuid != entry.uuid) {
            Some(other) => Err(self.taken_place(entry, other)),
            None => Ok(()),
        }
    }

    /// Returns the error for a place that belongs to the storage with the uuid `other`.
    fn taken_place(&self, entry: &StorageEntry, other: &str) -> Error {
        let prefix = format!("{ROOT}storage/");
        let entries = match self.store.list(&prefix) {
            Ok(entries) => entries,
            Err(error) => return error,
        };
        let is_other = |value: StorageEntry| value.uuid == other;
        let known = entries
            .iter()
            .find(|entry| parse(entry).is_ok_and(is_other));
        let uri = &entry.uri;
        match known.and_then(|entry| entry.key.strip_prefix(&prefix)) {
            Some(name) => Error::new(
                Errno::EXIST,
                format!("{uri} is the storage {name} already"),
                "use that one, or another pool, Gluster volume or directory",
            ),
            None => Error::new(
                Errno::EXIST,
                format!("{uri} belongs to another registry: it has {}", mark_name(other)),
                "use another pool, Gluster volume or directory; if that registry no longer exists, \
                 remove that image",
            ),
        }
    }

    /// Checks that the place of a storage can be used and is its own. Returns the number of images
    /// that are volumes.
    pub fn check_storage(&self, name: &str) -> Result<usize> {
        let (entry, opened) = self.open_storage(name)?;
        let images = opened.list()?;
        check_mark(&images, &entry)?;
        Ok(images
            .iter()
            .filter(|image| uuid_of(image).is_some())
            .count())
    }
}

/// Checks that the images of a place include the mark of its storage, and no other one.
pub(super) fn check_mark(images: &[String], entry: &StorageEntry) -> Result<()> {
    let StorageEntry { uri, uuid } = entry;
    let mut marks = images.iter().filter_map(|image| marked_uuid(image));
    if let Some(other) = marks.clone().find(|other| other != uuid) {
        return Err(Error::new(
            Errno::STALE,
            format!(
                "{uri} belongs to another storage: it has {}",
                mark_name(other)
            ),
            "check that the URI names the same place on each host; if the other storage no longer \
             exists, remove that image",
        ));
    }
    match marks.next() {
        Some(_) => Ok(()),
        None => Err(Error::new(
            Errno::STALE,
            format!(
                "{uri} is not the place that was added: it has no {}",
                mark_name(uuid)
            ),
            "check that the URI names the same place on each host, and that a directory is mounted",
        )),
    }
}

/// Removes the mark of a storage from its place.
pub(super) fn leave(storage: &dyn Storage, uuid: &str) -> Result<()> {
    match storage.remove(&mark_name(uuid), &[]) {
        Err(error) if error.errno() != Errno::NOENT => Err(error),
        _ => Ok(()),
    }
}

/// Returns the error for a storage that was removed while its mark stays.
pub(super) fn not_left(entry: &StorageEntry, error: &Error) -> Error {
    let (uri, mark) = (&entry.uri, mark_name(&entry.uuid));
    Error::new(
        error.errno(),
        format!(
            "the storage was removed, but {mark} is still in {uri}: {}",
            error.cause()
        ),
        "remove that image before the place is used again",
    )
}
