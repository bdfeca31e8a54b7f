// SPDX-License-Identifier: GPL-2.0-only

//! The names of images.
//!
//! | URI | image |
//! |---|---|
//! | `raw:/path`, `aio:/path`, `/path` | a file or block device without a format |
//! | `qcow2:/path`, `vhd:/path`, `vpc:/path`, `vhdx:/path`, `vmdk:/path`, `luks:/path` | a file with a format |
//! | `nbd://host[:port]/export`, `nbd+unix:///export?socket=/path` | an NBD export |
//! | `rbd:pool[/namespace]/image[@snapshot][?conf=/path][&id=client]` | an image of a Ceph cluster |
//! | `gluster://host[:port]/volume/path[?unsafe=on]` | a file of a Gluster volume |
//! | `memory:SIZE` | memory of this process, for tests; `SIZE` in bytes, or with suffix K, M or G |
//!
//! `aio:` and `vhd:` are what libxl writes to the node `params`. NBD URIs are those of the NBD
//! protocol's `uri.md`.

mod cluster;

pub use cluster::{GlusterFile, GlusterVolume, RbdAddress, RbdImageName};

use crate::error::{Error, Result};
use percent_encoding::{percent_decode_str, utf8_percent_encode, AsciiSet, CONTROLS};
use rustix::io::Errno;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The port of the NBD protocol.
const NBD_PORT: u16 = 10809;

/// The longest URI that is accepted, in bytes.
const MAX_LEN: usize = 8192;

/// The characters that are encoded inside a part of an NBD URI.
const ENCODED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'%')
    .add(b'?')
    .add(b'#')
    .add(b'&')
    .add(b'=')
    .add(b'+');

/// The format of an image file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// No format: the data as it is.
    Raw,
    /// QEMU's qcow2, with backing files and internal snapshots.
    Qcow2,
    /// Microsoft's VHD, which QEMU calls `vpc`.
    Vhd,
    /// Microsoft's VHDX.
    Vhdx,
    /// VMware's VMDK.
    Vmdk,
    /// A LUKS container.
    Luks,
}

impl Format {
    /// Returns QEMU's name of the format.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Luks => "luks",
        }
    }

    /// Returns the format that a URI's scheme names.
    fn from_scheme(scheme: &str) -> Option<Self> {
        Some(match scheme {
            "raw" | "aio" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vhd" | "vpc" => Self::Vhd,
            "vhdx" => Self::Vhdx,
            "vmdk" => Self::Vmdk,
            "luks" => Self::Luks,
            _ => return None,
        })
    }
}

/// The address of an NBD server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NbdAddress {
    /// A TCP server.
    Tcp {
        /// The host's name or address.
        host: String,
        /// The port.
        port: u16,
    },
    /// A server on a unix socket.
    Unix(PathBuf),
}

/// An NBD export.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NbdExport {
    /// The server.
    pub address: NbdAddress,
    /// The name of the export, which may be empty.
    pub name: String,
}

/// The name of an image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Uri {
    /// A file or block device.
    Image {
        /// The format.
        format: Format,
        /// The absolute path.
        path: PathBuf,
    },
    /// An NBD export.
    Nbd(NbdExport),
    /// An image of a Ceph cluster.
    Rbd(RbdImageName),
    /// A file of a Gluster volume.
    Gluster(GlusterFile),
    /// Memory of this process.
    Memory {
        /// The size in bytes.
        size: u64,
    },
}

impl Uri {
    /// Returns `true` if the image has a [`Server`](crate::Server).
    pub fn has_server(&self) -> bool {
        match self {
            Self::Image { format, .. } => *format != Format::Raw,
            Self::Nbd(_) => true,
            Self::Rbd(_) | Self::Gluster(_) | Self::Memory { .. } => false,
        }
    }

    /// Returns `true` if the engine uses the library of Ceph, which has threads of its own and
    /// connects to daemons as the cluster changes.
    pub fn has_ceph_library(&self) -> bool {
        matches!(self, Self::Rbd(_))
    }

    /// Returns `false` if the engine uses the library of GlusterFS, which opens files and connects
    /// to daemons as the volume changes.
    pub fn can_be_confined(&self) -> bool {
        !matches!(self, Self::Gluster(_))
    }

    /// Returns the file in `dir` with the passphrase of a LUKS container, or [`None`] for other
    /// images.
    ///
    /// Its name is that of the container with the suffix `.key`.
    pub fn key_file(&self, dir: &Path) -> Option<PathBuf> {
        let Self::Image {
            format: Format::Luks,
            path,
        } = self
        else {
            return None;
        };
        let mut name = path.file_name()?.to_owned();
        name.push(".key");
        Some(dir.join(name))
    }
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() > MAX_LEN || text.contains('\0') {
            return Err(invalid(text, "it is too long or contains a NUL byte"));
        }
        if text.starts_with('/') {
            return Ok(Self::Image {
                format: Format::Raw,
                path: PathBuf::from(text),
            });
        }
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(invalid(text, "it has no scheme"));
        };
        match scheme {
            "nbd" => parse_nbd_tcp(text, rest),
            "nbd+unix" => parse_nbd_unix(text, rest),
            "rbd" => rest.parse().map(Self::Rbd),
            "gluster" => rest.parse().map(Self::Gluster),
            "memory" => parse_size(rest)
                .map(|size| Self::Memory { size })
                .ok_or_else(|| invalid(text, "the size is no number with suffix K, M or G")),
            _ => parse_image(text, scheme, rest),
        }
    }
}

fn parse_image(text: &str, scheme: &str, path: &str) -> Result<Uri> {
    let Some(format) = Format::from_scheme(scheme) else {
        return Err(invalid(text, "the scheme is unknown"));
    };
    if !path.starts_with('/') {
        return Err(invalid(text, "the path is not absolute"));
    }
    Ok(Uri::Image {
        format,
        path: PathBuf::from(path),
    })
}

fn parse_nbd_tcp(text: &str, rest: &str) -> Result<Uri> {
    let Some(rest) = rest.strip_prefix("//") else {
        return Err(invalid(text, "two slashes are missing"));
    };
    let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = split_port(authority).ok_or_else(|| invalid(text, "the port is invalid"))?;
    if host.is_empty() || name.contains('?') {
        return Err(invalid(text, "it has no host, or it has parameters"));
    }
    Ok(Uri::Nbd(NbdExport {
        address: NbdAddress::Tcp {
            host: host.to_owned(),
            port,
        },
        name: decode(text, name)?,
    }))
}

fn parse_nbd_unix(text: &str, rest: &str) -> Result<Uri> {
    let Some(rest) = rest.strip_prefix("///") else {
        return Err(invalid(text, "three slashes are missing"));
    };
    let Some((name, socket)) = rest.split_once("?socket=") else {
        return Err(invalid(text, "the socket is missing"));
    };
    let socket = decode(text, socket)?;
    if !socket.starts_with('/') {
        return Err(invalid(text, "the path of the socket is not absolute"));
    }
    Ok(Uri::Nbd(NbdExport {
        address: NbdAddress::Unix(PathBuf::from(socket)),
        name: decode(text, name)?,
    }))
}

/// Splits `host:port`, `[address]:port`, or either without a port, which is that of NBD.
fn split_port(authority: &str) -> Option<(&str, u16)> {
    let (host, port) = split_host(authority)?;
    Some((host, port.unwrap_or(NBD_PORT)))
}

/// Splits `host:port`, `[address]:port`, or either without a port.
fn split_host(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            match port {
                "" => (host, None),
                port => (host, Some(port.strip_prefix(':')?)),
            }
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    match port {
        Some(port) => Some((host, Some(port.parse().ok()?))),
        None => Some((host, None)),
    }
}

fn decode(text: &str, part: &str) -> Result<String> {
    let decoded = percent_decode_str(part)
        .decode_utf8()
        .map_err(|_| invalid(text, "it is not UTF-8"))?;
    if decoded.contains('\0') {
        return Err(invalid(text, "it contains a NUL byte"));
    }
    Ok(decoded.into_owned())
}

/// Parses a number with an optional suffix K, M or G.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 10),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn invalid(text: &str, why: &str) -> Error {
    let start: String = text.chars().take(200).collect();
    Error::new(
        Errno::INVAL,
        format!("\"{start}\" is no valid image: {why}"),
        "use for example raw:/path, qcow2:/path or nbd+unix:///name?socket=/path",
    )
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image { format, path } => {
                let scheme = match format {
                    Format::Vhd => "vhd",
                    format => format.qemu_name(),
                };
                write!(f, "{scheme}:{}", path.display())
            }
            Self::Nbd(export) => export.fmt(f),
            Self::Rbd(image) => image.fmt(f),
            Self::Gluster(file) => file.fmt(f),
            Self::Memory { size } => write!(f, "memory:{size}"),
        }
    }
}

impl fmt::Display for NbdExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = utf8_percent_encode(&self.name, ENCODED);
        match &self.address {
            NbdAddress::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{name}")
            }
            NbdAddress::Tcp { host, port } => write!(f, "nbd://{host}:{port}/{name}"),
            NbdAddress::Unix(path) => {
                let path = path.to_string_lossy();
                let path = utf8_percent_encode(&path, ENCODED);
                write!(f, "nbd+unix:///{name}?socket={path}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn images() {
        for (text, format, path) in [
            ("/a", Format::Raw, "/a"),
            ("raw:/a b?c", Format::Raw, "/a b?c"),
            ("aio:/a", Format::Raw, "/a"),
            ("qcow2:/a:b", Format::Qcow2, "/a:b"),
            ("vhd:/a", Format::Vhd, "/a"),
            ("vpc:/a", Format::Vhd, "/a"),
            ("vhdx:/a", Format::Vhdx, "/a"),
            ("vmdk:/a", Format::Vmdk, "/a"),
            ("luks:/a%20", Format::Luks, "/a%20"),
        ] {
            let path = PathBuf::from(path);
            assert_eq!(parse(text), Uri::Image { format, path });
        }
        assert_eq!(parse("aio:/a").to_string(), "raw:/a");
        assert_eq!(parse("vpc:/a").to_string(), "vhd:/a");
    }

    #[test]
    fn nbd() {
        for (text, shown) in [
            ("nbd://host", "nbd://host:10809/"),
            ("nbd://host:1/a%20b", "nbd://host:1/a%20b"),
            ("nbd://[::1]:2/x/y", "nbd://[::1]:2/x/y"),
            ("nbd://[::1]", "nbd://[::1]:10809/"),
            ("nbd+unix:///?socket=/a", "nbd+unix:///?socket=/a"),
            ("nbd+unix:///n?socket=/a%26b", "nbd+unix:///n?socket=/a%26b"),
        ] {
            assert_eq!(parse(text).to_string(), shown);
        }
    }

    #[test]
    fn clusters() {
        for text in [
            "rbd:pool/image",
            "rbd:pool/space/image@snap?conf=/etc/c.conf&id=rblk",
            "rbd:pool/image?id=rblk",
            "gluster://host/volume/dir/a.raw",
            "gluster://[::1]:24007/volume/a?unsafe=on",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn luks_containers_have_key_files() {
        let key = |text| parse(text).key_file(Path::new("/keys"));
        assert_eq!(key("luks:/srv/a.luks"), Some("/keys/a.luks.key".into()));
        assert_eq!(key("luks:/srv/.."), None);
        assert_eq!(key("qcow2:/srv/a.qcow2"), None);
        assert_eq!(key("nbd://host/a"), None);
    }

    #[test]
    fn memory() {
        assert_eq!(parse("memory:512"), Uri::Memory { size: 512 });
        assert_eq!(parse("memory:3M"), Uri::Memory { size: 3 << 20 });
        assert_eq!(parse("memory:1G").to_string(), "memory:1073741824");
    }

    #[test]
    fn invalid_names_are_refused() {
        for text in [
            "",
            "a",
            "raw:a",
            "raw:",
            "vdi:/a",
            "raw:/a\0",
            "nbd:/a",
            "nbd://",
            "nbd://a:b/",
            "nbd://a:65536/",
            "nbd://[::1/",
            "nbd://[::1]1/",
            "nbd://a/b?c",
            "nbd+unix:///a",
            "nbd+unix://a?socket=/b",
            "nbd+unix:///?socket=b",
            "rbd:pool",
            "rbd:",
            "rbd:/image",
            "rbd:pool/",
            "rbd:pool/a/b/c",
            "rbd:pool/image@",
            "rbd:pool/image?size=1",
            "rbd:pool/image?conf=ceph.conf",
            "gluster:host/volume/a",
            "gluster://host/volume",
            "gluster://host/volume/",
            "gluster:///volume/a",
            "gluster://host:x/volume/a",
            "gluster://host/volume/../a",
            "gluster://host/volume/a?unsafe=off",
            "nbd+unix:///%ff?socket=/b",
            "nbd+unix:///%00?socket=/b",
            "memory:",
            "memory:K",
            "memory:18446744073709551615K",
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert_eq!(error.errno(), Errno::INVAL, "{text}");
        }
        assert!("/".repeat(MAX_LEN + 1).parse::<Uri>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "([a-z+]{0,8}|rbd|gluster):?[/?]{0,3}.{0,20}") {
            if let Ok(uri) = text.parse::<Uri>() {
                prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
            }
        }
    }
}
