// SPDX-License-Identifier: GPL-2.0-only

//! The daemons of the tests in `qemu-test/cluster`.
//!
//! Those tests run in another root, and in the network namespace of this process. They send
//! commands over a connection, a line each, and get a line for each that was carried out. They
//! fail if the connection ends.

use crate::disk::Disk;
use crate::writer::verify_all;
use daemons::{run, Ceph, Daemon, Etcd, Gluster, Replicas};
use engine::Options;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::PathBuf;

/// The port for commands.
const PORT: u16 = 4000;

/// The Gluster volume.
const VOLUME: &str = "slow";

struct Cluster {
    etcd: Etcd,
    ceph: Ceph,
    gluster: Gluster,
}

impl Cluster {
    fn start() -> Self {
        let gluster = Gluster::start();
        gluster.create_volume(VOLUME, Replicas::Three);
        Self {
            etcd: Etcd::start(1),
            ceph: Ceph::start(1),
            gluster,
        }
    }

    /// Returns one of the daemons that are children of this process.
    fn daemon(&mut self, name: &str) -> &mut Daemon {
        match name {
            "etcd" => &mut self.etcd.members[0],
            "mon" => &mut self.ceph.mons[0],
            "osd" => &mut self.ceph.osds[0],
            "glusterd" => &mut self.gluster.glusterd,
            _ => panic!("no daemon is called {name}"),
        }
    }

    fn kill(&mut self, name: &str) {
        match name.strip_prefix("brick") {
            Some(index) => self.gluster.kill_brick(VOLUME, index.parse().unwrap()),
            None => self.daemon(name).kill(),
        }
    }

    /// Starts all daemons that do not run.
    fn start_all(&mut self) {
        for name in ["etcd", "mon", "osd"] {
            self.daemon(name).restart();
        }
        self.gluster.start_management();
        self.gluster.start_bricks(VOLUME);
        self.etcd.wait();
    }

    /// Copies a file to an image of the pool.
    fn fill(&self, image: &str, file: &str) {
        let target = format!("rbd:rbd/{image}:conf={}", self.ceph.conf());
        run("qemu-img", &["convert", "-n", "-O", "raw", file, &target]);
    }

    /// Carries out a command, and returns what it answers.
    fn command(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["where"] => {
                let uri = self.gluster.uri(VOLUME);
                return [&self.ceph.conf(), &uri, &self.etcd.urls().join(" ")]
                    .map(String::as_str)
                    .join(" ");
            }
            ["kill", ref names @ ..] => names.iter().for_each(|name| self.kill(name)),
            ["start"] => self.start_all(),
            ["fill", image, file] => self.fill(image, file),
            ["verify", uri, blocks, version] => {
                verify(uri, blocks.parse().unwrap(), version.parse().unwrap());
            }
            _ => panic!("no command is {line}"),
        }
        String::new()
    }
}

/// Checks the first blocks of an image, which no one else uses, see [`crate::writer`].
fn verify(uri: &str, blocks: u64, version: u64) {
    let options = Options {
        runtime_dir: daemons::work_dir("run"),
        ..crate::disk::patient()
    };
    let mut disk = Disk::new(engine::open(&uri.parse().unwrap(), &options).unwrap());
    verify_all(blocks, version, &mut disk);
    disk.close();
}

#[test]
#[ignore = "it has the daemons of qemu-test/cluster"]
fn serve() {
    let mut cluster = Cluster::start();
    let listener = TcpListener::bind(("127.0.0.1", PORT)).unwrap();
    // scripts/cluster-tests waits for this file, and finds the namespace by what is in it.
    let dir = PathBuf::from(std::env::var_os("RBLKIF_CLUSTER_DIR").unwrap());
    let namespace = fs::read_link("/proc/self/ns/net").unwrap();
    fs::write(dir.join("namespace.tmp"), namespace.to_str().unwrap()).unwrap();
    fs::rename(dir.join("namespace.tmp"), dir.join("namespace")).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    for line in lines {
        let answer = cluster.command(&line.unwrap());
        writeln!(stream, "{answer}").unwrap();
    }
}
