// SPDX-License-Identifier: GPL-2.0-only

//! Storages and volumes: add, create, list, resize, snapshot, clone, remove, collect.

mod collect;
mod place;

pub use collect::Collected;

use crate::holder::Holder;
use crate::name::{check_part, VolumeName};
use crate::random::random_uuid;
use crate::record::{
    image_key, image_name, keys_of, name_key, parse, storage_key, text, Pending, Snapshot,
    StorageEntry, Volume, ROOT,
};
use crate::storage::Storage;
use crate::store::{Change, Commit, Condition, Entry, Lease, Store};
use engine::{Errno, Error, Result};
use serde::Serialize;
use std::time::Duration;

/// Time that a creation or change of an image may take. A killed process blocks others so long.
const INTENT_TIME: Duration = Duration::from_secs(60);

/// The size of a volume is a multiple of it.
const BLOCK_SIZE: u64 = 512;

/// Number of attempts of a change that another process of the cluster may get ahead of.
const ATTEMPTS: u32 = 8;

/// Opens the storage that a URI names.
type Open = dyn Fn(&str) -> Result<Box<dyn Storage>> + Send + Sync;

/// Storages and volumes of a cluster.
pub struct Registry<S> {
    store: S,
    open: Box<Open>,
    intent_time: Duration,
}

/// A volume as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeInfo {
    /// The name.
    pub name: VolumeName,
    /// Its entry in the registry.
    #[serde(flatten)]
    pub volume: Volume,
    /// The process that has it attached for writing.
    pub writer: Option<Holder>,
    /// The process that had it attached for writing last and has not detached it. It is dead or
    /// cannot reach etcd if it is not the writer.
    pub last_writer: Option<Holder>,
    /// The processes that have it attached for reading.
    pub readers: Vec<Holder>,
}

/// A storage as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct StorageInfo {
    /// The name.
    pub name: String,
    /// The URI.
    pub uri: String,
}

/// The contents of a new volume.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    /// Zeros.
    Zeros(u64),
    /// The contents of a snapshot of a volume.
    Snapshot(&'a VolumeName, &'a str),
}

/// A volume that is created, and the parent of its image.
struct Creation {
    volume: Volume,
    /// The image that it is a clone of, and the snapshot of that.
    parent: Option<(String, String)>,
}

/// A change of a volume that this process has started and not completed.
struct OpenChange {
    name: VolumeName,
    volume: Volume,
    /// The revision of the entries of the volume and of the intent.
    revision: i64,
    intent: Lease,
}

impl<S: Store> Registry<S> {
    /// Creates a registry in a store. `open` opens the storage that a URI names.
    pub fn new(
        store: S,
        open: impl Fn(&str) -> Result<Box<dyn Storage>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            store,
            open: Box::new(open),
            intent_time: INTENT_TIME,
        }
    }

    /// Changes how long a creation or change of an image may take.
    pub fn with_intent_time(mut self, time: Duration) -> Self {
        self.intent_time = time;
        self
    }

    /// Returns the store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Adds a storage, which must be reachable. The error is `EEXIST` if the name is taken, or if
    /// the place belongs to another storage, of this registry or of another one.
    pub fn add_storage(&self, name: &str, uri: &str) -> Result<()> {
        check_part(name)?;
        let key = storage_key(name);
        let is_taken = || taken(format!("there is a storage {name} already"));
        if self.store.get(&key)?.is_some() {
            return Err(is_taken());
        }
        let storage = (self.open)(uri)?;
        let entry = StorageEntry {
            uri: uri.to_owned(),
            uuid: random_uuid()?,
        };
        self.take_place(&*storage, &entry)?;
        let change = Change::Put(key.clone(), text(&entry)?, None);
        // An error leaves open whether it was added, so the mark stays.
        match self.store.commit(&[Condition::Absent(key)], &[change])? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict => {
                place::leave(&*storage, &entry.uuid)?;
                Err(is_taken())
            }
        }
    }

    /// Lists the storages.
    pub fn storages(&self) -> Result<Vec<StorageInfo>> {
        let prefix = format!("{ROOT}storage/");
        let entries = self.store.list(&prefix)?;
        let info = |entry: &Entry| {
            let name = entry.key.strip_prefix(&prefix).unwrap_or_default();
            Ok(StorageInfo {
                name: name.to_owned(),
                uri: parse::<StorageEntry>(entry)?.uri,
            })
        };
        entries.iter().map(info).collect()
    }

    /// Removes a storage without volumes from the registry, and then its mark from the place.
    pub fn remove_storage(&self, name: &str) -> Result<()> {
        let entry = self.storage_entry(name)?;
        let storage: StorageEntry = parse(&entry)?;
        let conditions = [
            Condition::Unchanged(entry.key.clone(), entry.revision),
            Condition::NoneWith(keys_of("name", name)),
            Condition::NoneWith(keys_of("orphan", name)),
        ];
        match self
            .store
            .commit(&conditions, &[Change::Delete(entry.key)])?
        {
            Commit::Done(_) => {
                let opened = (self.open)(&storage.uri);
                let left = opened.and_then(|opened| place::leave(&*opened, &storage.uuid));
                left.map_err(|error| place::not_left(&storage, &error))
            }
            Commit::Conflict => Err(Error::new(
                Errno::BUSY,
                format!("the storage {name} has volumes, or images that are not collected"),
                "remove the volumes and run rblk volume gc",
            )),
        }
    }

    fn storage_entry(&self, name: &str) -> Result<Entry> {
        self.store.get(&storage_key(name))?.ok_or_else(|| {
            Error::new(
                Errno::NOENT,
                format!("there is no storage {name}"),
                "see rblk storage list, and add it with rblk storage add",
            )
        })
    }

    /// Opens a storage.
    pub fn storage(&self, name: &str) -> Result<Box<dyn Storage>> {
        self.open_storage(name).map(|(_, opened)| opened)
    }

    /// Opens a storage, and returns its entry too.
    fn open_storage(&self, name: &str) -> Result<(StorageEntry, Box<dyn Storage>)> {
        let entry: StorageEntry = parse(&self.storage_entry(name)?)?;
        let opened = (self.open)(&entry.uri)?;
        Ok((entry, opened))
    }

    /// Lists all volumes, or those of one storage.
    pub fn list(&self, storage: Option<&str>) -> Result<Vec<VolumeInfo>> {
        let entries = self.store.list(ROOT)?;
        let prefix = format!("{ROOT}name/");
        let names = entries.iter().filter_map(|entry| {
            let name: VolumeName = entry.key.strip_prefix(&prefix)?.parse().ok()?;
            Some((name, entry))
        });
        names
            .filter(|(name, _)| storage.is_none_or(|storage| storage == name.storage))
            .map(|(name, entry)| volume_info(name, entry, &entries))
            .collect()
    }

    /// Returns one volume.
    pub fn info(&self, name: &VolumeName) -> Result<VolumeInfo> {
        let (entry, _) = self.volume(name)?;
        volume_info(name.clone(), &entry, &self.store.list(ROOT)?)
    }

    /// Returns the entry and the value of a volume.
    pub(crate) fn volume(&self, name: &VolumeName) -> Result<(Entry, Volume)> {
        match self.store.get(&name_key(name))? {
            Some(entry) => {
                let volume = parse(&entry)?;
                Ok((entry, volume))
            }
            None => Err(no_volume(name)),
        }
    }

    /// Creates a volume of zeros. The error is `EEXIST` if the name is taken.
    pub fn create(&self, name: &VolumeName, size: u64) -> Result<()> {
        if size == 0 || size % BLOCK_SIZE != 0 {
            return Err(Error::new(
                Errno::INVAL,
                format!("a volume cannot have {size} bytes"),
                "use a multiple of 512",
            ));
        }
        self.create_from(name, Source::Zeros(size))
    }

    /// Creates a volume with the contents of a snapshot.
    pub fn clone_volume(
        &self,
        parent: &VolumeName,
        snapshot: &str,
        name: &VolumeName,
    ) -> Result<()> {
        if parent.storage != name.storage {
            return Err(Error::new(
                Errno::XDEV,
                format!("{parent} and {name} are on different storages"),
                "clone it on the same storage, or copy it with rblk image convert",
            ));
        }
        self.create_from(name, Source::Snapshot(parent, snapshot))
    }

    fn creation(&self, source: Source<'_>) -> Result<Creation> {
        let uuid = random_uuid()?;
        let (size, clone_of, parent) = match source {
            Source::Zeros(size) => (size, None, None),
            Source::Snapshot(name, snapshot) => {
                let (_, volume) = self.volume(name)?;
                let of = volume.snapshot(snapshot).ok_or_else(|| {
                    Error::new(
                        Errno::NOENT,
                        format!("{name} has no snapshot {snapshot}"),
                        "see rblk volume info",
                    )
                })?;
                let parent = (image_name(&volume.uuid), image_name(&of.uuid));
                let clone_of = (name.volume.clone(), snapshot.to_owned());
                (of.size, Some(clone_of), Some(parent))
            }
        };
        Ok(Creation {
            volume: Volume {
                uuid,
                size,
                snapshots: Vec::new(),
                clone_of,
                pending: None,
            },
            parent,
        })
    }

    fn create_from(&self, name: &VolumeName, source: Source<'_>) -> Result<()> {
        let storage = self.storage(&name.storage)?;
        let creation = self.creation(source)?;
        let uuid = &creation.volume.uuid;
        let intent = self.add_orphan(name, uuid)?;
        let image = image_name(uuid);
        let created = match &creation.parent {
            None => storage.create(&image, creation.volume.size),
            Some((parent, snapshot)) => storage.clone_image(parent, snapshot, &image),
        };
        // An error of `bind` leaves open whether the name is bound, so the image stays.
        let result = match created {
            Ok(()) => match self.bind(name, &creation.volume)? {
                Commit::Done(_) => Ok(()),
                Commit::Conflict => Err(self.name_conflict(name)),
            },
            Err(error) => Err(error),
        };
        if result.is_err() {
            // If this fails too, the image is an orphan and is collected later.
            let _ = self.collect_image(&*storage, &name.storage, uuid);
        }
        // It ends by itself otherwise.
        let _ = self.store.revoke(intent);
        result
    }

    /// Writes that an image, which this process is about to create, is an orphan. The error is
    /// `EEXIST` if the name is taken.
    fn add_orphan(&self, name: &VolumeName, uuid: &str) -> Result<Lease> {
        let intent = self.store.grant(self.intent_time)?;
        let conditions = [
            Condition::Absent(name_key(name)),
            Condition::Present(storage_key(&name.storage)),
        ];
        let changes = [
            put_empty(image_key("orphan", &name.storage, uuid), None),
            put_empty(image_key("intent", &name.storage, uuid), Some(intent)),
        ];
        match self.store.commit(&conditions, &changes)? {
            Commit::Done(_) => Ok(intent),
            Commit::Conflict => Err(self.name_conflict(name)),
        }
    }

    /// Binds a name to an image that was created.
    fn bind(&self, name: &VolumeName, volume: &Volume) -> Result<Commit> {
        let orphan = image_key("orphan", &name.storage, &volume.uuid);
        let intent = image_key("intent", &name.storage, &volume.uuid);
        let conditions = [
            Condition::Absent(name_key(name)),
            Condition::Present(intent.clone()),
            Condition::Present(orphan.clone()),
        ];
        let changes = [
            Change::Put(name_key(name), text(volume)?, None),
            Change::Delete(orphan),
            Change::Delete(intent),
        ];
        self.store.commit(&conditions, &changes)
    }

    /// Returns why a name could not be bound.
    fn name_conflict(&self, name: &VolumeName) -> Error {
        match self.store.get(&name_key(name)) {
            Err(error) => error,
            Ok(Some(_)) => taken(format!("there is a volume {name} already")),
            Ok(None) => Error::new(
                Errno::AGAIN,
                format!("{name} was not created: it took too long, or its storage was removed"),
                "check the storage with rblk storage list --check, and try again",
            ),
        }
    }

    /// Starts a change of a volume, if `check` allows it: no other process changes its image until
    /// the lease ends.
    fn begin(
        &self,
        name: &VolumeName,
        pending: Pending,
        check: impl Fn(&Volume) -> Result<()>,
    ) -> Result<OpenChange> {
        let intent = self.store.grant(self.intent_time)?;
        for _ in 0..ATTEMPTS {
            let (entry, mut volume) = self.volume(name)?;
            check(&volume)?;
            if volume.pending.is_some() {
                return Err(Error::new(
                    Errno::BUSY,
                    format!("another change of {name} is not complete"),
                    "wait for it; if its process has died, run rblk volume gc after a minute",
                ));
            }
            volume.pending = Some(pending.clone());
            if let Some(change) = self.open_change(name, &entry, volume, intent)? {
                return Ok(change);
            }
        }
        Err(contended(name))
    }

    /// Writes the pending change of a volume and the intent to complete it. Returns [`None`] if the
    /// volume has changed, or another process has an intent.
    fn open_change(
        &self,
        name: &VolumeName,
        entry: &Entry,
        volume: Volume,
        intent: Lease,
    ) -> Result<Option<OpenChange>> {
        let key = image_key("intent", &name.storage, &volume.uuid);
        let conditions = [
            Condition::Unchanged(entry.key.clone(), entry.revision),
            Condition::Absent(key.clone()),
        ];
        let changes = [
            Change::Put(entry.key.clone(), text(&volume)?, None),
            put_empty(key, Some(intent)),
        ];
        Ok(match self.store.commit(&conditions, &changes)? {
            Commit::Conflict => None,
            Commit::Done(revision) => Some(OpenChange {
                name: name.clone(),
                volume,
                revision,
                intent,
            }),
        })
    }

    /// Ends a change, whose image has been changed if `changed` is no error. `apply` makes the same
    /// change of the entry.
    fn complete(
        &self,
        mut change: OpenChange,
        changed: Result<()>,
        apply: impl FnOnce(&mut Volume),
    ) -> Result<()> {
        if changed.is_ok() {
            apply(&mut change.volume);
        }
        change.volume.pending = None;
        let completed = self.complete_entry(&change);
        // It ends by itself otherwise.
        let _ = self.store.revoke(change.intent);
        changed.and(completed)
    }

    fn complete_entry(&self, change: &OpenChange) -> Result<()> {
        let name = &change.name;
        let intent = image_key("intent", &name.storage, &change.volume.uuid);
        let conditions = [
            Condition::Unchanged(name_key(name), change.revision),
            Condition::Unchanged(intent.clone(), change.revision),
        ];
        let changes = [
            Change::Put(name_key(name), text(&change.volume)?, None),
            Change::Delete(intent),
        ];
        match self.store.commit(&conditions, &changes)? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict => Err(Error::new(
                Errno::AGAIN,
                format!("the change of {name} took too long, or the volume was removed"),
                "run rblk volume gc, and try again",
            )),
        }
    }

    /// Enlarges a volume, which may be attached.
    pub fn resize(&self, name: &VolumeName, size: u64) -> Result<()> {
        let storage = self.storage(&name.storage)?;
        let check = |volume: &Volume| match size < volume.size || size % BLOCK_SIZE != 0 {
            false => Ok(()),
            true => Err(Error::new(
                Errno::INVAL,
                format!("{name} has {} bytes and cannot get {size}", volume.size),
                "use a multiple of 512; to make a volume smaller, copy the data to a new one",
            )),
        };
        let change = self.begin(name, Pending::Resize(size), check)?;
        let resized = storage.enlarge(&image_name(&change.volume.uuid), size);
        self.complete(change, resized, |volume| volume.size = size)
    }

    /// Creates a snapshot of a volume. The error is `EEXIST` if the name is taken.
    pub fn snapshot(&self, name: &VolumeName, snapshot: &str) -> Result<()> {
        check_part(snapshot)?;
        let storage = self.storage(&name.storage)?;
        let uuid = random_uuid()?;
        let check = |volume: &Volume| match volume.snapshot(snapshot) {
            None => Ok(()),
            Some(_) => Err(taken(format!("{name} has a snapshot {snapshot} already"))),
        };
        let change = self.begin(name, Pending::Snapshot(uuid.clone()), check)?;
        let created = storage.snapshot(&image_name(&change.volume.uuid), &image_name(&uuid));
        self.complete(change, created, |volume| {
            volume.snapshots.push(Snapshot {
                name: snapshot.to_owned(),
                uuid,
                size: volume.size,
            });
        })
    }

    /// Removes a volume that is not attached, with its snapshots.
    ///
    /// The name is free at once. If the image has clones, it is removed by [`Self::collect`] after
    /// them; the result is `false` then.
    pub fn remove(&self, name: &VolumeName) -> Result<bool> {
        let storage = self.storage(&name.storage)?;
        for _ in 0..ATTEMPTS {
            let (entry, volume) = self.volume(name)?;
            let key = |kind| image_key(kind, &name.storage, &volume.uuid);
            let conditions = [
                Condition::Unchanged(entry.key.clone(), entry.revision),
                Condition::Absent(key("writer")),
                Condition::NoneWith(key("reader") + "/"),
                Condition::Absent(key("intent")),
            ];
            let changes = [
                Change::Delete(entry.key),
                put_empty(key("orphan"), None),
                Change::Delete(key("last")),
            ];
            if let Commit::Done(_) = self.store.commit(&conditions, &changes)? {
                let removed = self.collect_image(&*storage, &name.storage, &volume.uuid);
                return Ok(removed.unwrap_or(false));
            }
            let info = self.info(name)?;
            if let Some(holder) = info.writer.iter().chain(&info.readers).next() {
                return Err(in_use(name, holder));
            }
        }
        Err(contended(name))
    }

    /// Forgets the writer of a volume, whose lease has ended and whose host is off: the volume can
    /// be attached elsewhere.
    ///
    /// Storages that can fence do not need it.
    pub fn release(&self, name: &VolumeName) -> Result<()> {
        let info = self.info(name)?;
        if let Some(holder) = &info.writer {
            return Err(in_use(name, holder));
        }
        let key = |kind| image_key(kind, &name.storage, &info.volume.uuid);
        let conditions = [Condition::Absent(key("writer"))];
        match self
            .store
            .commit(&conditions, &[Change::Delete(key("last"))])?
        {
            Commit::Done(_) => Ok(()),
            Commit::Conflict => Err(contended(name)),
        }
    }
}

fn volume_info(name: VolumeName, entry: &Entry, all: &[Entry]) -> Result<VolumeInfo> {
    let volume: Volume = parse(entry)?;
    let writer = image_key("writer", &name.storage, &volume.uuid);
    let readers = image_key("reader", &name.storage, &volume.uuid) + "/";
    let last_writer = image_key("last", &name.storage, &volume.uuid);
    let holder = |key: &str| all.iter().find(|entry| entry.key == key).map(parse);
    let readers = all.iter().filter(|entry| entry.key.starts_with(&readers));
    Ok(VolumeInfo {
        writer: holder(&writer).transpose()?,
        last_writer: holder(&last_writer).transpose()?,
        readers: readers.map(parse).collect::<Result<_>>()?,
        name,
        volume,
    })
}

/// Writes a key without a value.
fn put_empty(key: String, lease: Option<Lease>) -> Change {
    Change::Put(key, String::new(), lease)
}

fn taken(cause: String) -> Error {
    Error::new(Errno::EXIST, cause, "choose another name")
}

fn no_volume(name: &VolumeName) -> Error {
    Error::new(
        Errno::NOENT,
        format!("there is no volume {name}"),
        "see rblk volume list",
    )
}

pub(crate) fn in_use(name: &VolumeName, holder: &Holder) -> Error {
    Error::new(
        Errno::BUSY,
        format!("{name} is in use: {holder}"),
        "detach it there first",
    )
}

pub(crate) fn contended(name: &VolumeName) -> Error {
    Error::new(
        Errno::AGAIN,
        format!("other processes change {name} all the time"),
        "try again",
    )
}

#[cfg(test)]
mod crash_tests;
