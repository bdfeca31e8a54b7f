// SPDX-License-Identifier: GPL-2.0-only

//! A pool of a Ceph cluster.

use super::Storage;
use engine::rbd::RbdPool;
use engine::{RbdAddress, Result};

pub(super) struct Rbd {
    address: RbdAddress,
    pool: RbdPool,
}

impl Rbd {
    pub(super) fn open(address: &str) -> Result<Self> {
        let address = address.parse()?;
        let pool = RbdPool::connect(&address)?;
        Ok(Self { address, pool })
    }
}

impl Storage for Rbd {
    fn create(&self, image: &str, size: u64) -> Result<()> {
        self.pool.create(image, size)
    }

    fn clone_image(&self, parent: &str, snapshot: &str, image: &str) -> Result<()> {
        self.pool.clone_image(parent, snapshot, image)
    }

    fn remove(&self, image: &str, snapshots: &[String]) -> Result<()> {
        self.pool.remove(image, snapshots)
    }

    fn size(&self, image: &str) -> Result<u64> {
        self.pool.size(image)
    }

    fn enlarge(&self, image: &str, size: u64) -> Result<()> {
        self.pool.enlarge(image, size)
    }

    fn snapshot(&self, image: &str, snapshot: &str) -> Result<()> {
        self.pool.snapshot(image, snapshot)
    }

    fn snapshots(&self, image: &str) -> Result<Vec<String>> {
        self.pool.snapshots(image)
    }

    fn remove_snapshot(&self, image: &str, snapshot: &str) -> Result<()> {
        self.pool.remove_snapshot(image, snapshot)
    }

    fn list(&self) -> Result<Vec<String>> {
        self.pool.list()
    }

    fn uri(&self, image: &str) -> String {
        self.address.image(image).to_string()
    }

    fn can_fence(&self) -> bool {
        true
    }

    fn fence(&self, image: &str, confirm: &dyn Fn() -> Result<()>) -> Result<()> {
        self.pool.fence(image, confirm)
    }
}
