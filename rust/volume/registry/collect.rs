// SPDX-License-Identifier: GPL-2.0-only

//! Removal of images without a name, and completion of changes whose process has died.

use super::{place, Registry, VolumeName};
use crate::record::{image_key, image_name, keys_of, parse, uuid_of, Pending, Volume, ROOT};
use crate::storage::Storage;
use crate::store::{Change, Entry, Store};
use engine::{Errno, Result};
use serde::Serialize;
use std::collections::HashSet;

/// The result of a collection.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Collected {
    /// The images that were removed.
    pub removed: Vec<String>,
    /// The images without a name that are not removed yet: a process creates them, or they have
    /// clones.
    pub waiting: Vec<String>,
    /// The volumes whose pending change was completed or undone.
    pub repaired: Vec<String>,
    /// The volumes without an image.
    pub missing: Vec<String>,
    /// The images that the registry does not know, and that are not removed unless that is asked
    /// for.
    pub unknown: Vec<String>,
}

impl<S: Store> Registry<S> {
    /// Removes the images of a storage that have no name and get none, and completes the changes of
    /// volumes whose process has died.
    ///
    /// It can run at any time, and on several hosts at once. Images that the registry does not know
    /// are removed only if `removes_unknown` is set: a process has created one after its time was
    /// over, or the registry was lost and comes from a copy that is older than they are.
    pub fn collect(&self, storage: &str, removes_unknown: bool) -> Result<Collected> {
        let (entry, opened) = self.open_storage(storage)?;
        // In this order: an image has a name, or an entry as an orphan, from before its creation
        // until after its removal.
        let images = opened.list()?;
        place::check_mark(&images, &entry)?;
        let entries = self.store.list(ROOT)?;
        let mut collected = Collected::default();
        for entry in with_prefix(&entries, &keys_of("name", storage)) {
            let volume: Volume = parse(entry)?;
            let name = VolumeName {
                storage: storage.to_owned(),
                volume: entry.key.rsplit('/').next().unwrap_or_default().to_owned(),
            };
            if !images.contains(&image_name(&volume.uuid)) && self.is_missing(&*opened, &volume)? {
                collected.missing.push(name.to_string());
                continue;
            }
            match self.repair(&*opened, &name, &volume, &entries) {
                Ok(true) => collected.repaired.push(name.to_string()),
                Ok(false) => {}
                // It was removed meanwhile.
                Err(error) if error.errno() == Errno::NOENT => {}
                Err(error) => return Err(error),
            }
        }
        let orphans = keys_of("orphan", storage);
        let orphans: HashSet<&str> = with_prefix(&entries, &orphans)
            .filter_map(|entry| entry.key.rsplit('/').next())
            .collect();
        let named = named_images(&entries, storage)?;
        let unknown = images.iter().filter_map(|image| uuid_of(image));
        let unknown = unknown.filter(|uuid| !named.contains(*uuid) && !orphans.contains(uuid));
        let unknown: Vec<&str> = unknown.collect();
        let removed: &[&str] = if removes_unknown { &unknown } else { &[] };
        for uuid in orphans.iter().chain(removed).copied() {
            let image = image_name(uuid);
            let intent = image_key("intent", storage, uuid);
            let is_busy = entries.iter().any(|entry| entry.key == intent);
            if !is_busy && self.collect_image(&*opened, storage, uuid)? {
                collected.removed.push(image);
            } else {
                collected.waiting.push(image);
            }
        }
        if !removes_unknown {
            collected.unknown = unknown.into_iter().map(image_name).collect();
        }
        Ok(collected)
    }

    /// Returns `true` if an image that was not listed is still not there.
    fn is_missing(&self, storage: &dyn Storage, volume: &Volume) -> Result<bool> {
        Ok(!storage.list()?.contains(&image_name(&volume.uuid)))
    }

    /// Removes an image without a name, and then its entry as an orphan. Returns `false` if it has
    /// clones.
    ///
    /// Nothing else can bind a name to it: the intent is gone, or this process has it.
    pub(super) fn collect_image(
        &self,
        storage: &dyn Storage,
        storage_name: &str,
        uuid: &str,
    ) -> Result<bool> {
        match remove_with_snapshots(storage, &image_name(uuid)) {
            Ok(()) => {}
            Err(error) if error.errno() == Errno::NOENT => {}
            Err(error) if matches!(error.errno(), Errno::BUSY | Errno::NOTEMPTY) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        // Another process that collects may have been faster.
        let key = |kind| Change::Delete(image_key(kind, storage_name, uuid));
        let _done = self
            .store
            .commit(&[], &[key("orphan"), key("intent"), key("user")])?;
        Ok(true)
    }

    /// Makes the entry of a volume and its image agree: ends a change whose process has died, and
    /// undoes what processes did that took longer than their lease. Returns `true` if there was
    /// something to do.
    fn repair(
        &self,
        storage: &dyn Storage,
        name: &VolumeName,
        volume: &Volume,
        entries: &[Entry],
    ) -> Result<bool> {
        let image = image_name(&volume.uuid);
        let is_late = self.remove_late_snapshots(storage, name, volume)?;
        let is_complete = volume.pending.is_none() && storage.size(&image)? == volume.size;
        let intent = image_key("intent", &name.storage, &volume.uuid);
        if is_complete || entries.iter().any(|entry| entry.key == intent) {
            return Ok(is_late);
        }
        let lease = self.store.grant(self.intent_time)?;
        let (entry, current) = self.volume(name)?;
        if current != *volume {
            return Ok(is_late);
        }
        // The entry is written again, so that the process cannot complete its change any more.
        let Some(change) = self.open_change(name, &entry, current, lease)? else {
            return Ok(is_late);
        };
        if let Some(Pending::Snapshot(uuid)) = &volume.pending {
            storage.remove_snapshot(&image, &image_name(uuid))?;
        }
        let size = storage.size(&image)?;
        self.complete(change, Ok(()), |volume| volume.size = size)?;
        Ok(true)
    }

    /// Removes snapshots that the volume neither has nor gets. Returns `true` if there were any.
    ///
    /// The entry is read after the list. A snapshot that the entry does not have then gets no name
    /// later, as its uuid is used once.
    fn remove_late_snapshots(
        &self,
        storage: &dyn Storage,
        name: &VolumeName,
        volume: &Volume,
    ) -> Result<bool> {
        let image = image_name(&volume.uuid);
        let snapshots = storage.snapshots(&image)?;
        let is_late = |snapshot: &&String, volume: &Volume| {
            uuid_of(snapshot).is_some_and(|uuid| !volume.may_have_snapshot(uuid))
        };
        if !snapshots.iter().any(|snapshot| is_late(&snapshot, volume)) {
            return Ok(false);
        }
        let (_, current) = self.volume(name)?;
        if current.uuid != volume.uuid {
            return Ok(false);
        }
        let mut removed = false;
        for snapshot in snapshots
            .iter()
            .filter(|snapshot| is_late(snapshot, &current))
        {
            storage.remove_snapshot(&image, snapshot)?;
            removed = true;
        }
        Ok(removed)
    }
}

/// Removes an image with its snapshots.
fn remove_with_snapshots(storage: &dyn Storage, image: &str) -> Result<()> {
    let mut snapshots = match storage.snapshots(image) {
        // There is none, or only a part of one.
        Err(error) if error.errno() == Errno::NOENT => Vec::new(),
        snapshots => snapshots?,
    };
    snapshots.retain(|snapshot| uuid_of(snapshot).is_some());
    storage.remove(image, &snapshots)
}

fn with_prefix<'a>(entries: &'a [Entry], prefix: &'a str) -> impl Iterator<Item = &'a Entry> {
    entries
        .iter()
        .filter(move |entry| entry.key.starts_with(prefix))
}

/// Returns the uuids of the images that have a name.
fn named_images(entries: &[Entry], storage: &str) -> Result<HashSet<String>> {
    with_prefix(entries, &keys_of("name", storage))
        .map(|entry| Ok(parse::<Volume>(entry)?.uuid))
        .collect()
}
