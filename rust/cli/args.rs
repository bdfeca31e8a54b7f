// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `rblk`.

mod volume;

pub use volume::{VolumeCommand, VolumeStorageCommand};

use self::volume::parse_size;
use crate::exit;
use ::volume::VolumeName;
use api::RunDir;
use clap::{Parser, Subcommand};
use engine::Uri;
use std::path::PathBuf;
use std::str::FromStr;

/// Shows and controls disks that rblktap serves, and their images
#[derive(Debug, Parser)]
#[command(name = "rblk", version, after_help = exit::HELP)]
pub struct Rblk {
    /// Prints JSON in place of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Directory of the sockets of rblkd and rblktap
    #[arg(long, global = true, value_name = "DIR", default_value = RunDir::DEFAULT)]
    pub run_dir: PathBuf,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The objects of `rblk`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Disks of running guests
    Disk {
        /// The command.
        #[command(subcommand)]
        command: DiskCommand,
    },
    /// Images of disks
    Image {
        /// The command.
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// This host
    Host {
        /// The command.
        #[command(subcommand)]
        command: HostCommand,
    },
    /// Storage that disks are on
    Storage {
        /// The command.
        #[command(subcommand)]
        command: StorageCommand,
    },
    /// Shows what has happened to disks and storage
    Events {
        /// Shows what happens until interrupted
        #[arg(long)]
        follow: bool,
    },
    /// Prints counters and states in the text format of Prometheus
    Metrics,
    /// Finds settings of this host that cause trouble, and prints the command that fixes each
    Check,
    /// Volumes: images that several hosts know by name
    Volume {
        /// The command.
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// Prints a script that completes command lines in a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Writes the man pages
    #[command(hide = true)]
    Man {
        /// Directory for the pages
        directory: PathBuf,
    },
}

/// The commands for this host.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Shows the state of rblkd, how it has started, and its storage
    Status,
}

/// The commands for storage.
#[derive(Debug, Subcommand)]
pub enum StorageCommand {
    /// Shows which storage domains of rblkd.conf answer
    Status,
    /// Reads an image, as rblkd does to check a storage domain
    #[command(hide = true)]
    Probe {
        /// The image
        image: Uri,
    },
    /// The storages of volumes.
    #[command(flatten)]
    Volumes(VolumeStorageCommand),
}

/// The commands for a disk.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Lists the disks
    List {
        /// Shows the list again whenever a disk changes, until interrupted
        #[arg(long)]
        watch: bool,
    },
    /// Shows what a disk has done
    Stats {
        /// DOMAIN/DEVICE, by name or number: web/xvda, 5/xvda or 5/51712
        disk: DiskName,
        /// Shows the rates of each second until interrupted
        #[arg(long)]
        watch: bool,
    },
    /// Explains how a disk is connected, and what it waits for; also one that the kernel serves
    Explain {
        /// DOMAIN/DEVICE
        disk: DiskName,
    },
    /// Completes the requests in flight and takes no more
    Pause {
        /// DOMAIN/DEVICE
        disk: DiskName,
    },
    /// Takes requests again
    Resume {
        /// DOMAIN/DEVICE
        disk: DiskName,
    },
    /// Changes the image of a disk, which is paused meanwhile
    Retarget {
        /// DOMAIN/DEVICE
        disk: DiskName,
        /// The new image or volume, for example qcow2:/srv/a.qcow2 or vol:fast/db
        #[arg(value_parser = parse_image)]
        image: String,
    },
    /// Enlarges an image with a format, or tells the guest that its image has changed its size
    Resize {
        /// DOMAIN/DEVICE
        disk: DiskName,
        /// New size in bytes, or with suffix K, M, G or T; without one it is read from the image
        #[arg(value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Replaces the process of a disk, for example after an upgrade
    Restart {
        /// DOMAIN/DEVICE
        disk: DiskName,
    },
}

/// The commands for an image. All but `info` need an image that no guest uses.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Creates an image; an existing file is not overwritten
    Create {
        /// The image, for example qcow2:/srv/a.qcow2
        image: Uri,
        /// Size in bytes, or with suffix K, M, G or T; from the backing image if left out
        #[arg(required_unless_present = "backing")]
        size: Option<String>,
        /// Image that holds what has not been written to the new one
        #[arg(long, value_name = "IMAGE")]
        backing: Option<Uri>,
    },
    /// Shows format, size and backing images
    Info {
        /// The image
        image: Uri,
    },
    /// Internal snapshots of a qcow2 image
    Snapshot {
        /// The command.
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Writes the contents of an image into its backing image
    Commit {
        /// The image
        image: Uri,
    },
    /// Checks the consistency of an image
    Check {
        /// The image
        image: Uri,
        /// Repairs errors and leaks
        #[arg(long)]
        repair: bool,
    },
    /// Copies an image into another format; an existing file is not overwritten
    Convert {
        /// The image to read
        source: Uri,
        /// The image to create
        target: Uri,
    },
}

/// The commands for snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Lists the snapshots
    List {
        /// The image
        image: Uri,
    },
    /// Creates a snapshot
    Create {
        /// The image
        image: Uri,
        /// Name of the snapshot
        name: String,
    },
    /// Returns to a snapshot; what was written since is lost
    Apply {
        /// The image
        image: Uri,
        /// Name of the snapshot
        name: String,
    },
    /// Deletes a snapshot
    Delete {
        /// The image
        image: Uri,
        /// Name of the snapshot
        name: String,
    },
}

/// Checks the name of an image or volume.
fn parse_image(text: &str) -> Result<String, engine::Error> {
    match VolumeName::of_image(text) {
        Some(name) => name.map(drop)?,
        None => text.parse::<Uri>().map(drop)?,
    }
    Ok(text.to_owned())
}

/// The name of a disk on the command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DiskName {
    /// Name or number of the domain.
    pub domain: String,
    /// Name or number of the device.
    pub device: String,
}

impl FromStr for DiskName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.rsplit_once('/') {
            Some((domain, device)) if !domain.is_empty() && !device.is_empty() => Ok(Self {
                domain: domain.to_owned(),
                device: device.to_owned(),
            }),
            _ => Err("use DOMAIN/DEVICE, for example 5/xvda"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_consistent() {
        Rblk::command().debug_assert();
    }

    #[test]
    fn disks_are_named_by_domain_and_device() {
        let name: DiskName = "web/xvda".parse().unwrap();
        assert_eq!(
            (name.domain.as_str(), name.device.as_str()),
            ("web", "xvda")
        );
        for text in ["", "web", "web/", "/xvda"] {
            assert!(text.parse::<DiskName>().is_err(), "{text}");
        }
    }

    #[test]
    fn invalid_command_lines_are_refused() {
        for line in [
            "rblk",
            "rblk disk",
            "rblk disk pause",
            "rblk disk pause xvda",
            "rblk disk retarget 5/xvda vdi:/a",
            "rblk disk retarget 5/xvda vol:fast",
            "rblk image create qcow2:/a",
            "rblk volume create fast/db",
            "rblk volume create fast 1G",
            "rblk volume create fast/db 1X",
        ] {
            assert!(Rblk::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        assert!(Rblk::try_parse_from("rblk disk list --json".split(' ')).is_ok());
    }
}
