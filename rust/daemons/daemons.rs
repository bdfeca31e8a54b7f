// SPDX-License-Identifier: GPL-2.0-only

//! Storage daemons that tests start: Ceph, GlusterFS and etcd.
//!
//! They run on the loopback device, without systemd and without block devices, in a namespace of
//! `scripts/in-root --cluster`, and end with it. Their files and logs are in [`work_dir`].
//!
//! All functions panic if a daemon does not do what a test needs.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod ceph;
mod daemon;
mod etcd;
mod gluster;

pub use ceph::Ceph;
pub use daemon::{run, wait_until, Daemon};
pub use etcd::Etcd;
pub use gluster::{Gluster, Replicas};

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

/// The address of the daemons of Ceph and GlusterFS. Bricks cannot be on 127.0.0.1, and machines in
/// QEMU that use the network of this namespace have a device of their own with that address.
pub const HOST: &str = "10.77.0.1";

/// Gives the loopback device the address [`HOST`].
fn add_address() {
    let address = format!("{HOST}/32");
    run("ip", &["address", "replace", &address, "dev", "lo"]);
}

/// Returns the directory of this process's daemons, which `RBLKIF_CLUSTER_DIR` contains.
pub fn work_dir(name: &str) -> PathBuf {
    let parent = std::env::var_os("RBLKIF_CLUSTER_DIR").unwrap_or_else(|| "/tmp".into());
    let dir = Path::new(&parent).join(format!("{}-{name}", process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir
}
