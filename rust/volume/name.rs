// SPDX-License-Identifier: GPL-2.0-only

//! The names of storages and volumes.

use engine::{Errno, Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The directory whose paths are names of volumes, for tools that know only paths of images.
pub const VOLUMES_DIR: &str = "/var/lib/rblk/volumes";

/// The longest name of a storage or volume.
const MAX_LEN: usize = 63;

/// The name of a volume: `STORAGE/VOLUME`.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct VolumeName {
    /// The name of the storage.
    pub storage: String,
    /// The name of the volume on this storage.
    pub volume: String,
}

impl VolumeName {
    /// Returns the volume that the name of an image stands for: `vol:STORAGE/VOLUME`, or a path
    /// below [`VOLUMES_DIR`]. Returns `None` for any other image.
    pub fn of_image(image: &str) -> Option<Result<Self>> {
        let path = image.strip_prefix("aio:").unwrap_or(image);
        let path = path.strip_prefix("raw:").unwrap_or(path);
        let by_path = || path.strip_prefix(VOLUMES_DIR)?.strip_prefix('/');
        let name = image.strip_prefix("vol:").or_else(by_path)?;
        Some(name.parse())
    }
}

/// Checks the name of a storage, volume or snapshot.
pub fn check_part(name: &str) -> Result<()> {
    let is_allowed = |char: char| char.is_ascii_alphanumeric() || "._-".contains(char);
    let starts_well = name.starts_with(|char: char| char.is_ascii_alphanumeric());
    if starts_well && name.len() <= MAX_LEN && name.chars().all(is_allowed) {
        return Ok(());
    }
    Err(Error::new(
        Errno::INVAL,
        format!("\"{}\" is no valid name", name.escape_debug()),
        "use up to 63 letters, digits, \".\", \"_\" and \"-\", with a letter or a digit first",
    ))
}

impl FromStr for VolumeName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((storage, volume)) = text.split_once('/') else {
            return Err(Error::new(
                Errno::INVAL,
                format!("\"{}\" is no name of a volume", text.escape_debug()),
                "use STORAGE/VOLUME, for example fast/db",
            ));
        };
        check_part(storage)?;
        check_part(volume)?;
        Ok(Self {
            storage: storage.to_owned(),
            volume: volume.to_owned(),
        })
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.storage, self.volume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(
            "fast/db-1.x_y".parse::<VolumeName>().unwrap().to_string(),
            "fast/db-1.x_y"
        );
        let long = format!("a/{}", "b".repeat(64));
        for text in [
            "", "a", "a/", "/a", "a/b/c", "a/..", "a/-b", "a/b\n", "a/ü", &long,
        ] {
            let error = text.parse::<VolumeName>().unwrap_err();
            assert_eq!(error.errno(), Errno::INVAL, "{text}");
        }
    }

    #[test]
    fn images_stand_for_volumes() {
        for image in [
            "vol:fast/db",
            "/var/lib/rblk/volumes/fast/db",
            "aio:/var/lib/rblk/volumes/fast/db",
        ] {
            let name = VolumeName::of_image(image).unwrap().unwrap();
            assert_eq!(name.to_string(), "fast/db");
        }
        assert!(VolumeName::of_image("vol:fast").unwrap().is_err());
        for image in ["raw:/a", "rbd:a/b", "/var/lib/rblk/volumes", "fast/db"] {
            assert!(VolumeName::of_image(image).is_none(), "{image}");
        }
    }
}
