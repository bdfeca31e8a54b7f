// SPDX-License-Identifier: GPL-2.0-only

//! The nodes of a disk in xenstore: the directories `backend/vbd3/D/N`.

use api::{defaults, DiskId};
use blkif::ring::MAX_PAGE_ORDER;
use blkif::vdev::VirtualDevice;
use std::io;
use xen_user::xenstore::{Nodes, Xenstore};

/// The directory of all disks, in that of this domain.
pub const ROOT: &str = "backend/vbd3";

/// `Initialising`: the toolstack has created the directory.
pub const INITIALISING: u32 = 1;
/// `InitWait`: the features are written.
pub const INIT_WAIT: u32 = 2;
/// `Closing`: the disk is being detached.
pub const CLOSING: u32 = 5;
/// `Closed`: nothing of the guest is in use. It may connect again if the disk is online.
pub const CLOSED: u32 = 6;

/// The contents of the directory of a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backend {
    /// The node `state`.
    pub state: u32,
    /// The node `online`: the toolstack wants the disk, so a guest that has closed it may connect
    /// again.
    pub online: bool,
    /// The process that has the image open, the node `kthread-pid`.
    pub process: Option<u32>,
    /// The image that the node `params` names.
    pub image: String,
    /// The name of the guest, if it has one and this domain may read it.
    pub domain: Option<String>,
}

/// Returns the path of a disk's directory.
pub fn path(disk: DiskId) -> String {
    format!("{ROOT}/{disk}")
}

/// Returns the disk that a path below [`ROOT`] is about, or `None` for a directory of several.
pub fn disk_of(path: &str) -> Option<DiskId> {
    let rest = path.strip_prefix(ROOT)?.strip_prefix('/')?;
    let mut parts = rest.splitn(3, '/');
    format!("{}/{}", parts.next()?, parts.next()?).parse().ok()
}

/// Lists the disks. Names that are no numbers are left out.
pub fn disks(nodes: &mut impl Nodes) -> io::Result<Vec<DiskId>> {
    let mut disks = Vec::new();
    for domid in nodes.list(ROOT)?.unwrap_or_default() {
        let devices = nodes.list(&format!("{ROOT}/{domid}"))?;
        for devid in devices.unwrap_or_default() {
            disks.extend(format!("{domid}/{devid}").parse::<DiskId>());
        }
    }
    Ok(disks)
}

/// Reads the directory of a disk. Returns `None` if it has no state: it is gone.
pub fn read(nodes: &mut impl Nodes, disk: DiskId) -> io::Result<Option<Backend>> {
    let dir = path(disk);
    let Some(state) = nodes.read_text(&format!("{dir}/state"))? else {
        return Ok(None);
    };
    let name = format!("/local/domain/{}/name", disk.domid);
    let params = nodes.read_text(&format!("{dir}/params"))?;
    let process = nodes.read_text(&format!("{dir}/kthread-pid"))?;
    let online = nodes.read_text(&format!("{dir}/online"))?;
    Ok(Some(Backend {
        state: state.parse().unwrap_or_default(),
        online: online.as_deref() == Some("1"),
        process: process.and_then(|process| process.parse().ok()),
        image: image_of(&params.unwrap_or_default()).to_owned(),
        // A driver domain may not read it.
        domain: nodes.read_text(&name).ok().flatten(),
    }))
}

/// Returns the image that a node `params` names. libxl writes the disk's format in front of the
/// target: `aio:/srv/a.img` for a path, `aio:qcow2:/srv/a.qcow2` for a URI.
fn image_of(params: &str) -> &str {
    match params.split_once(':') {
        Some(("aio" | "vhd", target)) if !target.starts_with('/') => target,
        _ => params,
    }
}

/// Returns the name of a disk in the guest. A number without a name stands for itself.
pub fn name(disk: DiskId) -> String {
    match VirtualDevice::new(disk.devid) {
        Ok(device) => device.name.to_string(),
        Err(_) => disk.devid.to_string(),
    }
}

/// Writes InitWait in place of Initialising for a process that has not done so yet, with the offers
/// that a frontend reads in this state. Returns `false` if another state is there.
pub fn announce(store: &mut Xenstore, disk: DiskId) -> io::Result<bool> {
    let dir = path(disk);
    store.transaction(|transaction| {
        let found = transaction.read_text(&format!("{dir}/state"))?;
        if found != Some(INITIALISING.to_string()) {
            return Ok(false);
        }
        let order = MAX_PAGE_ORDER.to_string();
        transaction.write(&format!("{dir}/max-ring-page-order"), &order)?;
        let queues = defaults::MAX_QUEUES;
        transaction.write(&format!("{dir}/multi-queue-max-queues"), queues)?;
        transaction.write(&format!("{dir}/state"), &INIT_WAIT.to_string())?;
        Ok(true)
    })
}

/// Writes a state in place of `from`. Returns `false` if another one is there.
pub fn change_state(store: &mut Xenstore, disk: DiskId, from: u32, to: u32) -> io::Result<bool> {
    let node = format!("{}/state", path(disk));
    store.transaction(|transaction| {
        let found = transaction.read_text(&node)?;
        if found != Some(from.to_string()) {
            return Ok(false);
        }
        transaction.write(&node, &to.to_string())?;
        Ok(true)
    })
}

/// Writes why a disk is not served, where drivers write it (`xenbus_dev_error`).
pub fn report_error(nodes: &mut impl Nodes, disk: DiskId, cause: &str) -> io::Result<()> {
    nodes.write(&format!("error/{}/error", path(disk)), cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_user::fake::Host;

    const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };

    #[test]
    fn paths_name_disks() {
        assert_eq!(disk_of("backend/vbd3/5/51712/state"), Some(DISK));
        assert_eq!(disk_of("backend/vbd3/5/51712"), Some(DISK));
        for path in ["backend/vbd3/5", "backend/vbd3", "backend/vbd3/x/1", "a"] {
            assert_eq!(disk_of(path), None, "{path}");
        }
        assert_eq!(name(DISK), "xvda");
        let devid = u32::MAX;
        assert_eq!(name(DiskId { domid: 1, devid }), "4294967295");
    }

    #[test]
    fn directories_are_listed_and_read() {
        let mut store = Host::new().xenstore().unwrap();
        assert_eq!(disks(&mut store).unwrap(), []);
        assert_eq!(read(&mut store, DISK).unwrap(), None);
        store.write("backend/vbd3/5/51712/state", "1").unwrap();
        store
            .write("backend/vbd3/5/51712/params", "aio:/a")
            .unwrap();
        store.write("backend/vbd3/5/x/state", "1").unwrap();
        store.write("/local/domain/5/name", "web").unwrap();
        assert_eq!(disks(&mut store).unwrap(), [DISK]);
        let backend = read(&mut store, DISK).unwrap().unwrap();
        assert_eq!((backend.state, backend.image.as_str()), (1, "aio:/a"));
        assert_eq!(backend.domain.as_deref(), Some("web"));
        assert_eq!((backend.process, backend.online), (None, false));
        store.write("backend/vbd3/5/51712/online", "1").unwrap();
        store
            .write("backend/vbd3/5/51712/kthread-pid", "7")
            .unwrap();
        let backend = read(&mut store, DISK).unwrap().unwrap();
        assert_eq!((backend.process, backend.online), (Some(7), true));
    }

    #[test]
    fn the_format_in_front_of_a_uri_is_that_of_libxl() {
        for (params, image) in [
            ("aio:/srv/a.img", "aio:/srv/a.img"),
            ("vhd:/srv/a.vhd", "vhd:/srv/a.vhd"),
            ("aio:qcow2:/srv/a.qcow2", "qcow2:/srv/a.qcow2"),
            ("aio:nbd://host/a", "nbd://host/a"),
            ("qcow2:/srv/a.qcow2", "qcow2:/srv/a.qcow2"),
            ("", ""),
        ] {
            assert_eq!(image_of(params), image);
        }
    }

    #[test]
    fn init_wait_replaces_initialising_with_offers() {
        let mut store = Host::new().xenstore().unwrap();
        let dir = path(DISK);
        assert!(!announce(&mut store, DISK).unwrap());
        store.write(&format!("{dir}/state"), "1").unwrap();
        assert!(announce(&mut store, DISK).unwrap());
        assert!(!announce(&mut store, DISK).unwrap());
        for (node, value) in [
            ("state", "2"),
            ("max-ring-page-order", "4"),
            ("multi-queue-max-queues", "4"),
        ] {
            let found = store.read_text(&format!("{dir}/{node}")).unwrap();
            assert_eq!(found.as_deref(), Some(value), "{node}");
        }
    }

    #[test]
    fn a_state_replaces_only_the_one_that_it_follows() {
        let mut store = Host::new().xenstore().unwrap();
        store.write("backend/vbd3/5/51712/state", "5").unwrap();
        let mut change = |from, to| change_state(&mut store, DISK, from, to).unwrap();
        assert!(!change(INITIALISING, INIT_WAIT));
        assert!(change(CLOSING, CLOSED));
        assert!(!change(CLOSING, CLOSED));
    }
}
