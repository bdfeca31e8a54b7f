// SPDX-License-Identifier: GPL-2.0-only

//! The engine for image files with a format.

use crate::disk::{buffers, pattern, read_only, Cut, Disk};
use crate::server::is_installed;
use crate::suite::{Target, SIZE};
use engine::{Connect, Engine, Errno, Options, Request, Server};
use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// An image file in a directory of its own.
pub struct Image {
    pub dir: TempDir,
    format: &'static str,
}

impl Image {
    /// Creates an image with these options of `qemu-img create`, if that is installed.
    pub fn new(format: &'static str, options: &[&str]) -> Option<Self> {
        if !is_installed("qemu-storage-daemon") {
            return None;
        }
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = Self { dir, format };
        fs::write(image.key(), "passphrase").unwrap();
        let secret = format!("secret,id=key,file={}", image.key().display());
        let qemu_format = if format == "vhd" { "vpc" } else { format };
        let mut args = vec!["create", "-q", "--object", &secret, "-f", qemu_format];
        args.extend(options);
        let path = image.path();
        let size = SIZE.to_string();
        args.extend([path.to_str().unwrap(), &size]);
        qemu_img(&args);
        Some(image)
    }

    /// A qcow2 image over another, both empty.
    pub fn with_backing_file() -> Option<Self> {
        let image = Self::new("qcow2", &[])?;
        let base = image.dir.path().join("base");
        fs::rename(image.path(), &base).unwrap();
        let base = base.to_str().unwrap();
        let path = image.path();
        let path = path.to_str().unwrap();
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path,
        ]);
        Some(image)
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    fn is_clean(&self) -> bool {
        let path = self.path();
        let args = ["check", "-q", "-f", self.format, path.to_str().unwrap()];
        Command::new("qemu-img")
            .args(args)
            .status()
            .unwrap()
            .success()
    }
}

/// Runs `qemu-img`, which must succeed.
pub fn qemu_img(args: &[&str]) {
    let status = Command::new("qemu-img")
        .args(args)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{args:?}");
}

impl Target for Image {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        let uri = format!("{}:{}", self.format, self.path().display());
        let options = Options {
            key_file: (self.format == "luks").then(|| self.key()),
            ..options.clone()
        };
        engine::open(&uri.parse()?, &options)
    }

    fn resize(&self, _size: u64) -> bool {
        false
    }

    fn cases(&self) -> u32 {
        3
    }
}

mod qcow2 {
    conformance!(super::Image::with_backing_file());
}

/// The differences between formats.
macro_rules! image_format {
    ($name:ident, $format:expr, $options:expr) => {
        mod $name {
            conformance!(
                super::Image::new($format, $options),
                geometry,
                write_zeroes,
                data_survives_close,
            );
        }
    };
}

image_format!(vhd_dynamic, "vhd", &["-o", "force_size=on"]);
image_format!(vhd_fixed, "vhd", &["-o", "force_size=on,subformat=fixed"]);
image_format!(vhdx, "vhdx", &[]);
image_format!(vmdk, "vmdk", &[]);
image_format!(luks, "luks", &["-o", "key-secret=key,iter-time=10"]);

fn open_error(image: &Image) -> engine::Error {
    image.open(&Options::default()).err().unwrap()
}

#[test]
fn data_of_the_backing_file_is_read_and_never_changed() {
    let Some(image) = Image::with_backing_file() else {
        return;
    };
    let base = image.dir.path().join("base");
    let raw = image.dir.path().join("raw");
    let data = pattern(1, SIZE as usize);
    fs::write(&raw, &data).unwrap();
    let (raw, base_name) = (raw.to_str().unwrap(), base.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw, base_name]);
    let before = fs::read(&base).unwrap();
    let mut disk = image.disk();
    assert!(disk.read(0, 1 << 20, Cut::Whole) == data[..1 << 20]);
    let new = pattern(2, 8192);
    disk.write(4096, &new, Cut::Whole);
    assert_eq!(disk.read(4096, 8192, Cut::Whole), new);
    assert_eq!(disk.read(0, 4096, Cut::Whole), data[..4096]);
    disk.close();
    assert!(fs::read(&base).unwrap() == before);
    assert!(image.is_clean());
}

#[test]
fn a_backing_file_without_a_format_is_refused() {
    let Some(image) = Image::with_backing_file() else {
        return;
    };
    // The header extension with the format follows the header of 104 or 112 bytes.
    let file = File::options()
        .read(true)
        .write(true)
        .open(image.path())
        .unwrap();
    let mut header = [0; 256];
    file.read_exact_at(&mut header, 0).unwrap();
    let at = header
        .windows(4)
        .position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    file.write_all_at(&[0x12, 0x34, 0x56, 0x78], at as u64)
        .unwrap();
    let error = open_error(&image);
    assert_eq!(error.errno(), Errno::INVAL);
    assert!(error.cause().contains("no format"), "{error}");
}

#[test]
fn images_that_cannot_be_opened() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let disk = image.disk();
    assert_eq!(open_error(&image).errno(), Errno::BUSY);
    disk.close();
    fs::write(image.path(), pattern(1, 65536)).unwrap();
    let error = open_error(&image);
    assert_eq!(error.errno(), Errno::INVAL);
    assert!(error.cause().contains("not in qcow2 format"), "{error}");
    fs::remove_file(image.path()).unwrap();
    assert_eq!(open_error(&image).errno(), Errno::NOENT);
    let Some(image) = Image::with_backing_file() else {
        return;
    };
    fs::remove_file(image.dir.path().join("base")).unwrap();
    let error = open_error(&image);
    assert_eq!(error.errno(), Errno::NOENT);
    assert!(error.cause().contains("base"), "{error}");
}

#[test]
fn a_differencing_vhd_is_refused() {
    let Some(image) = Image::new("vhd", &["-o", "force_size=on"]) else {
        return;
    };
    let file = File::options().write(true).open(image.path()).unwrap();
    let footer = file.metadata().unwrap().len() - 512;
    file.write_all_at(&4u32.to_be_bytes(), footer + 60).unwrap();
    let error = open_error(&image);
    assert_eq!(error.errno(), Errno::OPNOTSUPP);
    assert!(error.cause().contains("differencing"), "{error}");
}

/// Returns the ids of the daemons that serve the image.
fn daemons(path: &Path) -> Vec<i32> {
    let path = path.to_str().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|id| {
            fs::read_to_string(format!("/proc/{id}/cmdline"))
                .is_ok_and(|line| line.starts_with("qemu-storage-daemon") && line.contains(path))
        })
        .collect()
}

fn kill_daemon(image: &Image) {
    let ids = daemons(&image.path());
    assert_eq!(ids.len(), 1);
    let id = rustix::process::Pid::from_raw(ids[0]).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_killed_daemon_is_replaced_if_all_writes_were_flushed() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let mut disk = image.disk();
    for round in 0..3 {
        for tag in 0..16 {
            let data = pattern(round * 16 + tag, 65536);
            let memory = buffers(&*disk.engine, 65536, Cut::Whole, Some(&data));
            disk.queue.submit(Request::write(tag, tag * 65536, memory));
        }
        for completion in disk.drain() {
            completion.result.unwrap();
        }
        disk.flush();
        kill_daemon(&image);
        for tag in 0..16 {
            let data = disk.read(tag * 65536, 65536, Cut::Whole);
            assert!(data == pattern(round * 16 + tag, 65536));
        }
    }
    disk.close();
    assert!(image.is_clean());
    assert!(daemons(&image.path()).is_empty());
}

#[test]
fn lost_writes_are_reported() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let mut disk = image.disk();
    disk.write(0, &pattern(1, 65536), Cut::Whole);
    kill_daemon(&image);
    for _ in 0..2 {
        let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
        let errno = disk.errno(Request::read(1, 0, memory));
        assert_eq!(errno, Some(Errno::NOTRECOVERABLE));
        assert_eq!(disk.errno(Request::flush(1)), Some(Errno::NOTRECOVERABLE));
    }
}

/// Returns the options of a process of one disk, which continues after one that was killed.
fn of_disk(runtime_dir: &Path) -> Options {
    Options {
        disk: Some(7),
        continues: true,
        lock_timeout: crate::disk::TIMEOUT,
        unclean: true,
        runtime_dir: runtime_dir.to_owned(),
        ..Options::default()
    }
}

/// Opens an image, writes without a flush and waits to be killed, in a process of its own.
#[test]
#[ignore = "is run by the test below"]
fn owner() {
    let uri = std::env::var("RBLKIF_TEST_IMAGE").unwrap();
    let dir = std::env::var_os("RBLKIF_TEST_DIR").unwrap();
    let engine = engine::open(&uri.parse().unwrap(), &of_disk(dir.as_ref())).unwrap();
    let mut disk = Disk::new(engine);
    disk.write(0, &pattern(1, 65536), Cut::Whole);
    println!("written");
    std::thread::sleep(crate::disk::TIMEOUT);
}

/// Starts a process that has written to the image, and has not flushed that.
fn start_owner(image: &Image) -> Child {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "qsd::owner", "--ignored", "--nocapture"])
        .env(
            "RBLKIF_TEST_IMAGE",
            format!("qcow2:{}", image.path().display()),
        )
        .env("RBLKIF_TEST_DIR", image.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(owner.stdout.take().unwrap());
    let written = output.lines().any(|line| line.unwrap().contains("written"));
    assert!(written);
    owner
}

/// Opens an image that was not closed; it must have the write of `pattern(1)`, and be clean then.
fn assert_repaired(image: &Image, options: &Options) {
    let mut disk = Disk::new(image.open(options).unwrap());
    assert!(disk.read(0, 65536, Cut::Whole) == pattern(1, 65536));
    disk.close();
    assert!(image.is_clean());
}

#[test]
fn no_completed_write_is_lost_when_the_owner_is_killed() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let mut owner = start_owner(&image);
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert_repaired(&image, &of_disk(image.dir.path()));
}

#[test]
fn lost_writes_are_reported_to_the_successor_of_a_killed_owner() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let mut owner = start_owner(&image);
    kill_daemon(&image);
    owner.kill().unwrap();
    owner.wait().unwrap();
    let options = of_disk(image.dir.path());
    for _ in 0..2 {
        let error = image.open(&options).err().unwrap();
        assert_eq!(error.errno(), Errno::NOTRECOVERABLE, "{error}");
    }
    let attached = Options {
        continues: false,
        ..options.clone()
    };
    image.open(&attached).unwrap().close().unwrap();
    image.open(&options).unwrap().close().unwrap();
    assert!(image.is_clean());
}

#[test]
fn an_unclean_image_is_repaired() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let mut disk = image.disk();
    disk.write(0, &pattern(1, 65536), Cut::Whole);
    disk.close();
    // Appended clusters that nothing refers to, with a reference count: a leak.
    let file = File::options()
        .read(true)
        .write(true)
        .open(image.path())
        .unwrap();
    let mut table = [0; 8];
    file.read_exact_at(&mut table, 48).unwrap();
    let mut block = [0; 8];
    file.read_exact_at(&mut block, u64::from_be_bytes(table))
        .unwrap();
    let unused = u64::from_be_bytes(block) + 2 * 40;
    file.write_all_at(&[0, 1], unused).unwrap();
    file.set_len(41 << 16).unwrap();
    assert!(!image.is_clean());
    let options = Options {
        unclean: true,
        ..Options::default()
    };
    assert_repaired(&image, &options);
}

#[test]
fn a_device_model_can_use_the_same_image() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let options = Options::default();
    let uri = format!("qcow2:{}", image.path().display()).parse().unwrap();
    let server = Arc::new(Server::start(&uri, &options).unwrap().unwrap());
    let engine = engine::open_with(&uri, &options, Some(server.clone()));
    let mut disk = Disk::new(engine.unwrap());
    disk.write(0, &pattern(1, 4096), Cut::Whole);
    let socket = server.nbd_socket().unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let other = engine::open(&uri.parse().unwrap(), &options);
    let mut other = Disk::new(other.unwrap());
    assert_eq!(other.read(0, 4096, Cut::Whole), pattern(1, 4096));
    other.close();
    disk.close();
    drop(server);
    assert!(!socket.exists());
}

#[test]
fn an_image_grows_while_it_is_open() {
    const LARGE: u64 = 64 << 20;
    for (format, options) in [
        ("qcow2", &[][..]),
        ("luks", &["-o", "key-secret=key,iter-time=10"]),
    ] {
        let Some(image) = Image::new(format, options) else {
            return;
        };
        let mut disk = image.disk();
        let mut other = disk.engine.queue(4).unwrap();
        let data = pattern(1, 65536);
        disk.write(SIZE - 65536, &data, Cut::Whole);
        assert_eq!(disk.engine.resize(LARGE).unwrap().size, LARGE);
        assert_eq!(disk.engine.refresh().unwrap().size, LARGE);
        assert_eq!(disk.engine.resize(LARGE).unwrap().size, LARGE);
        assert!(disk.read(SIZE - 65536, 65536, Cut::Whole) == data);
        disk.write(LARGE - 65536, &data, Cut::Odd);
        let memory = buffers(&*disk.engine, 65536, Cut::Whole, None);
        other.submit(Request::read(1, LARGE - 65536, memory));
        let mut completions = Vec::new();
        other.drain(crate::disk::TIMEOUT, &mut completions).unwrap();
        assert!(crate::disk::bytes(&completions[0].buffers) == data);
        drop(other);
        for size in [SIZE, LARGE + 100] {
            let error = disk.engine.resize(size).unwrap_err();
            assert_eq!(error.errno(), Errno::INVAL);
        }
        // In several commands of the device.
        assert_eq!(disk.errno(Request::write_zeroes(1, 0, LARGE, true)), None);
        assert!(disk.read(LARGE - 65536, 65536, Cut::Whole) == [0; 65536]);
        assert_eq!(disk.errno(Request::discard(1, 0, LARGE)), None);
        disk.close();
        let mut disk = image.disk();
        assert_eq!(disk.info().size, LARGE);
        assert_eq!(disk.read(LARGE - 4096, 4096, Cut::Whole), [0; 4096]);
        disk.close();
    }
}

#[test]
fn an_image_that_cannot_grow_keeps_its_size() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let options = match format {
            "vhd" => &["-o", "force_size=on"][..],
            _ => &[],
        };
        let Some(image) = Image::new(format, options) else {
            return;
        };
        let mut disk = image.disk();
        let error = disk.engine.resize(SIZE * 2).unwrap_err();
        assert_eq!(error.errno(), Errno::OPNOTSUPP, "{error}");
        assert_eq!(disk.engine.refresh().unwrap().size, SIZE);
        disk.write(0, &pattern(1, 4096), Cut::Whole);
        disk.close();
    }
}

/// The NBD export of an image, which a device model opens.
struct Export {
    socket: PathBuf,
}

impl Export {
    fn open(&self) -> Box<dyn Engine> {
        let uri = format!("nbd+unix:///?socket={}", self.socket.display());
        engine::open(&uri.parse().unwrap(), &Options::default()).unwrap()
    }
}

/// Opens an image whose daemon has an NBD export, too.
fn open_with_export(image: &Image) -> (Disk, Export) {
    let options = Options::default();
    let uri = format!("qcow2:{}", image.path().display()).parse().unwrap();
    let server = Arc::new(Server::start(&uri, &options).unwrap().unwrap());
    let socket = server.nbd_socket().unwrap();
    let engine = engine::open_with(&uri, &options, Some(server)).unwrap();
    (Disk::new(engine), Export { socket })
}

#[test]
fn an_image_does_not_grow_while_a_device_model_uses_it() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let (disk, export) = open_with_export(&image);
    let other = export.open();
    let error = disk.engine.resize(SIZE * 2).unwrap_err();
    assert_eq!(error.errno(), Errno::BUSY, "{error}");
    other.close().unwrap();
    assert_eq!(disk.engine.resize(SIZE * 2).unwrap().size, SIZE * 2);
    // The export is there again.
    let other = export.open();
    assert_eq!(other.info().size, SIZE * 2);
    other.close().unwrap();
    disk.close();
}

/// Runs a command of the daemon, as an administrator would do.
fn qmp(nbd_socket: &Path, command: &str) {
    let stream = UnixStream::connect(nbd_socket.with_file_name("qmp.sock")).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut next = || {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0);
        line
    };
    assert!(next().contains("QMP"));
    for command in [r#"{"execute": "qmp_capabilities"}"#, command] {
        writeln!(&stream, "{command}").unwrap();
        while !next().contains("return") {}
    }
}

#[test]
fn an_export_that_is_away_comes_back_with_the_next_resize() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let (disk, export) = open_with_export(&image);
    let command = r#"{"execute": "block-export-del", "arguments": {"id": "disk"}}"#;
    qmp(&export.socket, command);
    assert_eq!(disk.engine.resize(SIZE * 2).unwrap().size, SIZE * 2);
    export.open().close().unwrap();
    disk.close();
}

#[test]
fn an_image_without_a_client_is_not_resized() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let uri = format!("qcow2:{}", image.path().display()).parse().unwrap();
    let server = Server::start(&uri, &Options::default()).unwrap().unwrap();
    let error = server.resize(SIZE * 2).unwrap_err();
    assert_eq!(error.errno(), Errno::NOTCONN);
    assert_eq!(daemons(&image.path()).len(), 1);
    server.stop().unwrap();
}

#[test]
fn several_queues_survive_the_end_of_the_daemon() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let mut disk = image.disk();
    let mut queues: Vec<_> = (0..4).map(|_| disk.engine.queue(32).unwrap()).collect();
    for round in 0..3 {
        // All writes were flushed.
        kill_daemon(&image);
        let deadline = Instant::now() + crate::disk::TIMEOUT;
        while !daemons(&image.path()).is_empty() {
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        for (number, queue) in (0..).zip(&mut queues) {
            for tag in 0..8 {
                let data = pattern(round * 64 + number * 8 + tag, 65536);
                let memory = buffers(&*disk.engine, 65536, Cut::Whole, Some(&data));
                let offset = (number * 8 + tag) * 65536;
                queue.submit(Request::write(tag, offset, memory));
            }
            queue.kick().unwrap();
        }
        for queue in &mut queues {
            let mut completions = Vec::new();
            queue.drain(crate::disk::TIMEOUT, &mut completions).unwrap();
            assert_eq!(completions.len(), 8);
            for completion in completions {
                completion.result.unwrap();
            }
        }
        disk.flush();
        for number in 0..32 {
            let data = disk.read(number * 65536, 65536, Cut::Whole);
            assert!(data == pattern(round * 64 + number, 65536));
        }
    }
    drop(queues);
    disk.close();
    assert!(image.is_clean());
}

/// A small file system, which only root can mount.
struct SmallFileSystem(TempDir);

impl SmallFileSystem {
    fn mount(size: &str) -> Option<Self> {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let options = CString::new(format!("size={size}")).unwrap();
        let flags = MountFlags::empty();
        let mounted = mount(
            "tmpfs",
            dir.path(),
            "tmpfs",
            flags,
            Some(options.as_c_str()),
        );
        mounted.ok().map(|()| Self(dir))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_write_without_space_fails_as_such() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let Some(file_system) = SmallFileSystem::mount("2m") else {
        println!("skipped: this user cannot mount a file system");
        return;
    };
    let path = file_system.0.path().join("image");
    fs::copy(image.path(), &path).unwrap();
    let ballast = file_system.0.path().join("ballast");
    fs::write(&ballast, vec![0; 1 << 20]).unwrap();
    let uri = format!("qcow2:{}", path.display()).parse().unwrap();
    let mut disk = Disk::new(engine::open(&uri, &Options::default()).unwrap());
    let mut failed = None;
    for tag in 0..32 {
        let memory = buffers(&*disk.engine, 65536, Cut::Whole, Some(&pattern(tag, 65536)));
        let errno = disk.errno(Request::write(tag, tag * 65536, memory));
        if errno.is_some() {
            failed.get_or_insert((tag, errno));
        }
    }
    let (first, errno) = failed.unwrap();
    assert_eq!(errno, Some(Errno::NOSPC));
    for tag in 0..first {
        assert!(disk.read(tag * 65536, 65536, Cut::Whole) == pattern(tag, 65536));
    }
    fs::remove_file(&ballast).unwrap();
    disk.write(first * 65536, &pattern(first, 65536), Cut::Odd);
    assert!(disk.read(first * 65536, 65536, Cut::Odd) == pattern(first, 65536));
    disk.close();
}

#[test]
fn readers_share_an_image() {
    let Some(image) = Image::new("qcow2", &[]) else {
        return;
    };
    let first = image.open(&read_only()).unwrap();
    let second = image.open(&read_only()).unwrap();
    first.close().unwrap();
    second.close().unwrap();
}
