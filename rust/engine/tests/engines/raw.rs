// SPDX-License-Identifier: GPL-2.0-only

//! The engine for files and block devices.

use crate::disk::{buffers, patient, pattern, read_only, Cut, Disk};
use crate::suite::{Target, SIZE};
use engine::{Engine, Errno, Options, Request, Uri};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A file in a directory of its own.
struct Image {
    dir: TempDir,
    direct: Option<bool>,
}

impl Image {
    fn new(parent: &Path, size: u64, direct: Option<bool>) -> Self {
        let dir = TempDir::new_in(parent).unwrap();
        let image = Self { dir, direct };
        File::create(image.path()).unwrap().set_len(size).unwrap();
        image
    }

    /// On the disk that the tests are built on.
    fn on_disk(size: u64) -> Self {
        Self::new(Path::new(env!("CARGO_TARGET_TMPDIR")), size, None)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn uri(&self) -> Uri {
        format!("raw:{}", self.path().display()).parse().unwrap()
    }

    fn open_errno(&self, options: &Options) -> Errno {
        engine::open(&self.uri(), options).err().unwrap().errno()
    }
}

impl Target for Image {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        let options = Options {
            direct: self.direct,
            ..options.clone()
        };
        engine::open(&self.uri(), &options)
    }

    fn resize(&self, size: u64) -> bool {
        File::options()
            .write(true)
            .open(self.path())
            .unwrap()
            .set_len(size)
            .unwrap();
        true
    }
}

mod direct {
    conformance!(Some(super::Image::on_disk(crate::suite::SIZE)));
}

mod page_cache {
    conformance!(Some(super::Image::new(
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")),
        crate::suite::SIZE,
        Some(false)
    )));
}

mod tmpfs {
    conformance!(Some(super::Image::new(
        std::path::Path::new("/dev/shm"),
        crate::suite::SIZE,
        None
    )));
}

/// A block device of 4 MiB that may be overwritten, if `RBLKIF_TEST_DEVICE` names one.
struct Device(Uri);

impl Device {
    fn from_environment() -> Option<Self> {
        let path = std::env::var("RBLKIF_TEST_DEVICE").ok()?;
        Some(Self(format!("raw:{path}").parse().unwrap()))
    }
}

impl Target for Device {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        // Tests run at the same time.
        let options = Options {
            lock_timeout: Duration::from_secs(60),
            ..options.clone()
        };
        engine::open(&self.0, &options)
    }

    fn resize(&self, _size: u64) -> bool {
        false
    }
}

mod device {
    conformance!(super::Device::from_environment());
}

#[test]
fn an_image_in_use_is_refused_and_its_user_named() {
    let image = Image::on_disk(SIZE);
    let disk = image.disk();
    let error = image.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    let own = format!("(process {})", std::process::id());
    assert!(error.cause().contains(&own), "{error}");
    assert_eq!(image.open_errno(&read_only()), Errno::BUSY);
    let shared = Options {
        exclusive: false,
        ..read_only()
    };
    image.open(&shared).unwrap().close().unwrap();
    disk.close();
    image.disk().close();
}

#[test]
fn readers_share_an_image() {
    let image = Image::on_disk(SIZE);
    let first = image.open(&read_only()).unwrap();
    let second = image.open(&read_only()).unwrap();
    assert_eq!(image.open_errno(&Options::default()), Errno::BUSY);
    first.close().unwrap();
    second.close().unwrap();
    image.disk().close();
}

#[test]
fn opening_waits_for_the_other_user() {
    let image = Image::on_disk(SIZE);
    let disk = image.disk();
    let options = Options {
        lock_timeout: Duration::from_millis(100),
        ..Options::default()
    };
    let start = Instant::now();
    assert_eq!(image.open_errno(&options), Errno::BUSY);
    assert!(start.elapsed() >= Duration::from_millis(100));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            disk.close();
        });
        let options = Options {
            lock_timeout: Duration::from_secs(60),
            ..Options::default()
        };
        image.open(&options).unwrap().close().unwrap();
    });
}

/// Returns the standard error of qemu-io, or [`None`] if it is not installed.
fn qemu_io(path: &Path, command: &str) -> Option<String> {
    let output = Command::new("qemu-io")
        .args(["-f", "raw", "-c", command])
        .arg(path)
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn qemu_respects_the_locks() {
    let image = Image::on_disk(SIZE);
    let disk = image.disk();
    let Some(error) = qemu_io(&image.path(), "write 0 512") else {
        return;
    };
    assert!(error.contains("lock"), "{error}");
    disk.close();
    assert_eq!(qemu_io(&image.path(), "write 0 512").as_deref(), Some(""));
}

#[test]
fn images_that_cannot_be_opened() {
    let image = Image::on_disk(0);
    assert_eq!(image.open_errno(&Options::default()), Errno::INVAL);
    let errno = |path: &str| {
        let uri = format!("raw:{path}").parse().unwrap();
        engine::open(&uri, &Options::default())
            .err()
            .unwrap()
            .errno()
    };
    assert_eq!(errno("/nonexistent"), Errno::NOENT);
    assert_eq!(errno("/dev/null"), Errno::INVAL);
    assert!(matches!(errno("/"), Errno::ISDIR | Errno::INVAL));
}

#[test]
fn the_last_sector_of_a_file_may_be_short() {
    for direct in [None, Some(false)] {
        let image = Image::new(Path::new(env!("CARGO_TARGET_TMPDIR")), 1, direct);
        fs::write(image.path(), pattern(2, 5000)).unwrap();
        let mut disk = image.disk();
        assert_eq!(disk.info().size, 5120);
        let mut expected = pattern(2, 5000);
        expected.resize(5120, 0);
        for cut in [Cut::Whole, Cut::Odd, Cut::Sectors] {
            assert_eq!(disk.read(0, 5120, cut), expected);
            assert_eq!(disk.read(4608, 512, cut), expected[4608..]);
        }
        let data = pattern(3, 512);
        disk.write(4608, &data, Cut::Whole);
        assert_eq!(disk.read(4608, 512, Cut::Whole), data);
        disk.close();
        assert_eq!(fs::metadata(image.path()).unwrap().len(), 5120);
    }
}

#[test]
fn what_a_file_has_lost_reads_as_zeros() {
    let image = Image::on_disk(SIZE);
    let mut disk = image.disk();
    disk.write(0, &pattern(1, 8192), Cut::Whole);
    image.resize(4096);
    let data = disk.read(0, 8192, Cut::Whole);
    assert_eq!(data[..4096], pattern(1, 8192)[..4096]);
    assert!(data[4096..].iter().all(|byte| *byte == 0));
    disk.close();
}

#[test]
fn discards_free_space() {
    let image = Image::on_disk(SIZE);
    let mut disk = image.disk();
    let blocks = || fs::metadata(image.path()).unwrap().blocks();
    let data = pattern(1, 1 << 20);
    disk.write(0, &data, Cut::Whole);
    disk.flush();
    let full = blocks();
    assert!(full >= 2048);
    if disk.info().discard.is_some() {
        assert_eq!(disk.errno(Request::discard(1, 0, 524_288)), None);
        assert!(blocks() <= full - 1024);
    }
    disk.write(0, &data, Cut::Whole);
    assert_eq!(disk.errno(Request::write_zeroes(1, 0, 524_288, true)), None);
    assert!(blocks() <= full - 1024);
    assert_eq!(
        disk.errno(Request::write_zeroes(1, 0, 524_288, false)),
        None
    );
    disk.flush();
    assert!(blocks() >= 2048);
    disk.close();
}

#[test]
fn memory_is_aligned_for_direct_access() {
    let image = Image::on_disk(SIZE);
    let disk = image.disk();
    let info = disk.info();
    assert!(info.guarantees.durable && info.guarantees.exclusive);
    if !info.guarantees.direct {
        assert_eq!(
            engine::open(
                &image.uri(),
                &Options {
                    direct: Some(true),
                    exclusive: false,
                    ..read_only()
                }
            )
            .err()
            .unwrap()
            .errno(),
            Errno::INVAL
        );
    }
    disk.close();
}

/// Writes again and again until it is killed, in a process of its own.
#[test]
#[ignore = "is run by the test below"]
fn owner() {
    let uri = std::env::var("RBLKIF_TEST_IMAGE").unwrap();
    let is_shared = std::env::var_os("RBLKIF_TEST_SHARED").is_some();
    let engine = engine::open(&uri.parse().unwrap(), &for_disk(!is_shared)).unwrap();
    let mut disk = Disk::new(engine);
    let memory = || buffers(&*disk.engine, 1 << 20, Cut::Whole, None);
    let mut completions = Vec::new();
    println!("writing");
    loop {
        while disk.queue.in_flight() < 32 {
            let offset = (disk.queue.in_flight() as u64 % 4) << 20;
            disk.queue.submit(Request::write(1, offset, memory()));
        }
        disk.queue.kick().unwrap();
        disk.queue.completions(&mut completions).unwrap();
        completions.clear();
    }
}

/// Returns options that wait for an earlier process of the same disk.
fn for_disk(exclusive: bool) -> Options {
    Options {
        exclusive,
        disk: Some(u64::MAX >> 8),
        ..patient()
    }
}

#[test]
fn an_image_has_one_writer_for_each_disk() {
    let image = Image::on_disk(SIZE);
    let shared = |disk| Options {
        exclusive: false,
        disk: Some(disk),
        ..patient()
    };
    let first = image.open(&shared(1)).unwrap();
    let other = image.open(&shared(2)).unwrap();
    let impatient = Options {
        lock_timeout: Duration::ZERO,
        ..shared(1)
    };
    assert_eq!(image.open_errno(&impatient), Errno::BUSY);
    let reader = Options {
        read_only: true,
        ..shared(1)
    };
    image.open(&reader).unwrap().close().unwrap();
    first.close().unwrap();
    image.open(&shared(1)).unwrap().close().unwrap();
    other.close().unwrap();
}

#[test]
fn no_write_of_a_killed_process_lands_after_those_of_its_successor() {
    no_late_write(true);
}

#[test]
fn no_write_of_a_killed_process_lands_late_in_a_shared_image() {
    no_late_write(false);
}

fn no_late_write(exclusive: bool) {
    let image = Image::on_disk(SIZE);
    let data = pattern(1, SIZE as usize);
    for _ in 0..4 {
        let mut owner = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "raw::owner", "--ignored", "--nocapture"])
            .env("RBLKIF_TEST_IMAGE", image.uri().to_string())
            .envs((!exclusive).then_some(("RBLKIF_TEST_SHARED", "1")))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(owner.stdout.take().unwrap());
        assert!(output.lines().any(|line| line.unwrap().contains("writing")));
        std::thread::sleep(Duration::from_millis(30));
        owner.kill().unwrap();
        // While the process ends, its locks are held.
        let mut disk = Disk::new(image.open(&for_disk(exclusive)).unwrap());
        disk.write(0, &data, Cut::Whole);
        owner.wait().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert!(disk.read(0, SIZE as usize, Cut::Whole) == data);
        disk.close();
    }
}
