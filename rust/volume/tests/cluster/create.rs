// SPDX-License-Identifier: GPL-2.0-only

//! Creators that compete for names and are killed at random points.

use crate::clock;
use daemons::Etcd;
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;
use volume::{Config, Errno, Registry, VolumeName};

const CREATORS: usize = 3;

/// Time for which a killed creator blocks its image.
const INTENT: Duration = Duration::from_secs(3);

/// Number of attempts to create a name.
const TRIES: u32 = 20;

/// Creators in processes of their own.
struct Creators {
    urls: String,
    dir: PathBuf,
    names: usize,
    /// Their clocks are an hour apart.
    are_clocks_wrong: bool,
}

impl Creators {
    fn start(&self, number: usize) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        if self.are_clocks_wrong {
            clock::shift(&mut command, [-1, 0, 1][number]);
        }
        command
            .args(["--exact", "create::process", "--ignored"])
            .env("CREATOR_ETCD", &self.urls)
            .env("CREATOR_DIR", &self.dir)
            .env("CREATOR_NAMES", self.names.to_string())
            .env("CREATOR_NUMBER", number.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Has creators compete, kills each some times, and lets them end.
    fn compete(&self, kills: usize) {
        let mut creators: Vec<(usize, Child)> = (0..CREATORS)
            .map(|number| (number, self.start(number)))
            .collect();
        let mut state = 0x9e37_79b9u64;
        for kill in 0..kills * CREATORS {
            // Times of no pattern, which are the same in each run.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            thread::sleep(Duration::from_millis(50 + (state >> 33) % 300));
            let (number, child) = &mut creators[kill % CREATORS];
            child.kill().unwrap();
            child.wait().unwrap();
            *child = self.start(*number);
        }
        for (_, mut child) in creators {
            assert!(child.wait().unwrap().success());
        }
    }

    /// Returns how often a creator was told that it has created a name.
    fn winners(&self) -> HashMap<String, usize> {
        let mut winners = HashMap::new();
        for number in 0..CREATORS {
            let log = fs::read_to_string(self.dir.join(format!("{number}"))).unwrap_or_default();
            for name in log.lines() {
                *winners.entry(name.to_owned()).or_insert(0) += 1;
            }
        }
        winners
    }
}

/// A creator: it creates all names, and adds those to its log that it has created.
#[test]
#[ignore = "it is a process of other tests"]
fn process() {
    clock::check();
    let variable = |name: &str| std::env::var(name).unwrap();
    let registry = registry(&variable("CREATOR_ETCD"));
    let number: usize = variable("CREATOR_NUMBER").parse().unwrap();
    let names: usize = variable("CREATOR_NAMES").parse().unwrap();
    let path = Path::new(&variable("CREATOR_DIR")).join(number.to_string());
    let mut log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    for index in 0..names {
        // Each begins elsewhere, so that all three meet at all names.
        let name = format!("s/v{}", (index + number) % names);
        if create(&registry, &name) {
            writeln!(log, "{name}").unwrap();
        }
    }
}

/// Creates a volume. Returns `false` if there is one.
fn create(registry: &Registry<volume::etcd::Etcd>, name: &str) -> bool {
    let name = name.parse().unwrap();
    for _ in 0..TRIES {
        match registry.create(&name, 1 << 20) {
            Ok(()) => return true,
            Err(error) if error.errno() == Errno::EXIST => return false,
            // It took longer than the lease, or a new leader is elected.
            Err(error) => {
                let may_pass = matches!(error.errno(), Errno::AGAIN | Errno::TIMEDOUT);
                assert!(may_pass, "{error}");
            }
        }
    }
    panic!("{name} is not created in {TRIES} tries");
}

fn registry(urls: &str) -> Registry<volume::etcd::Etcd> {
    let config = Config {
        etcd: urls.split(' ').map(str::to_owned).collect(),
        host: "test".to_owned(),
    };
    volume::connect(&config).with_intent_time(INTENT)
}

/// Checks that each name was created by at most one creator, and that the storage has exactly the
/// images of the registry.
fn check(registry: &Registry<volume::etcd::Etcd>, creators: &Creators) {
    for (name, count) in creators.winners() {
        assert_eq!(count, 1, "{name}");
    }
    let volumes = registry.list(Some("s")).unwrap();
    assert_eq!(volumes.len(), creators.names);
    let mut removed = 0;
    daemons::wait_until("all orphans are collected", || {
        let collected = registry.collect("s", true).unwrap();
        removed += collected.removed.len();
        assert!(collected.missing.is_empty(), "{collected:?}");
        collected.waiting.is_empty()
    });
    eprintln!("{} names, {removed} orphans collected", creators.names);
    let mut images = registry.storage("s").unwrap().list().unwrap();
    images.retain(|image| !image.starts_with("rblk-storage-"));
    let mut expected: Vec<String> = volumes
        .iter()
        .map(|info| format!("rblk-{}", info.volume.uuid))
        .collect();
    images.sort();
    expected.sort();
    assert_eq!(images, expected);
    let again: VolumeName = "s/v0".parse().unwrap();
    assert_eq!(
        registry.create(&again, 512).unwrap_err().errno(),
        Errno::EXIST
    );
    for info in volumes {
        registry.remove(&info.name).unwrap();
    }
}

/// Rounds of creators on a storage.
struct Rounds<'a> {
    uri: String,
    name: &'a str,
    names: usize,
    kills: usize,
    are_clocks_wrong: bool,
}

impl Rounds<'_> {
    fn run(&self) {
        let etcd = Etcd::start(1);
        let urls = etcd.urls().join(" ");
        let registry = registry(&urls);
        registry.add_storage("s", &self.uri).unwrap();
        for round in 0..scaled(1, 10) {
            let creators = Creators {
                urls: urls.clone(),
                dir: daemons::work_dir(&format!("{}-{round}", self.name)),
                names: self.names,
                are_clocks_wrong: self.are_clocks_wrong,
            };
            creators.compete(self.kills);
            check(&registry, &creators);
        }
    }
}

/// Returns the first number, or the second one with `RBLKIF_CLUSTER=full`.
fn scaled(short: usize, full: usize) -> usize {
    match std::env::var("RBLKIF_CLUSTER").as_deref() {
        Ok("full") => full,
        _ => short,
    }
}

fn directory(name: &str) -> String {
    format!("dir:{}", daemons::work_dir(name).display())
}

#[test]
fn names_in_a_directory_are_created_once_while_creators_are_killed() {
    let rounds = Rounds {
        uri: directory("images-killed"),
        name: "creators-dir",
        names: scaled(40, 100),
        kills: scaled(4, 8),
        are_clocks_wrong: false,
    };
    rounds.run();
}

#[test]
fn names_are_created_once_by_hosts_whose_clocks_are_an_hour_apart() {
    let rounds = Rounds {
        uri: directory("images-clocks"),
        name: "creators-clocks",
        names: scaled(20, 100),
        kills: scaled(3, 8),
        are_clocks_wrong: true,
    };
    rounds.run();
}

#[test]
fn names_on_rbd_are_created_once_while_creators_are_killed() {
    let rounds = Rounds {
        uri: crate::ceph_storage("creators"),
        name: "creators-rbd",
        names: scaled(20, 100),
        kills: scaled(3, 8),
        are_clocks_wrong: false,
    };
    rounds.run();
}

#[test]
fn names_are_created_once_while_members_of_etcd_are_killed() {
    let mut etcd = Etcd::start(3);
    let urls = etcd.urls().join(" ");
    let registry = registry(&urls);
    registry
        .add_storage("s", &directory("images-members"))
        .unwrap();
    let creators = Creators {
        urls,
        dir: daemons::work_dir("creators-members"),
        names: scaled(40, 100),
        are_clocks_wrong: false,
    };
    thread::scope(|scope| {
        scope.spawn(|| creators.compete(2));
        for member in 0..3 {
            thread::sleep(Duration::from_secs(1));
            etcd.members[member].kill();
            thread::sleep(Duration::from_secs(2));
            etcd.members[member].restart();
            etcd.wait();
        }
    });
    check(&registry, &creators);
}
