// SPDX-License-Identifier: GPL-2.0-only

//! A Gluster cluster of one host, whose bricks are directories.

use crate::daemon::{run, wait_until, Daemon};
use crate::{add_address, work_dir, HOST};
use rustix::process::{kill_process, Pid, Signal};
use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;

/// Seconds after which a client gives a brick up that does not answer.
const PING_TIMEOUT: &str = "10";

/// The replicas and options of a volume.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Replicas {
    /// Three replicas, and options that keep acknowledged writes.
    Three,
    /// Three replicas with the default options.
    ThreeDefault,
    /// Two replicas without write-behind.
    Two,
}

/// A Gluster cluster.
pub struct Gluster {
    dir: PathBuf,
    /// The management daemon.
    pub glusterd: Daemon,
}

impl Gluster {
    /// Starts the management daemon. There is one for all processes of a network namespace.
    pub fn start() -> Self {
        let dir = work_dir("gluster");
        add_address();
        let args = ["--no-daemon", "--log-level", "WARNING"];
        let glusterd = Daemon::start("glusterd", args, &dir.join("glusterd.log"));
        let mut gluster = Self { dir, glusterd };
        gluster.start_management();
        gluster
    }

    /// Starts the management daemon unless it runs, and waits until it accepts connections.
    pub fn start_management(&mut self) {
        self.glusterd.restart();
        wait_until("glusterd accepts connections", || {
            self.glusterd.check();
            TcpStream::connect((HOST, 24007)).is_ok()
        });
    }

    /// Creates and starts a volume.
    pub fn create_volume(&self, name: &str, replicas: Replicas) {
        let count: u8 = if replicas == Replicas::Two { 2 } else { 3 };
        let bricks: Vec<String> = (0..count)
            .map(|index| {
                let dir = self.dir.join(format!("{name}-{index}"));
                fs::create_dir_all(&dir).unwrap();
                format!("{HOST}:{}/brick", dir.display())
            })
            .collect();
        let count = count.to_string();
        let mut create = vec!["volume", "create", name, "replica", &count];
        create.extend(bricks.iter().map(String::as_str));
        create.push("force");
        gluster(&create);
        let set = |option: &str, value: &str| gluster(&["volume", "set", name, option, value]);
        if replicas == Replicas::Three {
            set("group", "virt");
        }
        if replicas != Replicas::ThreeDefault {
            set("performance.write-behind", "off");
        }
        set("cluster.server-quorum-type", "none");
        set("network.ping-timeout", PING_TIMEOUT);
        gluster(&["volume", "start", name, "force"]);
    }

    /// Returns the URI of a volume.
    pub fn uri(&self, volume: &str) -> String {
        format!("gluster://{HOST}/{volume}")
    }

    /// Kills the process of a brick.
    pub fn kill_brick(&self, volume: &str, index: u32) {
        let pid = self.brick(volume, index).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        wait_until("the brick has ended", || {
            self.brick(volume, index) != Some(pid)
        });
    }

    /// Sends a signal to the process of a brick.
    pub fn signal_brick(&self, volume: &str, index: u32, signal: Signal) {
        kill_process(self.brick(volume, index).unwrap(), signal).unwrap();
    }

    /// Starts the bricks of a volume with three replicas that do not run.
    ///
    /// The management daemon starts a brick only after it has noticed its end.
    pub fn start_bricks(&self, volume: &str) {
        wait_until("the bricks run", || {
            gluster(&["volume", "start", volume, "force"]);
            (0..3).all(|index| self.brick(volume, index).is_some())
        });
    }

    /// Returns the process of a brick, found by the directory in its command line.
    fn brick(&self, volume: &str, index: u32) -> Option<Pid> {
        let name = format!("{volume}-{index}/brick");
        let is_brick = |pid: i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("glusterfsd") && line.contains(&name)
        };
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .find(|pid| is_brick(*pid))
            .and_then(Pid::from_raw)
    }
}

fn gluster(args: &[&str]) {
    let mut all = vec!["--mode=script"];
    all.extend(args);
    run("gluster", &all);
}
