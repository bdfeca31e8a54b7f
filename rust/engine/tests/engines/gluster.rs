// SPDX-License-Identifier: GPL-2.0-only

//! The engine for files of a Gluster volume.

use crate::disk::{Cut, Disk};
use crate::suite::{Target, SIZE};
use crate::writer::Writer;
use daemons::{Gluster, Replicas};
use engine::gluster::GlusterDir;
use engine::{Engine, Errno, GlusterVolume, Options};
use rustix::process::Signal;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// The cluster of all tests, with the volumes `safe` and `killed`. It ends with the namespace of
/// this process.
fn gluster() -> MutexGuard<'static, Gluster> {
    static GLUSTER: OnceLock<Mutex<Gluster>> = OnceLock::new();
    let gluster = GLUSTER.get_or_init(|| {
        let gluster = Gluster::start();
        gluster.create_volume("safe", Replicas::Three);
        gluster.create_volume("killed", Replicas::Three);
        Mutex::new(gluster)
    });
    gluster.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(volume: &str) -> GlusterVolume {
    let uri = gluster().uri(volume);
    uri.strip_prefix("gluster:").unwrap().parse().unwrap()
}

/// A file of a volume.
struct File {
    dir: GlusterDir,
    volume: &'static str,
    name: String,
}

impl File {
    fn create(volume: &'static str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("file{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = GlusterDir::connect(&address(volume), "test").unwrap();
        dir.create(&name, SIZE).unwrap();
        Self { dir, volume, name }
    }

    fn uri(&self) -> String {
        address(self.volume)
            .file(&format!("test/{}", self.name))
            .to_string()
    }
}

impl Target for File {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        engine::open(&self.uri().parse()?, options)
    }

    fn resize(&self, size: u64) -> bool {
        self.dir.enlarge(&self.name, size).unwrap();
        size > SIZE
    }

    fn cases(&self) -> u32 {
        2
    }
}

mod suite {
    conformance!(Some(super::File::create("safe")));
}

#[test]
fn a_second_writer_is_refused() {
    let file = File::create("safe");
    let first = file.disk();
    let error = file.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    first.close();
    file.disk().close();
    file.dir.remove(&file.name).unwrap();
    assert!(!file.dir.list().unwrap().contains(&file.name));
    let error = file.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::NOENT);
}

#[test]
fn volumes_that_lose_acknowledged_writes_are_refused() {
    for (name, replicas, reason) in [
        ("default", Replicas::ThreeDefault, "write-behind"),
        ("two", Replicas::Two, "two replicas"),
    ] {
        gluster().create_volume(name, replicas);
        let error = GlusterDir::connect(&address(name), "test").err().unwrap();
        assert_eq!(error.errno(), Errno::PERM);
        assert!(error.cause().contains(reason), "{error}");
        let accepted = GlusterVolume {
            allows_loss: true,
            ..address(name)
        };
        GlusterDir::connect(&accepted, "test").unwrap();
    }
    let error = GlusterDir::connect(&address("none"), "test").err().unwrap();
    assert!(error.remedy().contains("gluster volume info"), "{error}");
}

#[test]
fn bricks_that_are_killed_or_frozen_and_come_back_cost_time_and_no_data() {
    let file = File::create("killed");
    let writer = Writer::start(&file.uri(), &daemons::work_dir("run"));
    writer.wait_for_writes(20);
    for bricks in [&[0][..], &[1, 2], &[0, 1, 2]] {
        for brick in bricks {
            gluster().kill_brick("killed", *brick);
        }
        thread::sleep(Duration::from_secs(1));
        gluster().start_bricks("killed");
        writer.wait_for_writes(20);
    }
    gluster().signal_brick("killed", 0, Signal::STOP);
    thread::sleep(Duration::from_secs(15));
    writer.wait_for_writes(20);
    gluster().signal_brick("killed", 0, Signal::CONT);
    writer.wait_for_writes(20);
    let mut writer = writer;
    writer.finish();
    let mut disk = file.disk();
    writer.verify(&mut disk);
    assert_eq!(disk.read(SIZE - 4096, 4096, Cut::Whole).len(), 4096);
    disk.close();
    Disk::new(file.open(&Options::default()).unwrap()).close();
}
