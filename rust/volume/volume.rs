// SPDX-License-Identifier: GPL-2.0-only

//! Volumes on cluster storage and their registry in etcd.
//!
//! A volume is an image on a storage that several hosts share, with a name that all of them know:
//! `fast/db` is the volume `db` on the storage `fast`. The image itself is named by a uuid.
//!
//! | module | contents |
//! |---|---|
//! | [`name`] | names of storages and volumes |
//! | [`config`] | where etcd is |
//! | [`store`] | keys and values with transactions and leases, and [`etcd`], which has them |
//! | [`storage`] | the operations on images of a storage: Ceph, GlusterFS, a directory |
//! | [`record`] | the keys of the registry and their values |
//! | [`registry`] | storages and volumes: add, create, list, resize, snapshot, clone, remove, collect |
//! | [`holder`] | the process that has a volume attached |
//! | [`attachment`] | the single writer of a volume |
//! | [`hand_over`] | the next writer of a volume on another host |
//!
//! # Exactly-once creation
//!
//! The name of a volume is bound to its image in one transaction, after the image was created:
//!
//! 1. Write that the image is an orphan, and an intent with a lease, if the name is free.
//! 2. Create the image.
//! 3. Bind the name to the image and remove both entries, if the name is free and the intent is
//!    still there.
//!
//! A creator that is killed leaves at most an image that is an orphan. Its intent expires, and then
//! no transaction can bind a name to that image, so it can be removed at any time
//! ([`Registry::collect`](registry::Registry::collect)).

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod attachment;
pub mod config;
pub mod etcd;
pub mod hand_over;
pub mod holder;
#[cfg(test)]
mod model_tests;
pub mod name;
mod random;
pub mod record;
pub mod registry;
pub mod storage;
pub mod store;

pub use attachment::{Access, Attachment};
pub use config::Config;
pub use engine::{Errno, Error, Result};
pub use holder::Holder;
pub use name::VolumeName;
pub use registry::{Collected, Registry, VolumeInfo};

/// Connects to the registry that a configuration names.
pub fn connect(config: &Config) -> Registry<etcd::Etcd> {
    let etcd = etcd::Etcd::new(config.etcd.clone());
    Registry::new(etcd, storage::open)
}
