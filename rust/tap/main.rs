// SPDX-License-Identifier: GPL-2.0-only

//! `rblktap DOMAIN DEVICE URI`: serves one disk of a Xen guest until it is detached.

#![forbid(unsafe_code)]

use clap::value_parser;
use clap::Arg;
use clap::ArgMatches;
use clap::Command;
use engine::Options;
use engine::Uri;
use rblktap::device::Config;
use rblktap::device::Device;
use rblktap::device::Settings;
use rblktap::device::ToolstackNodes;
use rblktap::device::Xen;
use rblktap::Disk;
use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use xen_user::event::EventDevice;
use xen_user::grant::GrantDevice;
use xen_user::xenstore::Nodes;
use xen_user::xenstore::Xenstore;

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
                .help("The image, for example raw:/srv/a.img"),
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
            option("max-queues", "N", "4")
                .value_parser(value_parser!(u32))
                .help("Largest number of rings"),
        )
        .arg(
            option("block-size", "BYTES", "512")
                .value_parser(["512", "4096"])
                .help("Smallest logical block size"),
        )
        .arg(
            option("persistent", "on|off", "off")
                .value_parser(["on", "off"])
                .help(
                    "Use persistent grants if the frontend does. In a PV dom0 a kill during I/O \
                     leaks such grants",
                ),
        )
        .arg(
            option("retry-seconds", "N", "60")
                .value_parser(value_parser!(u32))
                .help("How long requests are retried after a temporary error"),
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

fn config(matches: &ArgMatches) -> Config {
    let domain = matches.get_one("domain").copied().unwrap_or_default();
    let device = matches.get_one("device").copied().unwrap_or_default();
    let kind = text(matches, "backend-kind");
    Config {
        domain,
        device,
        dir: format!("backend/{kind}/{domain}/{device}"),
        state_dir: matches.get_one("state-dir").cloned().unwrap_or_default(),
        stats_root: Some(PathBuf::from("/dev/shm")),
        max_queues: matches.get_one("max-queues").copied().unwrap_or(1),
        persistent: text(matches, "persistent") == "on",
        settings: Settings {
            retry_time: seconds(matches, "retry-seconds"),
        },
    }
}

/// Opens the image and Xen's devices.
fn open(
    matches: &ArgMatches,
    config: Config,
    mut store: Xenstore,
) -> Result<Device, Box<dyn Error>> {
    fs::create_dir_all(&config.state_dir)
        .map_err(|error| format!("{}: {error}", config.state_dir.display()))?;
    let nodes = ToolstackNodes::read(&mut store, &config.dir, config.domain)?;
    let uri: Uri = text(matches, "uri").parse()?;
    let options = Options {
        read_only: nodes.read_only,
        exclusive: !nodes.shared,
        lock_timeout: seconds(matches, "lock-seconds"),
        // The process before this one was killed.
        unclean: config.inflight_path().exists(),
        runtime_dir: config.state_dir.clone(),
        ..Options::default()
    };
    let image = engine::open(&uri, &options)?;
    link_nbd_socket(&config.nbd_path(), image.nbd_socket().as_deref())?;
    let block_size = text(matches, "block-size").parse()?;
    let disk = Disk::new(image.info(), block_size, nodes.discard, nodes.removable);
    let grants = GrantDevice::open().map_err(|error| format!("{}: {error}", GrantDevice::PATH))?;
    let xen = Xen {
        grants: Arc::new(grants),
        events: Box::new(EventDevice),
    };
    Ok(Device::new(config, nodes, store, xen, image, disk)?)
}

/// Makes the NBD socket of the image known to the toolstack, which passes it to the device model.
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

fn run(matches: &ArgMatches) -> Result<(), Box<dyn Error>> {
    let config = config(matches);
    let error_node = format!("error/{}/error", config.dir);
    match open(matches, config, connect()?) {
        Ok(device) => Ok(device.run()?),
        Err(error) => {
            // For the hotplug script, which prints it.
            connect()?.write(&error_node, &error.to_string())?;
            Err(error)
        }
    }
}

fn main() -> ExitCode {
    let matches = command().get_matches();
    match run(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rblktap: {error}");
            ExitCode::FAILURE
        }
    }
}
