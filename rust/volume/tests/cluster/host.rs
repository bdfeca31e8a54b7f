// SPDX-License-Identifier: GPL-2.0-only

//! Hosts: names with a registry, and processes that write to a volume.

use crate::clock;
use crate::io::{self, pattern, Image};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;
use volume::{Access, Attachment, Config, Holder, Registry, Result, VolumeName};

/// The time after which a writer is taken for dead, where a test waits for that.
pub const LEASE: Duration = Duration::from_secs(3);

/// The same where it must not happen.
const LONG_LEASE: Duration = Duration::from_secs(60);

/// The variable that is set in a process that ends when it loses its volume.
const ENDS: &str = "HOLDER_ENDS";

/// A host with a volume registry.
pub struct Host {
    config: Config,
    pub registry: Arc<Registry<volume::etcd::Etcd>>,
}

impl Host {
    pub fn new(urls: Vec<String>, host: &str) -> Self {
        let config = Config {
            etcd: urls,
            host: host.to_owned(),
        };
        let registry = Arc::new(volume::connect(&config));
        Self { config, registry }
    }

    /// Attaches a volume as this process.
    pub fn attach(&self, name: &VolumeName, read_only: bool) -> Result<Attachment> {
        self.attach_for(name, read_only, LONG_LEASE)
    }

    /// Attaches a volume with a lease of this time.
    pub fn attach_for(
        &self,
        name: &VolumeName,
        read_only: bool,
        lease: Duration,
    ) -> Result<Attachment> {
        let holder = Holder::this_process(&self.config, "5/51712")?;
        let access = match read_only {
            true => Access::Read,
            false => Access::Write,
        };
        let registry = self.registry.clone();
        Attachment::new(registry, name, &holder, access, lease, |error| {
            eprintln!("{error}");
            if std::env::var_os(ENDS).is_some() {
                std::process::exit(1);
            }
        })
    }
}

/// A process of a host that attaches a volume and writes to it until a write fails.
pub struct HostProcess {
    child: Child,
    log: PathBuf,
}

impl HostProcess {
    /// Starts a process in a PID namespace of its own, and waits until it has attached the volume.
    pub fn start(host: &Host, name: &VolumeName) -> Self {
        Self::run(command_of_another_host(), host, name, LEASE)
    }

    /// Starts such a process whose clock is fast by some hours, or slow.
    pub fn start_with_clock(host: &Host, name: &VolumeName, hours: i64) -> Self {
        let mut command = command_of_another_host();
        clock::shift(&mut command, hours);
        Self::run(command, host, name, LEASE)
    }

    /// Starts a process in the PID namespace of the test, which ends when it loses the volume.
    pub fn start_that_ends(host: &Host, name: &VolumeName) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(ENDS, "");
        Self::run(command, host, name, LEASE)
    }

    /// Starts a process in the PID namespace of the test, whose lease does not end.
    pub fn start_here(host: &Host, name: &VolumeName) -> Self {
        let command = Command::new(std::env::current_exe().unwrap());
        Self::run(command, host, name, LONG_LEASE)
    }

    fn run(mut command: Command, host: &Host, name: &VolumeName, lease: Duration) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = daemons::work_dir(&format!("host-{number}")).join("log");
        let child = command
            .args(["--exact", "host::process", "--ignored"])
            .env("HOLDER_ETCD", host.config.etcd.join(" "))
            .env("HOLDER_HOST", &host.config.host)
            .env("HOLDER_VOLUME", name.to_string())
            .env("HOLDER_LEASE", lease.as_secs().to_string())
            .env("HOLDER_LOG", &log)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = Self { child, log };
        process.wait_for_writes(1);
        process
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the process has completed some more writes.
    pub fn wait_for_writes(&self, writes: usize) {
        let count = || self.log().matches("written").count();
        let target = count() + writes;
        daemons::wait_until("the process writes", || {
            let log = self.log();
            assert!(!log.contains("end "), "{log}");
            count() >= target
        });
    }

    /// Waits until the process ends, and returns why.
    pub fn wait_for_end(mut self) -> String {
        daemons::wait_until("a write fails", || self.log().contains("end "));
        self.child.wait().unwrap();
        self.log().lines().last().unwrap_or_default().to_owned()
    }

    /// Waits until the process ends that was started so that it does.
    pub fn wait_for_loss(mut self) {
        self.child.wait().unwrap();
        assert!(!self.log().contains("end "), "{}", self.log());
    }

    /// Sends a signal to the process, or to the one that runs in the namespace.
    fn signal(&self, signal: &str) {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let inner = children.split_whitespace().next().map(str::to_owned);
        let pid = inner.unwrap_or_else(|| pid.to_string());
        daemons::run("kill", &[signal, &pid]);
    }

    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    pub fn kill(mut self) {
        self.signal("-KILL");
        self.child.wait().unwrap();
    }
}

/// Returns the command that runs this program in a PID namespace of its own.
fn command_of_another_host() -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().unwrap());
    command
}

/// The process.
#[test]
#[ignore = "it is a process of other tests"]
fn process() {
    clock::check();
    let variable = |name: &str| std::env::var(name).unwrap();
    let urls = variable("HOLDER_ETCD");
    let urls = urls.split(' ').map(str::to_owned).collect();
    let host = Host::new(urls, &variable("HOLDER_HOST"));
    let mut log = create_log(Path::new(&variable("HOLDER_LOG")));
    let name = variable("HOLDER_VOLUME").parse().unwrap();
    // It continues after it has lost the volume: the storage has to refuse its writes.
    let lease = Duration::from_secs(variable("HOLDER_LEASE").parse().unwrap());
    let attachment = host.attach_for(&name, false, lease).unwrap();
    let mut image = Image::open(&attachment.uri);
    for number in (0u8..200).cycle() {
        let written = image.write(u64::from(number) % io::BLOCKS, &pattern(number % 100));
        match written {
            Ok(()) => writeln!(log, "written").unwrap(),
            Err(error) => {
                writeln!(log, "end {error}").unwrap();
                std::process::exit(1);
            }
        }
    }
}

fn create_log(path: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}
