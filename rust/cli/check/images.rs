// SPDX-License-Identifier: GPL-2.0-only

//! Options of qcow2 images that make disks slow or keep their blocks allocated.

use super::{finding, Finding, Host};
use api::Record;
use engine::{Format, Uri};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The length of the part of a header that has the fields of [`Header`].
const HEADER_LEN: usize = 32;

/// The size of an entry of a table that maps a cluster of the image.
const ENTRY_LEN: u64 = 8;

/// The memory that QEMU uses for these tables at most, by default.
const TABLE_CACHE: u64 = 32 << 20;

/// The fields of the header of a qcow2 image.
struct Header {
    version: u32,
    cluster_size: u64,
    size: u64,
}

impl Header {
    fn read(path: &Path) -> io::Result<Option<Self>> {
        let mut bytes = [0; HEADER_LEN];
        File::open(path)?.read_exact(&mut bytes)?;
        Ok(Self::parse(&bytes))
    }

    /// Returns `None` if this is no header.
    fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (_backing_offset, rest) = rest.split_first_chunk::<8>()?;
        let (_backing_len, rest) = rest.split_first_chunk::<4>()?;
        let (cluster_bits, rest) = rest.split_first_chunk()?;
        let (size, _) = rest.split_first_chunk()?;
        let cluster_size = 1_u64.checked_shl(u32::from_be_bytes(*cluster_bits))?;
        (magic == b"QFI\xfb").then_some(Self {
            version: u32::from_be_bytes(*version),
            cluster_size,
            size: u64::from_be_bytes(*size),
        })
    }

    /// Returns the size of the tables that map all clusters.
    fn tables(&self) -> u64 {
        let clusters = self.size.div_ceil(self.cluster_size);
        clusters.saturating_mul(ENTRY_LEN)
    }
}

/// Finds options of the images of attached disks.
pub(super) fn images(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    for path in qcow2_images(host) {
        // What cannot be read is reported when the disk is attached.
        if let Ok(Some(header)) = Header::read(&host.path(path.to_string_lossy().trim_matches('/')))
        {
            findings.extend(options(&path.display().to_string(), &header));
        }
    }
    findings
}

/// Returns the qcow2 images of attached disks, each once.
fn qcow2_images(host: &Host) -> Vec<PathBuf> {
    const DIR: &str = "run/rblk";
    let names = host.names(DIR).into_iter();
    let records = names
        .filter(|name| name.ends_with(".json"))
        .filter_map(|name| {
            serde_json::from_str::<Record>(&host.read(&format!("{DIR}/{name}"))).ok()
        });
    let mut images: Vec<PathBuf> = records
        .filter_map(|record| match record.image.parse() {
            Ok(Uri::Image {
                format: Format::Qcow2,
                path,
            }) => Some(path),
            _ => None,
        })
        .collect();
    images.sort();
    images.dedup();
    images
}

fn options(path: &str, header: &Header) -> Vec<Finding> {
    let mut findings = Vec::new();
    if header.version < 3 {
        findings.extend(finding(
            format!("{path} has the option compat=0.10: zeroes are written as data"),
            format!("detach the disk, then: qemu-img amend -f qcow2 -o compat=1.1 {path}"),
        ));
    }
    if header.tables() > TABLE_CACHE {
        let kib = header.cluster_size >> 10;
        findings.extend(finding(
            format!(
                "{path} has clusters of {kib} KiB, too small for its size: random I/O has to read tables of the image"
            ),
            format!("detach the disk, then: qemu-img convert -f qcow2 -O qcow2 -o cluster_size=2M {path} NEW"),
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;
    use std::fs;

    fn header(version: u32, cluster_bits: u32, size: u64) -> Vec<u8> {
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.extend(version.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.extend(cluster_bits.to_be_bytes());
        bytes.extend(size.to_be_bytes());
        bytes
    }

    fn record(devid: u32, image: &str) -> String {
        let phase = r#"{"state":"Running","pid":7,"start_time":9}"#;
        let disk = format!("5/{devid}");
        format!(
            r#"{{"disk":"{disk}","name":"xvda","image":"{image}","restarts":0,"phase":{phase}}}"#
        )
    }

    #[test]
    fn options_of_attached_images_are_found() {
        let (dir, host) = host(&[
            ("run/rblk/5-1.json", &record(1, "qcow2:/srv/old.qcow2")),
            ("run/rblk/5-2.json", &record(2, "qcow2:/srv/large.qcow2")),
            ("run/rblk/5-3.json", &record(3, "qcow2:/srv/good.qcow2")),
            ("run/rblk/5-4.json", &record(4, "raw:/srv/old.qcow2")),
            ("run/rblk/5-5.json", &record(5, "qcow2:/srv/missing.qcow2")),
            ("run/rblk/5-6.json", &record(6, "qcow2:/srv/short.qcow2")),
            ("run/rblk/5-7.json", &record(7, "qcow2:/srv/bad.qcow2")),
            ("run/rblk/5-8.json", "{"),
            ("srv/short.qcow2", "QFI"),
        ]);
        let files = [
            ("old", header(2, 16, 1 << 30)),
            ("large", header(3, 16, 1 << 40)),
            ("good", header(3, 16, 256 << 30)),
            ("bad", header(3, 200, 1)),
        ];
        for (name, bytes) in files {
            fs::write(dir.path().join(format!("srv/{name}.qcow2")), bytes).unwrap();
        }
        let found: Vec<String> = images(&host).into_iter().map(|found| found.cause).collect();
        let [large, old] = &found[..] else {
            panic!("{found:?}");
        };
        assert!(
            large.starts_with("/srv/large.qcow2 has clusters of 64 KiB"),
            "{large}"
        );
        assert!(
            old.starts_with("/srv/old.qcow2 has the option compat=0.10"),
            "{old}"
        );
    }
}
