// SPDX-License-Identifier: GPL-2.0-only

//! `rblk disk explain`: the connection of a disk, and the event that it waits for.
//!
//! The facts are those of xenstore, where both sides write what they offer and use, of sysfs, and
//! of `rblkd` for a disk that `rblktap` serves. So disks of the kernel are explained too, and those
//! of a host whose `rblkd` does not run.

use crate::args::DiskName;
use crate::exit::{self, Error};
use crate::table;
use api::{AgentCall, DiskId, DiskStatus, Failure, FailureKind, Phase, RunDir};
use blkif::vdev::VirtualDevice;
use serde::Serialize;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;
use xen_user::xenstore::{Nodes, Xenstore};

/// Limit for the answer of `rblkd`.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The states of `xenbus.h`, by number.
const STATES: [&str; 9] = [
    "Unknown",
    "Initialising",
    "InitWait",
    "Initialised",
    "Connected",
    "Closing",
    "Closed",
    "Reconfiguring",
    "Reconfigured",
];

/// The connection of a disk.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct Explanation {
    /// The disk.
    disk: DiskId,
    /// The name of the guest.
    domain: Option<String>,
    /// The name of the disk in the guest.
    name: String,
    /// The image or the block device.
    image: String,
    /// The program or module that serves it.
    backend: String,
    /// The states of both sides.
    states: [String; 2],
    /// The next event, or the side whose turn it is.
    waits_for: String,
    /// The way of data to and from the guest's memory.
    data_path: &'static str,
    /// The features, as both sides see them.
    features: Vec<Feature>,
    /// The state of its process, if it is `rblktap`.
    status: Option<DiskStatus>,
    /// The requests in flight of the device below, if the kernel serves it: reads and writes.
    device_in_flight: Option<String>,
}

/// A feature, with the result of its negotiation.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct Feature {
    /// The feature.
    name: &'static str,
    /// The value that the backend offers.
    backend: Option<String>,
    /// The value that the frontend has written.
    frontend: Option<String>,
    /// The value in use, or the side that has declined.
    result: String,
}

/// A disk's directories in xenstore.
struct Dirs<'a, N> {
    nodes: &'a mut N,
    disk: DiskId,
    /// The type of the backend: `vbd`, `vbd3` or `qdisk`.
    kind: &'static str,
    back: String,
    front: String,
}

/// Prints the explanation of a disk.
pub fn run(run: &RunDir, name: &DiskName, json: bool) -> Result<(), Error> {
    let mut store = Xenstore::open().map_err(|error| exit::io_failure(Xenstore::PATH, &error))?;
    let mut dirs = find(&mut store, name)?;
    let mut explanation = dirs.explain(Path::new("/sys")).map_err(unreadable)?;
    if dirs.kind == "vbd3" {
        ask_agent(run, &mut explanation);
    }
    if json {
        return exit::print_json(&explanation);
    }
    exit::print(&text(&explanation))?;
    Ok(())
}

fn unreadable(error: io::Error) -> Failure {
    exit::io_failure("xenstore", &error)
}

/// Finds the disk of this domain that has a name.
fn find<'a, N: Nodes>(nodes: &'a mut N, name: &DiskName) -> Result<Dirs<'a, N>, Failure> {
    for kind in ["vbd3", "vbd", "qdisk"] {
        let domains = nodes.list(&format!("backend/{kind}")).map_err(unreadable)?;
        for domid in domains.unwrap_or_default() {
            let domain = nodes.read_text(&format!("/local/domain/{domid}/name"));
            if domid != name.domain && domain.ok().flatten().as_ref() != Some(&name.domain) {
                continue;
            }
            let devices = nodes.list(&format!("backend/{kind}/{domid}"));
            for devid in devices.map_err(unreadable)?.unwrap_or_default() {
                let Ok(disk) = format!("{domid}/{devid}").parse::<DiskId>() else {
                    continue;
                };
                if devid == name.device || device_name(disk) == name.device {
                    return dirs(nodes, disk, kind).map_err(unreadable);
                }
            }
        }
    }
    let DiskName { domain, device } = name;
    Err(Failure::new(
        FailureKind::NoSuchDisk,
        format!("this domain serves no disk {domain}/{device}"),
        "see xl block-list, and run this in the domain of the backend",
    ))
}

fn dirs<'a, N: Nodes>(
    nodes: &'a mut N,
    disk: DiskId,
    kind: &'static str,
) -> io::Result<Dirs<'a, N>> {
    let back = format!("backend/{kind}/{disk}");
    let front = nodes.read_text(&format!("{back}/frontend"))?;
    Ok(Dirs {
        nodes,
        disk,
        kind,
        back,
        front: front.unwrap_or_default(),
    })
}

/// Returns the name of a disk in the guest. A number without a name stands for itself.
fn device_name(disk: DiskId) -> String {
    match VirtualDevice::new(disk.devid) {
        Ok(device) => device.name.to_string(),
        Err(_) => disk.devid.to_string(),
    }
}

impl<N: Nodes> Dirs<'_, N> {
    fn back(&mut self, node: &str) -> io::Result<Option<String>> {
        self.nodes.read_text(&format!("{}/{node}", self.back))
    }

    /// Reads a node of the frontend, which this domain may have no right to read.
    fn front(&mut self, node: &str) -> Option<String> {
        let path = format!("{}/{node}", self.front);
        self.nodes.read_text(&path).ok().flatten()
    }

    fn explain(&mut self, sys: &Path) -> io::Result<Explanation> {
        let domain = format!("/local/domain/{}/name", self.disk.domid);
        let features = self.features()?;
        let persistent = features
            .first()
            .is_some_and(|feature| feature.result == "in use");
        let states = [self.back("state")?, self.front("state")];
        let states = states.map(|state| state.unwrap_or_default());
        Ok(Explanation {
            disk: self.disk,
            domain: self.nodes.read_text(&domain).ok().flatten(),
            name: device_name(self.disk),
            image: self.back("params")?.unwrap_or_default(),
            backend: self.backend(sys),
            waits_for: self.waits_for(&states)?,
            states: states.map(|state| state_name(&state)),
            data_path: data_path(self.kind, persistent),
            features,
            status: None,
            device_in_flight: self.device_in_flight(sys)?,
        })
    }

    fn backend(&self, sys: &Path) -> String {
        let module = |name: &str| sys.join("module").join(name).exists();
        match self.kind {
            "vbd3" => "rblktap",
            "qdisk" => "qemu",
            _ if module("rblkback") => "rblkback",
            _ if module("xen_blkback") => "xen-blkback",
            _ => "none: neither rblkback nor xen-blkback is loaded",
        }
        .to_owned()
    }

    /// Says whose turn it is, and what the backend has reported.
    fn waits_for(&mut self, states: &[String; 2]) -> io::Result<String> {
        let [back, front] = states.each_ref().map(String::as_str);
        let error = format!("error/{}/error", self.back);
        match self.nodes.read_text(&error)? {
            // A module does not remove an error that has passed.
            Some(error) if (back, front) != ("4", "4") => {
                return Ok(format!("the backend has reported: {error}"));
            }
            _ => {}
        }
        let text = match (back, front) {
            ("4", "4") => "nothing: both sides are connected",
            ("1", _) if self.kind == "vbd3" => {
                "rblkd, to open the image: see systemctl status rblkd"
            }
            ("1", _) => {
                "the hotplug script, to write physical-device: see /var/log/xen/xen-hotplug.log"
            }
            ("2", "1" | "2") => "the guest, to load a driver for its disks, and to connect",
            ("2", "3") => "the backend, to connect: see its messages",
            ("2" | "4", "5" | "6") | ("5", _) => {
                "the other side, to close: the disk is being detached"
            }
            ("6", _) => "the toolstack, to remove the disk",
            ("4", _) => "the guest, to follow the backend: see its kernel log",
            _ => "a side that has not written a valid state",
        };
        Ok(text.to_owned())
    }

    fn features(&mut self) -> io::Result<Vec<Feature>> {
        Ok(vec![
            self.both("persistent grants", "feature-persistent")?,
            self.number("rings", "multi-queue-max-queues", "multi-queue-num-queues")?,
            self.number("ring page order", "max-ring-page-order", "ring-page-order")?,
            self.offer("indirect segments", "feature-max-indirect-segments")?,
            self.offer("flush", "feature-flush-cache")?,
            self.offer("barrier", "feature-barrier")?,
            self.offer("discard", "feature-discard")?,
        ])
    }

    /// A switch that both sides have to set.
    fn both(&mut self, name: &'static str, node: &str) -> io::Result<Feature> {
        let (backend, frontend) = (self.back(node)?, self.front(node));
        let is_on = |value: &Option<String>| value.as_ref().is_some_and(|value| value != "0");
        let result = match (is_on(&backend), is_on(&frontend)) {
            (true, true) => "in use",
            (true, false) => "declined by the frontend",
            (false, true) => "declined by the backend",
            (false, false) => "declined by both sides",
        };
        Ok(Feature {
            name,
            backend,
            frontend,
            result: result.to_owned(),
        })
    }

    /// A number that the backend limits and the frontend chooses.
    fn number(&mut self, name: &'static str, limit: &str, choice: &str) -> io::Result<Feature> {
        let (backend, frontend) = (self.back(limit)?, self.front(choice));
        let default = if choice.ends_with("order") { "0" } else { "1" };
        let result = match (&backend, &frontend) {
            (_, Some(number)) => format!("{number} in use"),
            (None, None) => format!("{default} in use: the backend does not offer more"),
            (Some(_), None) => format!("{default} in use: the frontend has not asked for more"),
        };
        Ok(Feature {
            name,
            backend,
            frontend,
            result,
        })
    }

    /// A feature that the frontend uses without a word, if it is offered.
    fn offer(&mut self, name: &'static str, node: &str) -> io::Result<Feature> {
        let backend = self.back(node)?;
        let result = match &backend {
            Some(value) if value != "0" => "offered: the frontend may use it",
            _ => "not offered by the backend",
        };
        Ok(Feature {
            name,
            backend,
            frontend: None,
            result: result.to_owned(),
        })
    }

    /// Returns the requests in flight of the block device that the kernel serves.
    fn device_in_flight(&mut self, sys: &Path) -> io::Result<Option<String>> {
        if self.kind != "vbd" {
            return Ok(None);
        }
        let device = self.back("physical-device")?.unwrap_or_default();
        let Some((major, minor)) = device.split_once(':') else {
            return Ok(None);
        };
        let number = |text| u32::from_str_radix(text, 16).ok();
        let (Some(major), Some(minor)) = (number(major), number(minor)) else {
            return Ok(None);
        };
        let path = sys.join(format!("dev/block/{major}:{minor}/inflight"));
        let text = fs::read_to_string(path).ok();
        Ok(text.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" ")))
    }
}

fn state_name(state: &str) -> String {
    let number = state.parse::<usize>().ok();
    let name = number.and_then(|number| STATES.get(number));
    name.map_or_else(|| format!("{state:?}"), |name| (*name).to_owned())
}

fn data_path(kind: &str, persistent: bool) -> &'static str {
    match (kind, persistent) {
        ("vbd3", false) => "Xen copies the data (grant copy)",
        ("vbd", false) => "the pages of each request are mapped",
        (_, false) => "the pages of each request are mapped or copied",
        (_, true) => "pages stay mapped, and the guest copies the data (persistent grants)",
    }
}

/// Asks `rblkd` about a disk. Without an answer the explanation has what xenstore says.
fn ask_agent(run: &RunDir, explanation: &mut Explanation) {
    let disk = explanation.disk;
    if let Ok(Some(record)) = run.read_record(disk) {
        explanation.image = record.image;
        explanation.backend = match record.phase {
            Phase::Running { pid, .. } => format!("rblktap, process {pid}"),
            Phase::Opening { pid, .. } => format!("rblktap, process {pid}, which opens the image"),
            Phase::Starting => "rblktap, which is about to be started".to_owned(),
            Phase::Failed { cause } => format!("none: rblktap has failed: {cause}"),
        };
    }
    let call = AgentCall::Stats { disk };
    explanation.status = api::socket::call(&run.agent_socket(), &call, TIMEOUT).ok();
}

fn text(explanation: &Explanation) -> String {
    let Explanation { disk, name, .. } = explanation;
    let domain = explanation.domain.as_deref().unwrap_or("no name");
    let [back, front] = &explanation.states;
    let mut text = format!("{}/{name} of domain {domain}\n", disk.domid);
    let mut rows = vec![
        ["image", &explanation.image],
        ["backend", &explanation.backend],
        ["data path", explanation.data_path],
        ["waits for", &explanation.waits_for],
    ]
    .into_iter()
    .map(|row| row.map(str::to_owned))
    .collect::<Vec<_>>();
    rows.push([
        "states".to_owned(),
        format!("backend {back}, frontend {front}"),
    ]);
    rows.push(["in flight".to_owned(), in_flight(explanation)]);
    text.push_str(&table::align(&rows));
    text.push('\n');
    text.push_str(&features(&explanation.features));
    text
}

fn features(features: &[Feature]) -> String {
    let mut rows = vec![["FEATURE", "BACKEND", "FRONTEND", "RESULT"].map(str::to_owned)];
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    rows.extend(features.iter().map(|feature| {
        [
            feature.name.to_owned(),
            or_dash(&feature.backend),
            or_dash(&feature.frontend),
            feature.result.clone(),
        ]
    }));
    table::align(&rows)
}

/// Describes the requests in flight.
fn in_flight(explanation: &Explanation) -> String {
    if let Some(status) = &explanation.status {
        let paused = if status.paused { ", paused" } else { "" };
        return format!("{}{paused}", table::in_flight(&status.queues));
    }
    match explanation
        .device_in_flight
        .as_deref()
        .map(|text| text.split_once(' '))
    {
        Some(Some((reads, writes))) => {
            format!("{reads} reads and {writes} writes of the device below")
        }
        _ => "not known".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_user::fake::Host;

    fn store(kind: &str, nodes: &[(&str, &str)], front: &[(&str, &str)]) -> Xenstore {
        let mut store = Host::new().xenstore().unwrap();
        let dir = format!("backend/{kind}/5/51712");
        let frontend = "/local/domain/5/device/vbd/51712";
        store.write("/local/domain/5/name", "web").unwrap();
        store.write(&format!("{dir}/frontend"), frontend).unwrap();
        for (node, value) in nodes {
            store.write(&format!("{dir}/{node}"), value).unwrap();
        }
        for (node, value) in front {
            store.write(&format!("{frontend}/{node}"), value).unwrap();
        }
        store
    }

    fn explain(store: &mut Xenstore, sys: &Path) -> Explanation {
        let mut dirs = find(store, &"web/xvda".parse().unwrap()).unwrap();
        dirs.explain(sys).unwrap()
    }

    #[test]
    fn a_connected_disk_shows_what_was_negotiated() {
        let back = [
            ("state", "4"),
            ("params", "aio:/srv/a.img"),
            ("feature-persistent", "1"),
            ("multi-queue-max-queues", "4"),
            ("max-ring-page-order", "4"),
            ("feature-discard", "1"),
            ("feature-flush-cache", "1"),
        ];
        let front = [
            ("state", "4"),
            ("feature-persistent", "0"),
            ("ring-page-order", "2"),
        ];
        let mut store = store("vbd3", &back, &front);
        let mut explanation = explain(&mut store, Path::new("/nonexistent"));
        explanation.status = None;
        assert_eq!(
            text(&explanation),
            "5/xvda of domain web\n\
             image      aio:/srv/a.img\n\
             backend    rblktap\n\
             data path  Xen copies the data (grant copy)\n\
             waits for  nothing: both sides are connected\n\
             states     backend Connected, frontend Connected\n\
             in flight  not known\n\
             \n\
             FEATURE            BACKEND  FRONTEND  RESULT\n\
             persistent grants  1        0         declined by the frontend\n\
             rings              4        -         1 in use: the frontend has not asked for more\n\
             ring page order    4        2         2 in use\n\
             indirect segments  -        -         not offered by the backend\n\
             flush              1        -         offered: the frontend may use it\n\
             barrier            -        -         not offered by the backend\n\
             discard            1        -         offered: the frontend may use it\n"
        );
    }

    #[test]
    fn a_disk_of_the_kernel_is_explained_from_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir_all(sys.path().join("module/rblkback")).unwrap();
        fs::create_dir_all(sys.path().join("dev/block/253:1")).unwrap();
        fs::write(
            sys.path().join("dev/block/253:1/inflight"),
            "       3        1\n",
        )
        .unwrap();
        let back = [
            ("state", "4"),
            ("physical-device", "fd:1"),
            ("feature-persistent", "1"),
        ];
        let mut store = store("vbd", &back, &[("state", "4"), ("feature-persistent", "1")]);
        let explanation = explain(&mut store, sys.path());
        assert_eq!(explanation.backend, "rblkback");
        assert_eq!(
            in_flight(&explanation),
            "3 reads and 1 writes of the device below"
        );
        assert!(explanation.data_path.contains("persistent"));
    }

    #[test]
    fn it_says_whose_turn_it_is() {
        for (kind, back, front, waits_for) in [
            ("vbd3", "1", "1", "rblkd, to open"),
            ("vbd", "1", "1", "the hotplug script"),
            ("vbd3", "4", "4", "nothing"),
            ("vbd", "2", "1", "the guest, to load"),
            ("vbd3", "2", "3", "the backend, to connect"),
            ("vbd3", "5", "4", "the other side, to close"),
            ("vbd3", "6", "6", "the toolstack"),
            ("vbd3", "9", "x", "a side that"),
        ] {
            let mut store = store(kind, &[("state", back)], &[("state", front)]);
            let explanation = explain(&mut store, Path::new("/nonexistent"));
            let found = explanation.waits_for;
            assert!(found.starts_with(waits_for), "{back} {front}: {found}");
        }
        let mut store = store("vbd", &[("state", "6")], &[]);
        let error = "error/backend/vbd/5/51712/error";
        store.write(error, "16 the device is in use").unwrap();
        let found = explain(&mut store, Path::new("/nonexistent")).waits_for;
        assert!(found.ends_with("16 the device is in use"), "{found}");
    }

    #[test]
    fn a_disk_that_is_not_there_is_an_error() {
        let mut store = store("vbd", &[("state", "4")], &[]);
        let name = "mail/xvda".parse().unwrap();
        let failure = find(&mut store, &name).err().unwrap();
        assert_eq!(failure.kind, FailureKind::NoSuchDisk);
    }
}
