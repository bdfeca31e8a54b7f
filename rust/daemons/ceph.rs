// SPDX-License-Identifier: GPL-2.0-only

//! A Ceph cluster: one monitor and one storage daemon, whose disk is a file.

use crate::daemon::{run, Daemon};
use crate::work_dir;
use std::fs;
use std::path::{Path, PathBuf};

const FSID: &str = "6f1b0b6e-8d9a-4d53-9d0c-3a1f6f6d0c01";
const OSD: &str = "0f1b0b6e-8d9a-4d53-9d0c-3a1f6f6d0c02";

/// A Ceph cluster with the pool `rbd`.
pub struct Ceph {
    dir: PathBuf,
    /// The monitor.
    pub mon: Daemon,
    /// The storage daemon.
    pub osd: Daemon,
}

impl Ceph {
    /// Starts a cluster.
    pub fn start() -> Self {
        let dir = work_dir("ceph");
        let conf = dir.join("ceph.conf");
        fs::write(&conf, configuration(&dir)).unwrap();
        let conf = conf.to_str().unwrap();
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let map = path("monmap");
        let address = "[v2:127.0.0.1:3300,v1:127.0.0.1:6789]";
        run(
            "monmaptool",
            &["--create", "--fsid", FSID, "--addv", "a", address, &map],
        );
        run(
            "ceph-mon",
            &["-c", conf, "-i", "a", "--mkfs", "--monmap", &map],
        );
        let mon = Daemon::start(
            "ceph-mon",
            ["-c", conf, "-i", "a", "-f"],
            &dir.join("mon.log"),
        );
        let ceph = |args: &[&str]| {
            let mut all = vec!["-c", conf, "--connect-timeout", "60"];
            all.extend(args);
            run("ceph", &all)
        };
        ceph(&["osd", "new", OSD, "0"]);
        fs::create_dir(dir.join("osd")).unwrap();
        run(
            "ceph-osd",
            &["-c", conf, "-i", "0", "--mkfs", "--osd-uuid", OSD],
        );
        let osd = Daemon::start(
            "ceph-osd",
            ["-c", conf, "-i", "0", "-f"],
            &dir.join("osd.log"),
        );
        ceph(&[
            "osd",
            "pool",
            "create",
            "rbd",
            "8",
            "8",
            "--size",
            "1",
            "--yes-i-really-mean-it",
        ]);
        ceph(&["osd", "pool", "application", "enable", "rbd", "rbd"]);
        Self { dir, mon, osd }
    }

    /// Returns the path of the configuration file.
    pub fn conf(&self) -> String {
        self.dir.join("ceph.conf").to_str().unwrap().to_owned()
    }

    /// Runs `rbd` with arguments.
    pub fn rbd(&self, args: &[&str]) -> String {
        let conf = self.conf();
        let mut all = vec!["-c", &conf];
        all.extend(args);
        run("rbd", &all)
    }
}

fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "[global]
fsid = {FSID}
mon_host = [v2:127.0.0.1:3300,v1:127.0.0.1:6789]
ms_bind_msgr2 = true
public_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {dir}
admin_socket = {dir}/$name.$pid.asok
log_file = {dir}/$name.log
crash_dir = {dir}
mon_data = {dir}/mon
osd_data = {dir}/osd
mon_data_avail_crit = 1
mon_data_avail_warn = 1
mon_allow_pool_size_one = true
osd_objectstore = bluestore
osd_class_dir = /usr/lib/x86_64-linux-gnu/rados-classes
bluestore_block_size = 2147483648
bluestore_block_wal_size = 0
bluestore_block_db_size = 0
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_mclock_skip_benchmark = true
osd_op_num_shards = 1
osd_memory_target = 939524096
"
    )
}
