// SPDX-License-Identifier: GPL-2.0-only

//! The commands for volumes and their storages.

use ::volume::VolumeName;
use clap::Subcommand;

/// The commands for storages of volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeStorageCommand {
    /// Adds a storage of volumes, for all hosts
    Add {
        /// Name of the storage
        name: String,
        /// rbd:POOL[?conf=/PATH][&id=CLIENT], gluster://HOST/VOLUME or dir:/PATH
        uri: String,
        /// Accepts a Gluster volume whose options lose acknowledged writes
        #[arg(long = "unsafe")]
        allows_loss: bool,
    },
    /// Lists the storages of volumes
    List {
        /// Connects to each, and counts its images
        #[arg(long)]
        check: bool,
    },
    /// Removes a storage without volumes from the list; its contents stay
    Remove {
        /// Name of the storage
        name: String,
    },
}

/// The commands for volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Creates a volume of zeros
    Create {
        /// STORAGE/VOLUME
        volume: VolumeName,
        /// Size in bytes, or with suffix K, M, G or T
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Lists the volumes
    List {
        /// Name of the storage; all if left out
        storage: Option<String>,
        /// Lists them again after each change, until it is interrupted
        #[arg(long)]
        follow: bool,
    },
    /// Shows a volume, its snapshots, and where it is attached
    Info {
        /// STORAGE/VOLUME
        volume: VolumeName,
    },
    /// Enlarges a volume, also for the guest that uses it on any host
    Resize {
        /// STORAGE/VOLUME
        volume: VolumeName,
        /// New size in bytes, or with suffix K, M, G or T
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Creates a snapshot of a volume
    Snapshot {
        /// STORAGE/VOLUME
        volume: VolumeName,
        /// Name of the snapshot
        snapshot: String,
    },
    /// Creates a volume with the contents of a snapshot
    Clone {
        /// STORAGE/VOLUME
        volume: VolumeName,
        /// Name of the snapshot
        snapshot: String,
        /// STORAGE/VOLUME of the new one, on the same storage
        new: VolumeName,
    },
    /// Removes a volume that is not attached, with its snapshots
    Remove {
        /// STORAGE/VOLUME
        volume: VolumeName,
    },
    /// Forgets the writer of a volume whose host is off, so that it can be attached elsewhere
    Release {
        /// STORAGE/VOLUME
        volume: VolumeName,
    },
    /// Allows another host to attach a volume that is in use, for live migration
    HandOver {
        /// STORAGE/VOLUME
        volume: VolumeName,
        /// Name of the host that the domain moves to
        host: String,
    },
    /// Removes what commands have left that were killed
    Gc {
        /// Name of the storage; all if left out
        storage: Option<String>,
        /// Also removes images that the registry does not know
        #[arg(long)]
        unknown: bool,
    },
}

/// Parses a number with an optional suffix K, M, G or T.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    let unit = units.iter().find_map(|(unit, shift)| {
        let digits = text.strip_suffix(unit)?;
        Some((digits, 1u64 << shift))
    });
    let (digits, unit) = unit.unwrap_or((text, 1));
    let size = digits
        .parse::<u64>()
        .ok()
        .and_then(|size| size.checked_mul(unit));
    size.ok_or_else(|| "use a number of bytes, or one with suffix K, M, G or T".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("20G"), Ok(20 << 30));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        for text in ["", "G", "-1", "1.5G", "20000000T", "1g"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
