// SPDX-License-Identifier: GPL-2.0-only

//! Reading of VHD chains: a differencing VHD and its parents.
//!
//! QEMU reads a differencing VHD as if it had no parent, and no maintained library writes one. So
//! chains are read only, to be converted; see Microsoft's "Virtual Hard Disk Image Format
//! Specification" 1.0. All numbers in a VHD are big-endian.

mod layout;

use crate::error::{Error, Result};
use crate::request::Request;
use crate::{Engine, Queue};
use layout::{bitmap_size, DynamicHeader, Footer, Kind, Locator, FOOTER_LEN, HEADER_LEN, SECTOR};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The greatest number of files of a chain.
const MAX_CHAIN: usize = 64;

/// The entry of the block allocation table for a block that is not allocated.
const UNUSED: u32 = u32::MAX;

/// The greatest length of a parent's name in bytes.
const MAX_NAME: u32 = 4096;

const RESTORE: &str = "restore the file from a backup";

/// A VHD with its parents, open for reading.
#[derive(Debug)]
pub struct VhdChain {
    /// The files, the youngest first.
    files: Vec<Vhd>,
}

/// One file of a chain.
#[derive(Debug)]
struct Vhd {
    file: File,
    path: PathBuf,
    footer: Footer,
    blocks: Option<Blocks>,
}

/// The blocks of a dynamic or differencing VHD.
#[derive(Debug)]
struct Blocks {
    header: DynamicHeader,
    /// The sector where each block starts.
    table: Vec<u32>,
}

/// The state of a range in one file.
enum Extent {
    /// The range is in the file, at this offset.
    Data(u64),
    /// The range is not in the file.
    Missing,
}

impl VhdChain {
    /// Opens the VHD at `path` and its parents.
    ///
    /// The identity of each parent is checked. A parent is searched where its child says, and in
    /// the directory of its child.
    pub fn open(path: &Path) -> Result<Self> {
        let mut files = vec![Vhd::open(path)?];
        while let Some(child) = files.last() {
            let Some(parent) = child.parent()? else {
                break;
            };
            if files.len() >= MAX_CHAIN {
                return Err(invalid(path, "it has too many parents"));
            }
            files.push(parent);
        }
        Ok(Self { files })
    }

    /// Returns `true` if the VHD has a parent.
    pub fn is_differencing(&self) -> bool {
        self.files.len() > 1
    }

    /// Returns the size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.files.first().map_or(0, |file| file.footer.size)
    }

    /// Reads from the disk at `offset`, which is a multiple of 512 as the length is.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(data.len() as u64);
        let is_aligned = offset % SECTOR == 0 && data.len() as u64 % SECTOR == 0;
        if !is_aligned || end.is_none_or(|end| end > self.size()) {
            return Err(Error::new(
                Errno::INVAL,
                "a read is not inside the disk",
                "this is an error of the program, report it",
            ));
        }
        read_from(&self.files, offset, data)
    }
}

/// The length of one read and write of a copy.
const COPY_LEN: u64 = 1 << 20;

/// The number of writes of a copy at the same time.
const COPY_DEPTH: usize = 8;

/// Limit for all writes of a copy together.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);

impl VhdChain {
    /// Copies the disk to `target`, which reads as zeros and is at least as large, and flushes it.
    pub fn copy_to(&self, target: &dyn Engine) -> Result<()> {
        if target.info().size < self.size() {
            return Err(Error::new(
                Errno::NOSPC,
                format!("the target has less than {} bytes", self.size()),
                "create a larger target",
            ));
        }
        let mut queue = target.queue(COPY_DEPTH as u32)?;
        let mut offset = 0;
        while offset < self.size() {
            let length = self.size().saturating_sub(offset).min(COPY_LEN);
            let mut data = vec![0; length as usize];
            self.read_at(offset, &mut data)?;
            if data.iter().any(|byte| *byte != 0) {
                let mut buffer = target.allocate(data.len())?;
                buffer.write_at(0, &data)?;
                queue.submit(Request::write(offset, offset, vec![buffer]));
            }
            if queue.in_flight() >= COPY_DEPTH {
                finish(&mut *queue)?;
            }
            offset = offset.saturating_add(length);
        }
        finish(&mut *queue)?;
        queue.submit(Request::flush(0));
        finish(&mut *queue)
    }
}

/// Waits for all requests of a queue.
fn finish(queue: &mut dyn Queue) -> Result<()> {
    let mut completions = Vec::new();
    queue.drain(COPY_TIMEOUT, &mut completions)?;
    completions
        .into_iter()
        .try_for_each(|completion| completion.result)
}

/// Reads from the first of `files`, and from the others what it does not have.
fn read_from(files: &[Vhd], mut offset: u64, mut data: &mut [u8]) -> Result<()> {
    let Some((file, parents)) = files.split_first() else {
        data.fill(0);
        return Ok(());
    };
    while !data.is_empty() {
        let (extent, length) = file.lookup(offset, data.len() as u64)?;
        let length = usize::try_from(length).map_or(data.len(), |length| length.min(data.len()));
        let (part, rest) = data.split_at_mut(length);
        match extent {
            Extent::Data(at) => file.read(at, part)?,
            Extent::Missing => read_from(parents, offset, part)?,
        }
        offset = offset.saturating_add(length as u64);
        data = rest;
    }
    Ok(())
}

impl Vhd {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| {
            Error::from_io(
                &error,
                format_args!("{} cannot be opened", path.display()),
                "check the path and the permissions",
            )
        })?;
        let mut vhd = Self {
            file,
            path: path.to_owned(),
            footer: Footer::default(),
            blocks: None,
        };
        vhd.footer = vhd.read_footer()?;
        if vhd.footer.kind != Kind::Fixed {
            vhd.blocks = Some(vhd.read_blocks()?);
        }
        Ok(vhd)
    }

    fn invalid(&self, why: &str) -> Error {
        invalid(&self.path, why)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(data, offset).map_err(|error| {
            let doing = format!("reading {} at {offset}", self.path.display());
            Error::from_io(&error, doing, RESTORE)
        })
    }

    /// Reads the footer at the end of the file, or its copy at the start.
    fn read_footer(&self) -> Result<Footer> {
        let length = self
            .file
            .metadata()
            .map_err(|error| Error::from_io(&error, self.path.display(), RESTORE))?
            .len();
        let mut bytes = [0; FOOTER_LEN];
        let end = length.saturating_sub(FOOTER_LEN as u64);
        for offset in [end, 0] {
            self.read(offset, &mut bytes)?;
            if let Some(footer) = Footer::parse(&bytes) {
                return Ok(footer);
            }
        }
        Err(self.invalid("it has no valid footer"))
    }

    fn read_blocks(&self) -> Result<Blocks> {
        let mut bytes = [0; HEADER_LEN];
        self.read(self.footer.data_offset, &mut bytes)?;
        let header =
            DynamicHeader::parse(&bytes).ok_or_else(|| self.invalid("its header is invalid"))?;
        let needed = self.footer.size.div_ceil(u64::from(header.block_size));
        if needed > u64::from(header.entries) {
            return Err(self.invalid("its block allocation table is too small"));
        }
        // Checked above: `needed` is at most the number of entries.
        let mut bytes = vec![0; (needed as usize).saturating_mul(4)];
        self.read(header.table_offset, &mut bytes)?;
        let table = bytes
            .chunks_exact(4)
            .filter_map(|entry| entry.first_chunk::<4>())
            .map(|entry| u32::from_be_bytes(*entry))
            .collect();
        Ok(Blocks { header, table })
    }

    /// Returns where `offset` is, and how many bytes from there on, up to `length`, are alike.
    fn lookup(&self, offset: u64, length: u64) -> Result<(Extent, u64)> {
        let Some(blocks) = &self.blocks else {
            return Ok((Extent::Data(offset), length));
        };
        let block_size = u64::from(blocks.header.block_size);
        let (index, inside) = (offset / block_size, offset % block_size);
        let length = length.min(block_size.saturating_sub(inside));
        let start = usize::try_from(index)
            .ok()
            .and_then(|index| blocks.table.get(index))
            .ok_or_else(|| self.invalid("a parent is smaller than its child"))?;
        if *start == UNUSED {
            return Ok((Extent::Missing, length));
        }
        let start = u64::from(*start).saturating_mul(SECTOR);
        let bitmap_len = bitmap_size(blocks.header.block_size);
        let data = start.saturating_add(bitmap_len).saturating_add(inside);
        if self.footer.kind == Kind::Dynamic {
            return Ok((Extent::Data(data), length));
        }
        self.lookup_sectors(start, inside / SECTOR, length / SECTOR)
            .map(|(has_data, sectors)| {
                let extent = if has_data {
                    Extent::Data(data)
                } else {
                    Extent::Missing
                };
                (extent, sectors.saturating_mul(SECTOR))
            })
    }

    /// Returns what the bitmap at `start` says about a sector, and how many from there on, up to
    /// `count`, are alike.
    fn lookup_sectors(&self, start: u64, sector: u64, count: u64) -> Result<(bool, u64)> {
        let first = sector / 8;
        let last = sector.saturating_add(count).saturating_sub(1) / 8;
        let mut bitmap = vec![0; last.saturating_sub(first).saturating_add(1) as usize];
        self.read(start.saturating_add(first), &mut bitmap)?;
        let bit = |number: u64| {
            let byte = usize::try_from((number / 8).saturating_sub(first))
                .ok()
                .and_then(|index| bitmap.get(index))
                .copied()
                .unwrap_or_default();
            // The first sector of a byte is its most significant bit.
            byte & (0x80 >> (number % 8)) != 0
        };
        let has_data = bit(sector);
        let alike = (0..count)
            .take_while(|number| bit(sector.saturating_add(*number)) == has_data)
            .count();
        Ok((has_data, alike as u64))
    }

    /// Opens the parent of a differencing VHD.
    fn parent(&self) -> Result<Option<Self>> {
        let header = match (&self.blocks, self.footer.kind) {
            (Some(blocks), Kind::Differencing) => &blocks.header,
            _ => return Ok(None),
        };
        let mut names = vec![header.parent_name.clone()];
        for locator in &header.locators {
            names.extend(self.locator_name(locator)?);
        }
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let mut last = None;
        for path in names.iter().flat_map(|name| candidates(name, dir)) {
            match Self::open(&path) {
                Ok(parent) if parent.footer.id == header.parent_id => {
                    if parent.footer.size < self.footer.size {
                        return Err(parent.invalid("it is smaller than its child"));
                    }
                    return Ok(Some(parent));
                }
                Ok(parent) => last = Some(parent.invalid("it is not the parent of this chain")),
                Err(error) if error.errno() == Errno::NOENT => {}
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            Error::new(
                Errno::NOENT,
                format!(
                    "{} has a parent that cannot be found: {}",
                    self.path.display(),
                    names.join(", ")
                ),
                "put it into the directory of its child",
            )
        }))
    }

    /// Returns the parent's name in a locator of a platform that is known.
    fn locator_name(&self, locator: &Locator) -> Result<Option<String>> {
        let Some(decode) = locator.decoder() else {
            return Ok(None);
        };
        if locator.length > MAX_NAME {
            return Err(self.invalid("the name of its parent is too long"));
        }
        let mut bytes = vec![0; locator.length as usize];
        self.read(locator.offset, &mut bytes)?;
        Ok(Some(decode(&bytes)))
    }
}

/// Returns the paths where a parent may be: as its name says, relative to the directory of the
/// child, and in that directory.
fn candidates(name: &str, dir: &Path) -> Vec<PathBuf> {
    let name = name
        .trim_end_matches('\0')
        .trim_start_matches("file://")
        .replace('\\', "/");
    let Some(file_name) = Path::new(&name).file_name() else {
        return Vec::new();
    };
    // Joining an absolute path replaces the directory.
    vec![dir.join(&name), dir.join(file_name)]
}

fn invalid(path: &Path, why: &str) -> Error {
    Error::new(
        Errno::INVAL,
        format!("{} cannot be used: {why}", path.display()),
        RESTORE,
    )
}
