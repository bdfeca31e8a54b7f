// SPDX-License-Identifier: GPL-2.0-only

//! The keys of the registry and their values.
//!
//! | key below `/rblk/1/` | value |
//! |---|---|
//! | `storage/S` | [`StorageEntry`]: the URI of the storage, and the uuid by which its place is known |
//! | `name/S/V` | [`Volume`]: the image of a volume, and the changes of it that are not complete |
//! | `orphan/S/U` | an image without a name, which `gc` removes |
//! | `intent/S/U` | with a lease: a process creates or changes this image |
//! | `writer/S/U` | with a lease: [`Holder`](crate::Holder), where the volume is attached for writing |
//! | `last/S/U` | [`Holder`](crate::Holder), where it was attached last, until it is detached |
//! | `user/S/U` | [`User`](crate::holder::User), the disk whose guest has used it last |
//! | `handover/S/U` | with a lease: [`HandOver`](crate::hand_over::HandOver), where it may be attached next |
//! | `reader/S/U/T` | with a lease: [`Holder`](crate::Holder), where it is attached for reading |

use crate::name::VolumeName;
use crate::store::Entry;
use engine::{Errno, Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The start of all keys of the registry.
pub const ROOT: &str = "/rblk/1/";

/// The start of the names of images that are volumes, and of their snapshots.
const IMAGE: &str = "rblk-";

/// The start of the name of the image that says which storage a place belongs to.
const MARK: &str = "rblk-storage-";

/// A storage.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct StorageEntry {
    /// The URI.
    pub uri: String,
    /// The uuid, which the name of an image at the place has too.
    pub uuid: String,
}

/// A volume.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Volume {
    /// The uuid of the image.
    pub uuid: String,
    /// The size in bytes.
    pub size: u64,
    /// The snapshots, in the order of their creation.
    pub snapshots: Vec<Snapshot>,
    /// The volume and the snapshot that it is a clone of.
    pub clone_of: Option<(String, String)>,
    /// The change that was started last and is not complete.
    pub pending: Option<Pending>,
}

/// A snapshot of a volume.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Snapshot {
    /// The name.
    pub name: String,
    /// The uuid, by which the storage knows it.
    pub uuid: String,
    /// The size in bytes that the volume had.
    pub size: u64,
}

/// A change of an image that is not complete.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Pending {
    /// The image gets this size in bytes.
    Resize(u64),
    /// The image gets a snapshot with this uuid.
    Snapshot(String),
}

impl Volume {
    /// Returns a snapshot.
    pub fn snapshot(&self, name: &str) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name)
    }

    /// Returns `true` if the volume has, or is about to get, a snapshot with a uuid.
    pub fn may_have_snapshot(&self, uuid: &str) -> bool {
        let is_pending = matches!(&self.pending, Some(Pending::Snapshot(new)) if new == uuid);
        is_pending || self.snapshots.iter().any(|snapshot| snapshot.uuid == uuid)
    }
}

/// The key of a storage.
pub fn storage_key(storage: &str) -> String {
    format!("{ROOT}storage/{storage}")
}

/// The key of a volume.
pub fn name_key(name: &VolumeName) -> String {
    format!("{ROOT}name/{}/{}", name.storage, name.volume)
}

/// The start of a kind of keys that belong to a storage.
pub fn keys_of(kind: &str, storage: &str) -> String {
    format!("{ROOT}{kind}/{storage}/")
}

/// A key of a kind that belongs to an image.
pub fn image_key(kind: &str, storage: &str, uuid: &str) -> String {
    format!("{ROOT}{kind}/{storage}/{uuid}")
}

/// Returns the name of the image or the snapshot with a uuid.
pub fn image_name(uuid: &str) -> String {
    format!("{IMAGE}{uuid}")
}

/// Returns the uuid of an image or a snapshot, or [`None`] if it is no volume's.
pub fn uuid_of(image: &str) -> Option<&str> {
    let uuid = image.strip_prefix(IMAGE)?;
    let is_valid = uuid.len() == 36
        && uuid
            .chars()
            .all(|char| char.is_ascii_hexdigit() || char == '-');
    is_valid.then_some(uuid)
}

/// Returns the name of the image that says that a place belongs to the storage with a uuid.
pub fn mark_name(uuid: &str) -> String {
    format!("{MARK}{uuid}")
}

/// Returns the uuid of the storage of whose place an image is the mark, or [`None`] if it is none.
pub fn marked_uuid(image: &str) -> Option<&str> {
    image.strip_prefix(MARK)
}

/// Reads a value.
pub fn parse<T: DeserializeOwned>(entry: &Entry) -> Result<T> {
    serde_json::from_str(&entry.value).map_err(|error| {
        Error::new(
            Errno::PROTO,
            format!("the value of {} in etcd is not valid: {error}", entry.key),
            "check that all hosts have the same version of rblk",
        )
    })
}

/// Writes a value.
pub fn text<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::new(Errno::INVAL, error.to_string(), "report this"))
}
