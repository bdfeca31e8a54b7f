// SPDX-License-Identifier: GPL-2.0-only

//! A directory that all hosts have mounted, or a directory of one host.

use super::Storage;
use engine::{Errno, Error, Result};
use rustix::fs::{fallocate, FallocateFlags};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) fn open(path: &str) -> Result<Self> {
        let path = PathBuf::from(path);
        if !path.is_absolute() || !path.is_dir() {
            return Err(Error::new(
                Errno::NOTDIR,
                format!("{} is no directory", path.display()),
                "create it, or check that it is mounted",
            ));
        }
        Ok(Self { path })
    }

    /// Makes new and removed names durable.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn create_file(&self, image: &str, size: u64) -> io::Result<()> {
        let path = self.path.join(image);
        // Other users of the host have no access to the disks of guests.
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.set_len(size)?;
        file.sync_all()?;
        self.sync()
    }

    fn error(&self, doing: &str, image: &str, error: &io::Error) -> Error {
        let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
        let path = self.path.join(image);
        Error::new(
            errno,
            format!("{doing} {}: {error}", path.display()),
            "check the file system and the permissions",
        )
    }
}

impl Storage for Directory {
    fn create(&self, image: &str, size: u64) -> Result<()> {
        let created = self.create_file(image, size);
        created.map_err(|error| self.error("creating", image, &error))
    }

    fn remove(&self, image: &str, _snapshots: &[String]) -> Result<()> {
        let removed = fs::remove_file(self.path.join(image)).and_then(|()| self.sync());
        removed.map_err(|error| self.error("removing", image, &error))
    }

    fn size(&self, image: &str) -> Result<u64> {
        let metadata = fs::metadata(self.path.join(image));
        let size = metadata.map(|metadata| metadata.len());
        size.map_err(|error| self.error("opening", image, &error))
    }

    fn enlarge(&self, image: &str, size: u64) -> Result<()> {
        let enlarge = || {
            let file = OpenOptions::new().write(true).open(self.path.join(image))?;
            if let Some(last) = size.checked_sub(1) {
                // Unlike `ftruncate` it never makes a file smaller.
                fallocate(&file, FallocateFlags::empty(), last, 1)?;
            }
            file.sync_all()
        };
        enlarge().map_err(|error| self.error("resizing", image, &error))
    }

    fn list(&self) -> Result<Vec<String>> {
        let names = || -> io::Result<Vec<String>> {
            fs::read_dir(&self.path)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect()
        };
        names().map_err(|error| self.error("listing", "", &error))
    }

    fn uri(&self, image: &str) -> String {
        format!("raw:{}", self.path.join(image).display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn images_are_files() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::open(dir.path().to_str().unwrap()).unwrap();
        storage.create("a", 4096).unwrap();
        assert_eq!(storage.create("a", 1).unwrap_err().errno(), Errno::EXIST);
        for size in [8192, 4096] {
            storage.enlarge("a", size).unwrap();
            assert_eq!(storage.size("a").unwrap(), 8192);
        }
        assert_eq!(storage.list().unwrap(), ["a"]);
        let metadata = fs::metadata(dir.path().join("a")).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(storage.uri("a").ends_with("/a"));
        assert!(storage.snapshot("a", "s").is_err());
        assert!(storage.clone_image("a", "s", "b").is_err());
        storage.remove("a", &[]).unwrap();
        assert_eq!(storage.remove("a", &[]).unwrap_err().errno(), Errno::NOENT);
        assert!(Directory::open("relative").is_err());
    }
}
