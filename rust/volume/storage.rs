// SPDX-License-Identifier: GPL-2.0-only

//! The operations on images of a storage.

mod directory;
mod gluster;
mod rbd;

use engine::{Errno, Error, Result};

/// A place for images that several hosts share.
///
/// By default it has no snapshots and no clones, and cannot fence.
pub trait Storage {
    /// Creates an image of zeros. The error is `EEXIST` if there is one of the name.
    fn create(&self, image: &str, size: u64) -> Result<()>;

    /// Creates an image with the contents of a snapshot.
    fn clone_image(&self, _parent: &str, _snapshot: &str, _image: &str) -> Result<()> {
        Err(unsupported("clones"))
    }

    /// Removes an image, with these snapshots. The error is `ENOENT` if there is none, and `EBUSY`
    /// or `ENOTEMPTY` while it has clones or other snapshots, or is open.
    fn remove(&self, image: &str, snapshots: &[String]) -> Result<()>;

    /// Returns the size of an image in bytes. The error is `ENOENT` if there is none.
    fn size(&self, image: &str) -> Result<u64>;

    /// Enlarges an image. A larger one stays as it is.
    fn enlarge(&self, image: &str, size: u64) -> Result<()>;

    /// Creates a snapshot of an image.
    fn snapshot(&self, _image: &str, _snapshot: &str) -> Result<()> {
        Err(unsupported("snapshots"))
    }

    /// Lists the snapshots of an image. The error is `ENOENT` if there is no image.
    fn snapshots(&self, _image: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Removes a snapshot of an image, if there is one.
    fn remove_snapshot(&self, _image: &str, _snapshot: &str) -> Result<()> {
        Ok(())
    }

    /// Lists all images, including those that are not volumes.
    fn list(&self) -> Result<Vec<String>>;

    /// Returns the URI by which an engine opens an image.
    fn uri(&self, image: &str) -> String;

    /// Returns `true` if the storage can refuse the writes of a former writer.
    fn can_fence(&self) -> bool {
        false
    }

    /// Has the storage refuse the writes of a former writer, which may come late.
    ///
    /// `confirm` is called before that, and returns an error if this process is no longer the
    /// writer.
    fn fence(&self, _image: &str, _confirm: &dyn Fn() -> Result<()>) -> Result<()> {
        Err(unsupported("fences"))
    }
}

/// Opens the storage that a URI names: `rbd:POOL`, `gluster://HOST/VOLUME` or `dir:/PATH`.
pub fn open(uri: &str) -> Result<Box<dyn Storage>> {
    let (scheme, rest) = uri.split_once(':').unwrap_or(("", uri));
    match scheme {
        "rbd" => Ok(Box::new(rbd::Rbd::open(rest)?)),
        "gluster" => Ok(Box::new(gluster::Gluster::open(rest)?)),
        "dir" => Ok(Box::new(directory::Directory::open(rest)?)),
        _ => Err(Error::new(
            Errno::INVAL,
            format!("\"{}\" is not a storage", uri.escape_debug()),
            "use rbd:POOL, gluster://HOST/VOLUME or dir:/PATH",
        )),
    }
}

/// Returns the error of an operation that a kind of storage does not have.
fn unsupported(operation: &str) -> Error {
    Error::new(
        Errno::OPNOTSUPP,
        format!("this kind of storage has no {operation}"),
        "use a storage of the kind rbd",
    )
}
