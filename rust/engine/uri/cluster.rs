// SPDX-License-Identifier: GPL-2.0-only

//! The names of images on cluster storage.

use super::{invalid, split_host};
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A pool of a Ceph cluster, and how it is reached: `pool[/namespace][?conf=/path][&id=client]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RbdAddress {
    /// The name of the pool.
    pub pool: String,
    /// The namespace inside the pool.
    pub namespace: Option<String>,
    /// The path of the configuration file, if it is not that of Ceph.
    pub conf: Option<String>,
    /// The name of the client, `admin` if there is none.
    pub id: Option<String>,
}

/// The name of an image of a Ceph cluster.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RbdImageName {
    /// The pool.
    pub address: RbdAddress,
    /// The name of the image.
    pub image: String,
    /// The snapshot of the image.
    pub snapshot: Option<String>,
}

/// A Gluster volume, and how it is reached: `//host[:port]/volume[?unsafe=on]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GlusterVolume {
    /// The name or address of a host of the cluster.
    pub host: String,
    /// The port of `glusterd`, if it is not the usual one.
    pub port: Option<u16>,
    /// The name of the volume.
    pub volume: String,
    /// A volume is accepted whose options lose acknowledged writes.
    pub allows_loss: bool,
}

/// The name of a file of a Gluster volume.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GlusterFile {
    /// The volume.
    pub volume: GlusterVolume,
    /// The path inside the volume, without a slash at the start.
    pub path: String,
}

/// Splits off the parameters that follow a question mark.
fn split_parameters(text: &str) -> (&str, impl Iterator<Item = &str>) {
    let (name, parameters) = text.split_once('?').unwrap_or((text, ""));
    let parameters = parameters.split('&').filter(|part| !part.is_empty());
    (name, parameters)
}

/// Returns `true` if a text can be a name or a part of a path.
fn is_name(text: &str) -> bool {
    let is_special = |char: char| char.is_control() || "/?&@".contains(char);
    !text.is_empty() && text != "." && text != ".." && !text.contains(is_special)
}

impl RbdAddress {
    fn new(text: &str, pool: &str, namespace: Option<&str>) -> Result<Self> {
        if !is_name(pool) || !namespace.is_none_or(is_name) {
            return Err(invalid(text, "it has no pool, or a name that is not valid"));
        }
        Ok(Self {
            pool: pool.to_owned(),
            namespace: namespace.map(str::to_owned),
            conf: None,
            id: None,
        })
    }

    fn with_parameters<'a>(
        mut self,
        text: &str,
        parameters: impl Iterator<Item = &'a str>,
    ) -> Result<Self> {
        for parameter in parameters {
            match parameter.split_once('=') {
                Some(("conf", path)) if path.starts_with('/') => self.conf = Some(path.to_owned()),
                Some(("id", id)) if is_name(id) => self.id = Some(id.to_owned()),
                _ => return Err(invalid(text, "parameters are conf=/path and id=client")),
            }
        }
        Ok(self)
    }

    /// Returns the name of an image of the pool.
    pub fn image(&self, image: &str) -> RbdImageName {
        RbdImageName {
            address: self.clone(),
            image: image.to_owned(),
            snapshot: None,
        }
    }

    fn fmt_with(&self, f: &mut fmt::Formatter<'_>, rest: impl fmt::Display) -> fmt::Result {
        write!(f, "rbd:{}", self.pool)?;
        if let Some(namespace) = &self.namespace {
            write!(f, "/{namespace}")?;
        }
        write!(f, "{rest}")?;
        let conf = self.conf.as_ref().map(|conf| format!("conf={conf}"));
        let id = self.id.as_ref().map(|id| format!("id={id}"));
        for (parameter, separator) in conf.iter().chain(&id).zip(["?", "&"]) {
            write!(f, "{separator}{parameter}")?;
        }
        Ok(())
    }
}

impl FromStr for RbdAddress {
    type Err = Error;

    /// Parses what follows `rbd:` in the name of a storage.
    fn from_str(text: &str) -> Result<Self> {
        let (path, parameters) = split_parameters(text);
        let (pool, namespace) = match path.split_once('/') {
            Some((pool, namespace)) => (pool, Some(namespace)),
            None => (path, None),
        };
        Self::new(text, pool, namespace)?.with_parameters(text, parameters)
    }
}

impl fmt::Display for RbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_with(f, "")
    }
}

impl FromStr for RbdImageName {
    type Err = Error;

    /// Parses what follows `rbd:` in the name of an image.
    fn from_str(text: &str) -> Result<Self> {
        let (path, parameters) = split_parameters(text);
        let parts: Vec<&str> = path.split('/').collect();
        let (pool, namespace, image) = match parts[..] {
            [pool, image] => (pool, None, image),
            [pool, namespace, image] => (pool, Some(namespace), image),
            _ => {
                return Err(invalid(
                    text,
                    "it is not pool/image or pool/namespace/image",
                ))
            }
        };
        let (image, snapshot) = match image.split_once('@') {
            Some((image, snapshot)) => (image, Some(snapshot)),
            None => (image, None),
        };
        if !is_name(image) || !snapshot.is_none_or(is_name) {
            return Err(invalid(text, "the image or the snapshot has no valid name"));
        }
        Ok(Self {
            address: RbdAddress::new(text, pool, namespace)?.with_parameters(text, parameters)?,
            image: image.to_owned(),
            snapshot: snapshot.map(str::to_owned),
        })
    }
}

impl fmt::Display for RbdImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            None => self.address.fmt_with(f, format_args!("/{}", self.image)),
            Some(snapshot) => self
                .address
                .fmt_with(f, format_args!("/{}@{snapshot}", self.image)),
        }
    }
}

impl GlusterVolume {
    /// Returns the name of a file of the volume.
    pub fn file(&self, path: &str) -> GlusterFile {
        GlusterFile {
            volume: self.clone(),
            path: path.to_owned(),
        }
    }

    fn new<'a>(
        text: &str,
        authority: &str,
        volume: &str,
        parameters: impl Iterator<Item = &'a str>,
    ) -> Result<Self> {
        let (host, port) =
            split_host(authority).ok_or_else(|| invalid(text, "the port is invalid"))?;
        if host.is_empty() || !is_name(volume) {
            return Err(invalid(text, "it has no host or no volume"));
        }
        let mut allows_loss = false;
        for parameter in parameters {
            match parameter {
                "unsafe=on" => allows_loss = true,
                _ => return Err(invalid(text, "the only parameter is unsafe=on")),
            }
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            volume: volume.to_owned(),
            allows_loss,
        })
    }

    fn fmt_with(&self, f: &mut fmt::Formatter<'_>, path: &str) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "gluster://[{}]", self.host)?,
            false => write!(f, "gluster://{}", self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        write!(f, "/{}{path}", self.volume)?;
        match self.allows_loss {
            true => f.write_str("?unsafe=on"),
            false => Ok(()),
        }
    }
}

impl FromStr for GlusterVolume {
    type Err = Error;

    /// Parses what follows `gluster:` in the name of a storage.
    fn from_str(text: &str) -> Result<Self> {
        let (path, parameters) = split_parameters(text);
        let parts = path
            .strip_prefix("//")
            .and_then(|path| path.split_once('/'));
        let (authority, volume) = parts.ok_or_else(|| invalid(text, "it is not //host/volume"))?;
        Self::new(text, authority, volume, parameters)
    }
}

impl fmt::Display for GlusterVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_with(f, "")
    }
}

impl FromStr for GlusterFile {
    type Err = Error;

    /// Parses what follows `gluster:` in the name of an image.
    fn from_str(text: &str) -> Result<Self> {
        let (path, parameters) = split_parameters(text);
        let mut parts = path.strip_prefix("//").unwrap_or_default().splitn(3, '/');
        let [Some(authority), Some(volume), Some(path)] =
            [parts.next(), parts.next(), parts.next()]
        else {
            return Err(invalid(text, "it is not //host/volume/path"));
        };
        if !path.split('/').all(is_name) {
            return Err(invalid(text, "the path is not valid"));
        }
        Ok(Self {
            volume: GlusterVolume::new(text, authority, volume, parameters)?,
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for GlusterFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.volume.fmt_with(f, &format!("/{}", self.path))
    }
}
