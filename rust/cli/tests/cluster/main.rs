// SPDX-License-Identifier: GPL-2.0-only

//! `rblk storage` and `rblk volume` with real daemons, as Documentation/volumes.rst shows them.

use daemons::{Ceph, Etcd, Gluster, Replicas};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A host with a configuration.
struct Host {
    conf: PathBuf,
}

impl Host {
    fn new(urls: &[String]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let conf = daemons::work_dir(&format!("rblk-{number}")).join("volumes.conf");
        fs::write(&conf, format!("etcd = {}\nhost = xen1\n", urls.join(" "))).unwrap();
        Self { conf }
    }

    fn rblk(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_rblk"))
            .args(line.split(' '))
            .env("RBLK_VOLUMES_CONF", &self.conf)
            .output()
            .unwrap()
    }

    /// Runs a command that succeeds, and returns what it prints.
    fn run(&self, line: &str) -> String {
        let output = self.rblk(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that fails with a status and a text in its message.
    fn fail(&self, line: &str, status: i32, text: &str) {
        let output = self.rblk(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{line}: {errors}");
        assert!(errors.contains(text), "{line}: {errors}");
    }
}

#[test]
fn from_storages_to_volumes() {
    let etcd = Etcd::start(1);
    let ceph = Ceph::start(1);
    let gluster = Gluster::start();
    gluster.create_volume("slow", Replicas::Three);
    gluster.create_volume("lossy", Replicas::ThreeDefault);
    let host = Host::new(&etcd.urls());
    let dir = daemons::work_dir("local");

    host.run(&format!("storage add fast rbd:rbd?conf={}", ceph.conf()));
    host.run(&format!("storage add slow {}", gluster.uri("slow")));
    host.run(&format!("storage add local dir:{}", dir.display()));
    let lossy = gluster.uri("lossy");
    host.fail(&format!("storage add lossy {lossy}"), 1, "write-behind");
    host.run(&format!("storage add lossy {lossy} --unsafe"));
    host.run("storage remove lossy");
    assert_eq!(host.run("storage list").lines().count(), 4);
    assert_eq!(host.run("storage list --check").matches("ok").count(), 3);

    for storage in ["fast", "slow", "local"] {
        host.run(&format!("volume create {storage}/db 8M"));
        host.fail(&format!("volume create {storage}/db 8M"), 1, "already");
        host.run(&format!("volume resize {storage}/db 16M"));
        host.fail(
            &format!("volume resize {storage}/db 8M"),
            2,
            "copy the data",
        );
        assert!(host
            .run(&format!("volume info {storage}/db"))
            .contains("16 MiB"));
    }
    host.run("volume snapshot fast/db monday");
    host.run("volume clone fast/db monday fast/copy");
    assert!(host
        .run("volume info fast/copy")
        .contains("db, snapshot monday"));
    host.fail("volume clone fast/db tuesday fast/other", 1, "no snapshot");
    host.fail("volume snapshot slow/db monday", 5, "kind rbd");
    assert_eq!(host.run("volume list").lines().count(), 5);
    assert_eq!(
        host.run("volume list fast --json")
            .matches("\"clone_of\"")
            .count(),
        2
    );

    // The image of a volume with a clone is kept until the clone is removed.
    host.run("volume remove fast/db");
    assert!(host.run("volume gc fast").contains("in use"));
    host.run("volume remove fast/copy");
    assert!(host.run("volume gc fast").contains("removed"));
    let left = ceph.rbd(&["ls", "rbd"]);
    assert!(left.starts_with("rblk-storage-"), "{left}");
    assert_eq!(left.lines().count(), 1, "{left}");
    host.fail("volume info fast/db", 1, "no volume fast/db");
    host.fail("volume create none/db 1G", 1, "rblk storage add");
    host.fail("storage remove slow", 5, "has volumes");

    // Another registry does not get the places of this one.
    let other = Etcd::start(1);
    let other = Host::new(&other.urls());
    for (name, uri) in [
        ("fast", format!("rbd:rbd?conf={}", ceph.conf())),
        ("slow", gluster.uri("slow")),
        ("local", format!("dir:{}", dir.display())),
    ] {
        other.fail(&format!("storage add {name} {uri}"), 1, "another registry");
        host.fail(
            &format!("storage add more {uri}"),
            1,
            &format!("is the storage {name}"),
        );
    }
    host.run("storage remove fast");
    assert_eq!(ceph.rbd(&["ls", "rbd"]), "");
    for storage in ["slow", "local"] {
        host.run(&format!("volume remove {storage}/db"));
        host.run(&format!("storage remove {storage}"));
    }
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
}

#[test]
fn a_list_follows_the_changes_of_other_hosts() {
    let etcd = Etcd::start(1);
    let host = Host::new(&etcd.urls());
    let dir = daemons::work_dir("followed");
    host.run(&format!("storage add local dir:{}", dir.display()));
    let mut child = Command::new(env!("CARGO_BIN_EXE_rblk"))
        .args(["volume", "list", "--follow", "--json"])
        .env("RBLK_VOLUMES_CONF", &host.conf)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert_eq!(next(), "[]");
    host.run("volume create local/a 1M");
    assert!(next().contains("\"volume\":\"a\""));
    host.run("volume remove local/a");
    assert_eq!(next(), "[]");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn without_a_configuration_or_etcd_the_message_says_what_to_do() {
    let host = Host {
        conf: "/nonexistent/volumes.conf".into(),
    };
    host.fail("volume list", 1, "etcd = http://HOST:2379");
    let host = Host::new(&["http://127.0.0.1:9".to_owned()]);
    host.fail("volume list", 4, "a majority of its members");
}
