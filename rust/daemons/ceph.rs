// SPDX-License-Identifier: GPL-2.0-only

//! A Ceph cluster: monitors, and storage daemons whose disks are files.

use crate::daemon::{run, Daemon, LIMIT};
use crate::{add_address, work_dir, HOST};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

const FSID: &str = "6f1b0b6e-8d9a-4d53-9d0c-3a1f6f6d0c01";
const OSD: &str = "0f1b0b6e-8d9a-4d53-9d0c-3a1f6f6d0d0";

/// The port of the next monitor for protocol version 2.
static PORT: AtomicU16 = AtomicU16::new(3300);

/// The difference of the ports of a monitor for protocol versions 1 and 2.
const OTHER_PORT: u16 = 3489;

/// The number of lines of a monitor's log that are printed if it does not answer.
const LOG_LINES: usize = 40;

/// A Ceph cluster with the pool `rbd`.
pub struct Ceph {
    dir: PathBuf,
    /// The monitors.
    pub mons: Vec<Daemon>,
    /// The storage daemons.
    pub osds: Vec<Daemon>,
}

impl Ceph {
    /// Starts a cluster with `count` monitors, storage daemons and replicas.
    pub fn start(count: u16) -> Self {
        add_address();
        let base = PORT.fetch_add(count, Ordering::Relaxed);
        let dir = work_dir(&format!("ceph-{base}"));
        let conf = dir.join("ceph.conf");
        let addresses: Vec<String> = (base..base + count)
            .map(|port| format!("[v2:{HOST}:{port},v1:{HOST}:{}]", port + OTHER_PORT))
            .collect();
        fs::write(&conf, configuration(&dir, &addresses.join(" "), count)).unwrap();
        let conf = conf.to_str().unwrap();
        let map = dir.join("monmap").to_str().unwrap().to_owned();
        let ids: Vec<String> = (0..count).map(|id| id.to_string()).collect();
        let mut create = vec!["--create", "--fsid", FSID];
        for (id, address) in ids.iter().zip(&addresses) {
            create.extend(["--addv", id, address]);
        }
        create.push(&map);
        run("monmaptool", &create);
        let daemon = |program: &str, id: &str| {
            let log = dir.join(format!("{program}-{id}.log"));
            Daemon::start(program, ["-c", conf, "-i", id, "-f"], &log)
        };
        let mons = ids.iter().map(|id| {
            let mkfs = ["-c", conf, "-i", id, "--mkfs", "--monmap", &map];
            run("ceph-mon", &mkfs);
            daemon("ceph-mon", id)
        });
        let mut mons: Vec<Daemon> = mons.collect();
        await_monitors(conf, &mut mons, &dir);
        let ceph = |args: &[&str]| ceph(conf, args);
        let osds = ids.iter().map(|id| {
            let uuid = format!("{OSD}{id}");
            ceph(&["osd", "new", &uuid, id]);
            fs::create_dir(dir.join(format!("osd-{id}"))).unwrap();
            let mkfs = ["-c", conf, "-i", id, "--mkfs", "--osd-uuid", &uuid];
            run("ceph-osd", &mkfs);
            daemon("ceph-osd", id)
        });
        let osds = osds.collect();
        let size = count.to_string();
        let create = ["osd", "pool", "create", "rbd", "8", "8", "--size", &size];
        ceph(&[&create[..], &["--yes-i-really-mean-it"]].concat());
        ceph(&["osd", "pool", "application", "enable", "rbd", "rbd"]);
        Self { dir, mons, osds }
    }

    /// Returns the path of the configuration file.
    pub fn conf(&self) -> String {
        self.dir.join("ceph.conf").to_str().unwrap().to_owned()
    }

    /// Runs `ceph` with arguments.
    pub fn ceph(&self, args: &[&str]) -> String {
        ceph(&self.conf(), args)
    }

    /// Runs `rbd` with arguments.
    pub fn rbd(&self, args: &[&str]) -> String {
        let conf = self.conf();
        let mut all = vec!["-c", &conf];
        all.extend(args);
        run("rbd", &all)
    }
}

/// Waits until the monitors answer. Each try is a new client: one that connected just after the
/// start of a monitor got no answer for a minute once, for an unknown reason. Prints the last
/// messages of the monitors if there is no answer.
fn await_monitors(conf: &str, mons: &mut [Daemon], dir: &Path) {
    let deadline = Instant::now() + LIMIT;
    while !is_answered(conf) {
        mons.iter_mut().for_each(Daemon::check);
        if Instant::now() >= deadline {
            (0..mons.len()).for_each(|id| print_end(&dir.join(format!("mon.{id}.log"))));
            panic!("the monitors of Ceph do not answer");
        }
    }
}

fn is_answered(conf: &str) -> bool {
    let status = Command::new("ceph")
        .args(["-c", conf, "--connect-timeout", "9", "status"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.unwrap().success()
}

fn print_end(log: &Path) {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
    println!("{}:\n{}", log.display(), end.join("\n"));
}

fn ceph(conf: &str, args: &[&str]) -> String {
    let mut all = vec!["-c", conf, "--connect-timeout", "60"];
    all.extend(args);
    run("ceph", &all)
}

fn configuration(dir: &Path, mons: &str, replicas: u16) -> String {
    let dir = dir.display();
    format!(
        "[global]
fsid = {FSID}
mon_host = {mons}
ms_bind_msgr2 = true
public_addr = {HOST}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {dir}
admin_socket = {dir}/$name.$pid.asok
log_file = {dir}/$name.log
crash_dir = {dir}
mon_data = {dir}/mon-$id
osd_data = {dir}/osd-$id
mon_osd_min_down_reporters = 1
mon_data_avail_crit = 1
mon_data_avail_warn = 1
mon_allow_pool_size_one = true
osd_objectstore = bluestore
osd_class_dir = /usr/lib/x86_64-linux-gnu/rados-classes
bluestore_block_size = 2147483648
bluestore_block_wal_size = 0
bluestore_block_db_size = 0
osd_crush_chooseleaf_type = 0
osd_pool_default_size = {replicas}
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_mclock_skip_benchmark = true
osd_op_num_shards = 1
osd_memory_target = 939524096
"
    )
}
