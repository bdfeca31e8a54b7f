// SPDX-License-Identifier: GPL-2.0-only

//! The nodes of a toolstack and of a guest in xenstore, as `rblktap` and `rblkd` read them.

#![no_main]

use agent::backend;
use api::DiskId;
use blkif_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use rblktap::device::ToolstackNodes;
use std::io;
use xen_user::xenstore::Kind;
use xen_user::xenstore::Nodes;

/// A xenstore whose answers are the input.
struct Answers<'a>(Input<'a>);

impl Nodes for Answers<'_> {
    fn exchange(&mut self, _kind: Kind, _payload: &[&[u8]]) -> io::Result<Vec<u8>> {
        match self.0.u8() {
            0 => Err(io::ErrorKind::NotFound.into()),
            1 => Err(io::ErrorKind::PermissionDenied.into()),
            length => Ok((2..length).map(|_| self.0.u8()).collect()),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut nodes = Answers(Input(data));
    if let Ok(nodes) = ToolstackNodes::read(&mut nodes, "backend/vbd3/5/51712", 5) {
        assert!(nodes.frontend.len() < 256);
    }
    let disks = backend::disks(&mut nodes).unwrap_or_default();
    assert!(disks.len() < 1 << 16);
    let disk = DiskId {
        domid: 5,
        devid: 51712,
    };
    if let Ok(Some(found)) = backend::read(&mut nodes, disk) {
        assert!(found.image.len() < 1024);
    }
    assert!(!backend::name(disk).is_empty());
});
