// SPDX-License-Identifier: GPL-2.0-only

//! `rblktap DOMAIN DEVICE URI`: serves one disk of a Xen guest until it is detached.
//!
//! The program is started twice: as the monitor, and by it as the process that serves the guest,
//! see [`rblktap::monitor`].

#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

use api::defaults;
use api::Quota;
use api::EXIT_STALE;
use clap::value_parser;
use clap::Arg;
use clap::ArgAction;
use clap::ArgMatches;
use clap::Command;
use engine::Connect;
use engine::Engine;
use engine::Options;
use engine::Server;
use engine::Uri;
use rblktap::cluster;
use rblktap::confine::confine;
use rblktap::device;
use rblktap::device::Config;
use rblktap::device::Device;
use rblktap::device::Settings;
use rblktap::device::ToolstackNodes;
use rblktap::device::Xen;
use rblktap::launch;
use rblktap::monitor;
use rblktap::monitor::Monitor;
use rblktap::Disk;
use rustix::process::Signal;
use std::env;
use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use volume::attachment::LEASE_TIME;
use volume::attachment::USED_SINCE;
use volume::Access;
use volume::Attachment;
use volume::Holder;
use volume::VolumeName;
use xen_user::event::EventDevice;
use xen_user::grant::GrantDevice;
use xen_user::xenstore::Nodes;
use xen_user::xenstore::Xenstore;

/// The distance between the user of a process that serves a domain and that of QEMU's programs for
/// its images: more than the number of domains.
const TOOLS: u32 = 32768;

/// The time after which a drain ends by itself: rblkd waits 30 seconds for requests in flight.
const DRAIN_TIME: Duration = Duration::from_secs(60);

fn command() -> Command {
    let option = |name: &'static str, value: &'static str, default: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name(value)
            .default_value(default)
    };
    Command::new("rblktap")
        .about("Serves one disk of a Xen guest from an image")
        .arg(
            Arg::new("domain")
                .value_name("DOMAIN")
                .required(true)
                .value_parser(value_parser!(u16))
                .help("Number of the guest's domain"),
        )
        .arg(
            Arg::new("device")
                .value_name("DEVICE")
                .required(true)
                .value_parser(value_parser!(u32))
                .help("Number of the virtual device, for example 51712 for xvda"),
        )
        .arg(
            Arg::new("uri")
                .value_name("URI")
                .required(true)
                .help("The image, for example raw:/srv/a.img, or the volume, vol:fast/db"),
        )
        .arg(
            option("backend-kind", "KIND", "vbd3").help(
                "Kind of the device in xenstore: the directory is backend/KIND/DOMAIN/DEVICE",
            ),
        )
        .arg(
            option("state-dir", "DIR", "/run/rblk/tap")
                .value_parser(value_parser!(PathBuf))
                .help("Directory of the control socket and the in-flight table"),
        )
        .arg(
            option("max-queues", "N", defaults::MAX_QUEUES)
                .value_parser(value_parser!(u32))
                .help("Largest number of rings"),
        )
        .arg(
            option("block-size", "BYTES", "512")
                .value_parser(["512", "4096"])
                .help("Smallest logical block size"),
        )
        .arg(
            option("persistent", "on|off", "on")
                .value_parser(["on", "off"])
                .help("Use persistent grants if the frontend does"),
        )
        .arg(
            option("retry-seconds", "N", defaults::RETRY_SECONDS)
                .value_parser(value_parser!(u32))
                .help("How long requests are retried after a temporary error"),
        )
        .arg(
            option("no-space", "wait|fail", defaults::NO_SPACE)
                .value_parser(["wait", "fail"])
                .help(
                    "What happens to a write for which the storage has no space: it is retried as \
                     after an error that may pass, or it fails",
                ),
        )
        .arg(
            option("stuck-seconds", "N", defaults::STUCK_SECONDS)
                .value_parser(value_parser!(u32))
                .help("When a request that does not complete is reported"),
        )
        .arg(
            option("pages", "N", defaults::PAGES)
                .value_parser(value_parser!(u32).range(1..))
                .help("Pages of 4 KiB that the data of the disk's requests may use"),
        )
        .arg(
            option("requests", "N", defaults::REQUESTS)
                .value_parser(value_parser!(u32).range(1..))
                .help("Requests of the disk that may be in flight"),
        )
        .arg(
            option("key-dir", "DIR", defaults::KEY_DIR)
                .value_parser(value_parser!(PathBuf))
                .help("Where the passphrases of LUKS containers are, as NAME.key"),
        )
        .arg(
            option("uid-base", "N", defaults::UID_BASE)
                .value_parser(value_parser!(u32).range(1..0x7fff_0000))
                .help("The process runs as user and group N + DOMAIN"),
        )
        .arg(
            Arg::new("confined")
                .long("confined")
                .hide(true)
                .action(ArgAction::SetTrue),
        )
        .arg(
            Arg::new("volume-image")
                .long("volume-image")
                .hide(true)
                .help("The image of the volume, which the monitor has attached"),
        )
        .arg(
            option("lock-seconds", "N", "10")
                .value_parser(value_parser!(u32))
                .help("How long to wait for another user of the image"),
        )
}

fn seconds(matches: &ArgMatches, name: &str) -> Duration {
    let seconds = matches.get_one::<u32>(name).copied();
    Duration::from_secs(seconds.unwrap_or_default().into())
}

fn text<'a>(matches: &'a ArgMatches, name: &str) -> &'a str {
    matches.get_one::<String>(name).map_or("", String::as_str)
}

fn config(matches: &ArgMatches, pid: u32) -> Config {
    let domain = matches.get_one("domain").copied().unwrap_or_default();
    let device = matches.get_one("device").copied().unwrap_or_default();
    let kind = text(matches, "backend-kind");
    Config {
        domain,
        device,
        pid,
        dir: format!("backend/{kind}/{domain}/{device}"),
        state_dir: matches.get_one("state-dir").cloned().unwrap_or_default(),
        stats_root: Some(PathBuf::from("/dev/shm")),
        max_queues: matches.get_one("max-queues").copied().unwrap_or(1),
        persistent: text(matches, "persistent") == "on",
        // The use of a volume is recorded when the guest connects, which must come before the first
        // write.
        is_exported: !matches.contains_id("volume-image"),
        settings: Settings {
            retry_time: seconds(matches, "retry-seconds"),
            wait_for_space: text(matches, "no-space") == "wait",
            stuck_time: seconds(matches, "stuck-seconds"),
        },
        quota: Quota {
            pages: matches.get_one("pages").copied().unwrap_or(1),
            requests: matches.get_one("requests").copied().unwrap_or(1),
        },
        drain_time: DRAIN_TIME,
    }
}

/// Returns how the image is opened.
fn options(
    matches: &ArgMatches,
    config: &Config,
    nodes: &ToolstackNodes,
    uri: &Uri,
    continues: bool,
) -> Options {
    let keys: Option<&PathBuf> = matches.get_one("key-dir");
    let is_volume = matches.contains_id("volume-image");
    Options {
        key_file: keys.and_then(|keys| uri.key_file(keys)),
        read_only: nodes.read_only,
        // The single writer of a volume has the lock of its image too.
        exclusive: is_volume || !nodes.shared,
        disk: Some((u64::from(config.domain) << 32) | u64::from(config.device)),
        continues,
        lock_timeout: seconds(matches, "lock-seconds"),
        // The process before this one was killed.
        unclean: config.inflight_path().exists(),
        runtime_dir: config.state_dir.clone(),
        launcher: launch::launcher(
            user(matches, config).saturating_add(TOOLS),
            &empty_root(config),
        ),
        ..Options::default()
    }
}

/// Returns the user of the process that serves the guest.
fn user(matches: &ArgMatches, config: &Config) -> u32 {
    let base = matches.get_one::<u32>("uid-base").copied();
    // The option is less than half the largest number.
    base.unwrap_or_default()
        .saturating_add(config.domain.into())
}

/// Returns the empty directory that is the root of processes that serve guests.
fn empty_root(config: &Config) -> PathBuf {
    config.state_dir.join("empty")
}

/// Runs the monitor: starts the process that serves the guest, and waits for its end.
fn watch(matches: &ArgMatches) -> Result<ExitStatus, Box<dyn Error>> {
    let config = config(matches, std::process::id());
    let started = start(matches, &config);
    let started = started.inspect_err(|error| report(&config, &**error))?;
    let attachment = started.attachment.as_ref();
    let opened = attachment.map(|attachment| attachment.uri.as_str());
    let uri: Uri = opened.unwrap_or(text(matches, "uri")).parse()?;
    let mut options = options(matches, &config, &started.nodes, &uri, false);
    options.exclusive |= attachment.is_some();
    let status = run_server(
        &config,
        started.store,
        &started.nodes,
        started.image,
        attachment,
    );
    if let Some(attachment) = started.attachment {
        attachment.detach(status.as_ref().is_ok_and(ExitStatus::success));
    }
    let status = status?;
    if status.success() {
        config.remove_files();
        engine::remove_files(&uri, &options)?;
    }
    Ok(status)
}

/// Runs the process that serves the guest, and then ends the server of its image.
fn run_server(
    config: &Config,
    store: Xenstore,
    nodes: &ToolstackNodes,
    image: Option<Server>,
    attachment: Option<&Attachment>,
) -> Result<ExitStatus, Box<dyn Error>> {
    let mut server = std::process::Command::new("/proc/self/exe");
    server.arg("--confined");
    if let Some(attachment) = attachment {
        server.args(["--volume-image", &attachment.uri]);
    }
    server.args(env::args_os().skip(1));
    let permissions = device::permissions(&config.dir, &nodes.frontend);
    let record_use = attachment.map(Attachment::record_use);
    let connects = move || match record_use {
        Some(record_use) => record_use().map_err(io::Error::other),
        None => Ok(()),
    };
    let image = image.map(Arc::new);
    let ended = monitor::run(
        server,
        store,
        permissions,
        image.clone(),
        &config.dir,
        connects,
    )?;
    let status = ended.status;
    if ended.is_busy && !status.success() {
        // The programs of the image end with this process, and a successor waits for that.
        return Ok(status);
    }
    if let Some(image) = image {
        image.stop()?;
    }
    Ok(status)
}

/// The result of opening for the monitor.
struct Started {
    store: Xenstore,
    nodes: ToolstackNodes,
    /// The server of the image.
    image: Option<Server>,
    /// Set if the image is that of a volume.
    attachment: Option<Attachment>,
}

fn start(matches: &ArgMatches, config: &Config) -> Result<Started, Box<dyn Error>> {
    let root = empty_root(config);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&root)
        .map_err(|error| format!("{}: {error}", root.display()))?;
    let mut store = connect()?;
    let nodes = ToolstackNodes::read(&mut store, &config.dir, config.domain)?;
    if let Some(name) = VolumeName::of_image(text(matches, "uri")) {
        link_nbd_socket(&config.nbd_path(), None)?;
        let access = match device::is_connected(&mut store, &config.dir)? {
            _ if nodes.read_only => Access::Read,
            true => Access::Continue,
            false => Access::Write,
        };
        let attachment = attach(&name?, config, access).map_err(attach_error)?;
        let attachment = Some(attachment);
        return Ok(Started {
            store,
            nodes,
            image: None,
            attachment,
        });
    }
    let uri: Uri = text(matches, "uri").parse()?;
    let continues = device::is_connected(&mut store, &config.dir)?;
    let options = options(matches, config, &nodes, &uri, continues);
    let image = Server::start(&uri, &options)?;
    let socket = image.as_ref().and_then(Server::nbd_socket);
    link_nbd_socket(&config.nbd_path(), socket.as_deref())?;
    Ok(Started {
        store,
        nodes,
        image,
        attachment: None,
    })
}

/// The error of a disk that must not be served any more.
#[derive(Debug)]
struct Stale(engine::Error);

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Stale {}

fn attach_error(error: engine::Error) -> Box<dyn Error> {
    match error.errno() {
        USED_SINCE => Stale(error).into(),
        _ => error.into(),
    }
}

/// Attaches a volume.
fn attach(name: &VolumeName, config: &Config, access: Access) -> engine::Result<Attachment> {
    let volumes = volume::Config::load()?;
    let disk = format!("{}/{}", config.domain, config.device);
    let holder = Holder::this_process(&volumes, &disk)?;
    let registry = Arc::new(volume::connect(&volumes));
    Attachment::new(registry, name, &holder, access, LEASE_TIME, |error| {
        api::message!("rblktap: {error}");
        // The server is killed when this process ends.
        std::process::exit(1);
    })
}

/// Returns the image that the server opens.
fn image(matches: &ArgMatches) -> &str {
    match matches.contains_id("volume-image") {
        true => text(matches, "volume-image"),
        false => text(matches, "uri"),
    }
}

/// Writes an error for the hotplug script, which prints it.
fn report(config: &Config, error: &dyn Error) {
    let written = connect().and_then(|mut store| Ok(report_to(&mut store, config, error)?));
    if let Err(other) = written {
        api::message!("rblktap: {other}");
    }
}

fn report_to(store: &mut Xenstore, config: &Config, error: &dyn Error) -> io::Result<()> {
    store.write(&format!("error/{}/error", config.dir), &error.to_string())
}

/// Serves the guest, after having opened all that this takes and given up the rest.
fn serve(matches: &ArgMatches) -> Result<(), Box<dyn Error>> {
    let monitor = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    let config = config(matches, monitor.unwrap_or_default());
    let (monitor, mut store) = Monitor::attach()?;
    rustix::thread::set_name(c"rblktap")?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let uri: Uri = image(matches).parse()?;
    let (user, root) = (user(matches, &config), empty_root(&config));
    if uri.has_ceph_library() {
        cluster::prepare(&root)?;
    }
    let opened = open(matches, &config, &uri, monitor, &mut store);
    let (nodes, xen, image, disk) =
        opened.map_err(|error| match report_to(&mut store, &config, &*error) {
            Ok(()) => error,
            Err(other) => format!("{error}; {other}").into(),
        })?;
    let device = Device::new(config, nodes, store, xen, image, disk)?;
    if uri.has_ceph_library() {
        cluster::confine(user, &root)?;
    } else if uri.can_be_confined() {
        confine(user, &root)?;
    }
    Ok(device.run()?)
}

/// The result of opening for the process that serves the guest.
type Opened = (ToolstackNodes, Xen, Box<dyn Engine>, Disk);

/// Opens the image and Xen's devices.
fn open(
    matches: &ArgMatches,
    config: &Config,
    uri: &Uri,
    monitor: Monitor,
    store: &mut Xenstore,
) -> Result<Opened, Box<dyn Error>> {
    let nodes = ToolstackNodes::read(store, &config.dir, config.domain)?;
    let continues = device::is_connected(store, &config.dir)?;
    let options = options(matches, config, &nodes, uri, continues);
    let server = uri
        .has_server()
        .then(|| -> Arc<dyn Connect> { Arc::new(monitor) });
    let image = engine::open_with(uri, &options, server)?;
    let block_size = text(matches, "block-size").parse()?;
    let disk = Disk::new(image.info(), block_size, nodes.discard, nodes.removable);
    let grants = GrantDevice::open().map_err(|error| format!("{}: {error}", GrantDevice::PATH))?;
    let channels = usize::try_from(config.max_queues)?;
    let events = EventDevice::open(config.domain, channels);
    let events = events.map_err(|error| format!("{}: {error}", EventDevice::PATH))?;
    let xen = Xen {
        grants: Arc::new(grants),
        events: Box::new(events),
    };
    Ok((nodes, xen, image, disk))
}

/// Makes the NBD socket of the image's server known to the toolstack, which passes it to the device
/// model. If there is none, the process that serves the guest creates one.
fn link_nbd_socket(link: &Path, socket: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let failed = |error| format!("{}: {error}", link.display());
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error).into()),
        _ => {}
    }
    match socket {
        Some(socket) => symlink(socket, link).map_err(|error| failed(error).into()),
        None => Ok(()),
    }
}

fn connect() -> Result<Xenstore, Box<dyn Error>> {
    Xenstore::open().map_err(|error| format!("{}: {error}", Xenstore::PATH).into())
}

fn main() -> ExitCode {
    if env::args_os()
        .nth(1)
        .is_some_and(|word| word == launch::NAME)
    {
        api::message!("rblktap: {}", launch::run(env::args_os().skip(1)));
        return ExitCode::FAILURE;
    }
    let matches = command().get_matches();
    let ended = if matches.get_flag("confined") {
        serve(&matches)
    } else {
        watch(&matches).and_then(|status| match status.code() {
            Some(0) => Ok(()),
            // It has said why.
            Some(_) => std::process::exit(1),
            None => Err(format!("the process that serves the guest has ended: {status}").into()),
        })
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            api::message!("rblktap: {error}");
            match error.downcast_ref::<Stale>() {
                Some(_) => ExitCode::from(EXIT_STALE),
                None => ExitCode::FAILURE,
            }
        }
    }
}
