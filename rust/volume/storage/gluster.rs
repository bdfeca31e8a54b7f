// SPDX-License-Identifier: GPL-2.0-only

//! A directory of a Gluster volume.

use super::{unsupported, Storage};
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

    fn clone_image(&self, _parent: &str, _snapshot: &str, _image: &str) -> Result<()> {
        Err(unsupported("clones"))
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

    fn snapshot(&self, _image: &str, _snapshot: &str) -> Result<()> {
        Err(unsupported("snapshots"))
    }

    fn snapshots(&self, _image: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn remove_snapshot(&self, _image: &str, _snapshot: &str) -> Result<()> {
        Ok(())
    }

    fn list(&self) -> Result<Vec<String>> {
        self.dir.list()
    }

    fn uri(&self, image: &str) -> String {
        self.address.file(&format!("{DIR}/{image}")).to_string()
    }

    fn can_fence(&self) -> bool {
        false
    }

    fn fence(&self, _image: &str, _confirm: &dyn Fn() -> Result<()>) -> Result<()> {
        Err(unsupported("fences"))
    }
}
