// SPDX-License-Identifier: GPL-2.0-only

//! Directories of a device in xenstore.

use crate::error::During;
use crate::error::Error;
use blkif::node;
use blkif::node::InvalidNode;
use blkif::state::XenbusState;
use std::io;
use xen_user::xenstore::Nodes;

/// Reads a node. One that is empty counts as missing.
pub(crate) fn read(
    nodes: &mut impl Nodes,
    dir: &str,
    name: &str,
) -> Result<Option<Vec<u8>>, Error> {
    let value = nodes.read(&format!("{dir}/{name}"));
    let value = value.during("reading xenstore")?;
    Ok(value.filter(|value| !value.is_empty()))
}

/// Reads a node. One that is no number counts as missing.
pub(crate) fn read_number(
    nodes: &mut impl Nodes,
    dir: &str,
    name: &str,
) -> Result<Option<u64>, Error> {
    let value = read(nodes, dir, name)?;
    let text = value.as_deref().map(String::from_utf8_lossy);
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Reads a node that the toolstack must have written.
pub(crate) fn require(
    nodes: &mut impl Nodes,
    dir: &str,
    name: &'static str,
) -> Result<Vec<u8>, Error> {
    read(nodes, dir, name)?.ok_or(Error::Toolstack(InvalidNode::missing(name)))
}

/// Writes a node of a directory.
pub(crate) fn write(
    nodes: &mut impl Nodes,
    dir: &str,
    name: &str,
    value: impl std::fmt::Display,
) -> io::Result<()> {
    nodes.write(&format!("{dir}/{name}"), &value.to_string())
}

/// Reads the node `state` of a directory. Returns `None` if it is no number of a state.
pub(crate) fn read_state(nodes: &mut impl Nodes, dir: &str) -> io::Result<Option<XenbusState>> {
    let Some(text) = nodes.read(&format!("{dir}/state"))? else {
        return Ok(Some(XenbusState::Unknown));
    };
    let number = node::decimal_u32("state", &text);
    Ok(number
        .ok()
        .and_then(|number| XenbusState::try_from(number).ok()))
}
