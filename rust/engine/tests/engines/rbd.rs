// SPDX-License-Identifier: GPL-2.0-only

//! The engine for images of a Ceph cluster.

use crate::disk::{patient, pattern, Cut, Disk};
use crate::suite::{Target, SIZE};
use crate::writer::Writer;
use daemons::Ceph;
use engine::rbd::RbdPool;
use engine::{Engine, Errno, Options, RbdAddress};
use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// The cluster of all tests. It ends with the namespace of this process.
fn ceph() -> MutexGuard<'static, Ceph> {
    static CEPH: OnceLock<Mutex<Ceph>> = OnceLock::new();
    let ceph = CEPH.get_or_init(|| Mutex::new(Ceph::start(1)));
    ceph.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held for reading by tests that need the daemons, and for writing by the one that kills them.
static DAEMONS: RwLock<()> = RwLock::new(());

/// An image of the cluster.
pub struct Image {
    pub address: RbdAddress,
    pub name: String,
    runtime_dir: PathBuf,
    /// The lock of [`DAEMONS`] that the test has.
    _daemons: Box<dyn Any>,
}

impl Image {
    /// Creates an image of a test that needs the daemons.
    pub fn create() -> Self {
        let guard = DAEMONS.read().unwrap_or_else(PoisonError::into_inner);
        Self::with(guard)
    }

    fn with(daemons: impl Any) -> Self {
        let conf = ceph().conf();
        Self::on(&conf, daemons)
    }

    /// Creates an image of a cluster with this configuration file.
    fn on(conf: &str, daemons: impl Any) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("image{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let address: RbdAddress = format!("rbd?conf={conf}").parse().unwrap();
        let pool = RbdPool::connect(&address).unwrap();
        pool.create(&name, SIZE).unwrap();
        Self {
            address,
            runtime_dir: daemons::work_dir("run"),
            name,
            _daemons: Box::new(daemons),
        }
    }

    pub fn pool(&self) -> RbdPool {
        RbdPool::connect(&self.address).unwrap()
    }

    pub fn uri(&self) -> String {
        self.address.image(&self.name).to_string()
    }

    fn options(&self, options: &Options) -> Options {
        Options {
            runtime_dir: self.runtime_dir.clone(),
            ..options.clone()
        }
    }
}

impl Target for Image {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        engine::open(&self.uri().parse()?, &self.options(options))
    }

    fn resize(&self, size: u64) -> bool {
        if size > SIZE {
            self.pool().enlarge(&self.name, size).unwrap();
            // A second one does nothing.
            self.pool().enlarge(&self.name, SIZE).unwrap();
        } else {
            let size = (size >> 20).to_string();
            ceph().rbd(&[
                "resize",
                "--allow-shrink",
                "--no-progress",
                "--size",
                &size,
                &self.name,
            ]);
        }
        true
    }

    fn cases(&self) -> u32 {
        4
    }
}

mod suite {
    conformance!(Some(super::Image::create()));
}

#[test]
fn a_second_writer_is_refused_and_learns_who_has_the_image() {
    let image = Image::create();
    let first = image.disk();
    let error = image.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    assert!(error.cause().contains(daemons::HOST), "{error}");
    let reader = Options {
        read_only: true,
        ..Options::default()
    };
    Disk::new(image.open(&reader).unwrap()).close();
    first.close();
    image.disk().close();
}

#[test]
fn the_lock_of_a_killed_process_is_broken_at_once() {
    let image = Image::create();
    let mut writer = Writer::start(&image.uri(), &image.runtime_dir);
    writer.wait_for_writes(20);
    writer.kill();
    let unclean = Options {
        unclean: true,
        ..Options::default()
    };
    let start = Instant::now();
    let mut disk = Disk::new(image.open(&unclean).unwrap());
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    writer.verify(&mut disk);
    disk.close();
}

#[test]
fn writes_of_a_frozen_process_do_not_land_after_its_lock_was_broken() {
    let image = Image::create();
    let writer = Writer::start(&image.uri(), &image.runtime_dir);
    writer.wait_for_writes(20);
    writer.freeze();
    let unclean = Options {
        unclean: true,
        ..Options::default()
    };
    let mut disk = Disk::new(image.open(&unclean).unwrap());
    let data = pattern(1, SIZE as usize);
    for offset in (0..SIZE as usize).step_by(1 << 20) {
        disk.write(offset as u64, &data[offset..offset + (1 << 20)], Cut::Whole);
    }
    writer.thaw();
    assert_eq!(writer.wait_for_error(), Some(Errno::SHUTDOWN));
    for offset in (0..SIZE as usize).step_by(1 << 20) {
        let read = disk.read(offset as u64, 1 << 20, Cut::Whole);
        assert!(read == data[offset..offset + (1 << 20)], "{offset}");
    }
    disk.close();
}

#[test]
fn daemons_that_are_killed_and_come_back_cost_time_and_no_data() {
    let guard = DAEMONS.write().unwrap_or_else(PoisonError::into_inner);
    let image = Image::with(guard);
    let writer = Writer::start(&image.uri(), &image.runtime_dir);
    writer.wait_for_writes(20);
    for (mon, osd) in [(true, false), (false, true), (true, true)] {
        let mut ceph = ceph();
        if mon {
            ceph.mons[0].kill();
        }
        if osd {
            ceph.osds[0].kill();
        }
        thread::sleep(Duration::from_secs(1));
        ceph.mons[0].restart();
        ceph.osds[0].restart();
        drop(ceph);
        writer.wait_for_writes(20);
    }
    ceph().osds[0].freeze();
    thread::sleep(Duration::from_secs(2));
    ceph().osds[0].thaw();
    writer.wait_for_writes(20);
    let mut writer = writer;
    writer.finish();
    let mut disk = image.disk();
    writer.verify(&mut disk);
    disk.close();
}

#[test]
fn one_daemon_of_three_is_killed_at_a_time_and_io_continues() {
    let mut ceph = Ceph::start(3);
    let image = Image::on(&ceph.conf(), ());
    let mut writer = Writer::start(&image.uri(), &image.runtime_dir);
    writer.wait_for_writes(20);
    for index in 0..3 {
        for daemons in [&mut ceph.mons, &mut ceph.osds] {
            daemons[index].kill();
            writer.wait_for_writes(20);
            daemons[index].restart();
            writer.wait_for_writes(20);
        }
    }
    writer.finish();
    let mut disk = image.disk();
    writer.verify(&mut disk);
    disk.close();
}

#[test]
fn an_image_with_a_cache_is_refused() {
    let image = Image::create();
    let config = |words: &[&str]| {
        let name = format!("rbd/{}", image.name);
        let [verb, rest @ ..] = words else { return };
        ceph().rbd(&[&["config", "image", verb, &name, "rbd_cache"], rest].concat());
    };
    config(&["set", "true"]);
    let error = image.open(&Options::default()).err().unwrap();
    assert!(error.to_string().contains("rbd config image rm"), "{error}");
    config(&["set", "false"]);
    image.disk().close();
    config(&["rm"]);
    image.disk().close();
}

#[test]
fn an_image_that_is_open_keeps_its_snapshots() {
    let image = Image::create();
    let (pool, snapshots) = (image.pool(), ["first".to_owned()]);
    let disk = image.disk();
    pool.snapshot(&image.name, "first").unwrap();
    let error = pool.remove(&image.name, &snapshots).unwrap_err();
    assert_eq!(error.errno(), Errno::BUSY, "{error}");
    assert_eq!(pool.snapshots(&image.name).unwrap(), snapshots);
    disk.close();
    pool.remove(&image.name, &snapshots).unwrap();
}

#[test]
fn snapshots_and_clones() {
    let image = Image::create();
    let pool = image.pool();
    let data = pattern(1, 65536);
    let mut disk = image.disk();
    disk.write(0, &data, Cut::Whole);
    pool.snapshot(&image.name, "s").unwrap();
    pool.snapshot(&image.name, "s").unwrap();
    disk.write(0, &pattern(2, 65536), Cut::Whole);
    disk.close();
    let clone = format!("{}-clone", image.name);
    pool.clone_image(&image.name, "s", &clone).unwrap();
    let uri = image.address.image(&clone).to_string();
    let options = image.options(&patient());
    let mut disk = Disk::new(engine::open(&uri.parse().unwrap(), &options).unwrap());
    assert!(disk.read(0, 65536, Cut::Whole) == data);
    disk.close();
    let snapshots = ["s".to_owned()];
    let error = pool.remove(&image.name, &snapshots).unwrap_err();
    assert_eq!(error.errno(), Errno::BUSY);
    pool.remove(&clone, &[]).unwrap();
    pool.remove(&image.name, &snapshots).unwrap();
    assert!(!pool.list().unwrap().contains(&image.name));
}

#[test]
fn errors_name_what_is_wrong() {
    let _daemons = DAEMONS.read().unwrap_or_else(PoisonError::into_inner);
    let conf = ceph().conf();
    for (uri, errno, text) in [
        (format!("rbd:rbd/none?conf={conf}"), Errno::NOENT, "rbd ls"),
        (format!("rbd:none/a?conf={conf}"), Errno::NOENT, "pool"),
        ("rbd:rbd/a?conf=/none".to_owned(), Errno::NOENT, "/none"),
    ] {
        let error = engine::open(&uri.parse().unwrap(), &Options::default());
        let error = error.err().unwrap();
        assert_eq!(error.errno(), errno, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    let wrong = daemons::work_dir("wrong").join("ceph.conf");
    std::fs::write(&wrong, "[global]\nmon_host = 127.0.0.1:1\n").unwrap();
    let uri = format!("rbd:rbd/a?conf={}", wrong.display());
    let start = Instant::now();
    let error = engine::open(&uri.parse().unwrap(), &Options::default());
    let error = error.err().unwrap();
    assert!(error.to_string().contains("does not answer"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(60));
}
