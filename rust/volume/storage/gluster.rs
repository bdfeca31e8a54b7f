// SPDX-License-Identifier: GPL-2.0-only

//! A directory of a Gluster volume.

use super::Storage;
use engine::gluster::GlusterDir;
use engine::{GlusterVolume, Result};

/// The directory for images.
const DIR: &str = "rblk";

pub(super) struct Gluster {
    address: GlusterVolume,
    dir: GlusterDir,
}

impl Gluster {
    pub(super) fn open(address: &str) -> Result<Self> {
        let address = address.parse()?;
        let dir = GlusterDir::connect(&address, DIR)?;
        Ok(Self { address, dir })
    }
}

impl Storage for Gluster {
    fn create(&self, image: &str, size: u64) -> Result<()> {
        self.dir.create(image, size)
    }

    fn remove(&self, image: &str, _snapshots: &[String]) -> Result<()> {
        self.dir.remove(image)
    }

    fn size(&self, image: &str) -> Result<u64> {
        self.dir.size(image)
    }

    fn enlarge(&self, image: &str, size: u64) -> Result<()> {
        self.dir.enlarge(image, size)
    }

    fn list(&self) -> Result<Vec<String>> {
        self.dir.list()
    }

    fn uri(&self, image: &str) -> String {
        self.address.file(&format!("{DIR}/{image}")).to_string()
    }
}
