// SPDX-License-Identifier: GPL-2.0-only

//! A grant table over the memory of a `memfd`.

use super::lock;
use crate::grant::Copies;
use crate::grant::CopyStatus;
use crate::grant::Piece;
use crate::grant::MAX_MAPPED;
use crate::memory;
use crate::memory::Pages;
use crate::memory::PAGE_SIZE;
use crate::unmapper::Unmapper;
use io_buffer::Access;
use rustix::fs::MemfdFlags;
use rustix::mm;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::Mutex;

/// Grants of all domains, and their memory.
#[derive(Default)]
pub(super) struct GrantTable {
    memory: Option<Memory>,
    last: u32,
    grants: BTreeMap<u32, Grant>,
    mapped: usize,
}

/// The memory of all domains. It only grows.
struct Memory {
    file: File,
    len: usize,
}

struct Grant {
    domain: u16,
    access: Access,
    /// The offset of the page in the memory.
    at: usize,
    /// For copies.
    page: Pages,
}

impl GrantTable {
    pub(super) fn grant(
        &mut self,
        domain: u16,
        count: usize,
        access: Access,
    ) -> io::Result<(Pages, Vec<u32>)> {
        let (file, start) = self.allocate(count)?;
        let own = map_range(&file, start, count, Access::ReadWrite, None)?;
        let mut references = Vec::new();
        for page in 0..count {
            let at = start.saturating_add(page.saturating_mul(PAGE_SIZE));
            // References of neighbouring pages are no neighbours.
            self.last = self.last.wrapping_add(7);
            let grant = Grant {
                domain,
                access,
                at,
                page: map_range(&file, at, 1, Access::ReadWrite, None)?,
            };
            self.grants.insert(self.last, grant);
            references.push(self.last);
        }
        Ok((own, references))
    }

    pub(super) fn end(&mut self, references: &[u32]) {
        self.grants.retain(|number, _| !references.contains(number));
    }

    pub(super) fn mapped(&self) -> usize {
        self.mapped
    }

    pub(super) fn copy(&self, copies: &mut Copies<'_>) {
        let domain = copies.domain();
        copies.run(|piece, own, to_grant| self.copy_one(domain, piece, own, to_grant));
    }

    fn copy_one(&self, domain: u16, piece: Piece, own: *mut u8, to_grant: bool) -> CopyStatus {
        let Some(grant) = self.find(domain, piece.reference) else {
            return CopyStatus::BAD_REFERENCE;
        };
        if to_grant && grant.access == Access::ReadOnly {
            return CopyStatus::PERMISSION_DENIED;
        }
        let (offset, len) = (usize::from(piece.offset), usize::from(piece.len));
        let Some(page) = grant.page.address(offset, len) else {
            return CopyStatus::PERMISSION_DENIED;
        };
        let (from, to) = if to_grant { (own, page) } else { (page, own) };
        // SAFETY: By the type invariants of `Copies` our bytes are within a buffer, which is
        // writable if it is written to; `address` has checked those of the page. They do not
        // overlap: pages of grants are in no buffer of this mapping.
        unsafe { ptr::copy_nonoverlapping(from, to, len) };
        CopyStatus::OKAY
    }

    fn find(&self, domain: u16, reference: u32) -> Option<&Grant> {
        let grant = self.grants.get(&reference);
        grant.filter(|grant| grant.domain == domain)
    }

    /// Makes the memory larger. Returns it, and where the new pages are.
    fn allocate(&mut self, count: usize) -> io::Result<(File, usize)> {
        let len = memory::size(count)?;
        let memory = match &mut self.memory {
            Some(memory) => memory,
            empty => {
                let fd = rustix::fs::memfd_create("xen", MemfdFlags::CLOEXEC)?;
                empty.insert(Memory {
                    file: fd.into(),
                    len: 0,
                })
            }
        };
        let start = memory.len;
        memory.len = start.saturating_add(len);
        memory.file.set_len(memory.len as u64)?;
        Ok((memory.file.try_clone()?, start))
    }

    /// Returns the memory, and where the pages of references are.
    fn look_up(
        &self,
        domain: u16,
        references: &[u32],
        access: Access,
    ) -> io::Result<(File, Vec<usize>)> {
        let memory = self.memory.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let mut pages = Vec::new();
        for reference in references {
            match self.find(domain, *reference) {
                Some(grant) if access == Access::ReadOnly || grant.access == access => {
                    pages.push(grant.at);
                }
                _ => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok((memory.file.try_clone()?, pages))
    }
}

/// Maps granted pages, one behind the other.
pub(super) fn map(
    table: &Arc<Mutex<GrantTable>>,
    domain: u16,
    references: &[u32],
    access: Access,
) -> io::Result<Pages> {
    if references.len() > MAX_MAPPED {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (file, pages) = lock(table).look_up(domain, references, access)?;
    let first = pages.first().copied().ok_or(io::ErrorKind::InvalidInput)?;
    let count = pages.len();
    lock(table).mapped += count;
    let unmapped = table.clone();
    let unmapper = Unmapper::Fake(Box::new(move || lock(&unmapped).mapped -= count));
    let result = map_range(&file, first, count, access, Some(unmapper))?;
    for (index, at) in pages.iter().enumerate().skip(1) {
        result.replace_page(index, &file, *at)?;
    }
    Ok(result)
}

fn map_range(
    file: &File,
    at: usize,
    count: usize,
    access: Access,
    unmapper: Option<Unmapper>,
) -> io::Result<Pages> {
    let len = memory::size(count)?;
    let writable = access == Access::ReadWrite;
    // SAFETY: The kernel chooses an address where nothing is mapped.
    let start = unsafe {
        mm::mmap(
            ptr::null_mut(),
            len,
            protection(writable),
            MapFlags::SHARED,
            file,
            at as u64,
        )
    }?;
    // SAFETY: This was mapped just now, as `writable` says, and no one else has it. It is within
    // the file, or becomes so with pages that replace it: the file only grows.
    unsafe { Pages::from_raw(start, len, writable, unmapper) }
}

fn protection(writable: bool) -> ProtFlags {
    if writable {
        ProtFlags::READ | ProtFlags::WRITE
    } else {
        ProtFlags::READ
    }
}

impl Pages {
    /// Maps another page of the file in place of one of these.
    fn replace_page(&self, index: usize, file: &File, at: usize) -> io::Result<()> {
        let offset = memory::size(index)?;
        let address = self.address(offset, PAGE_SIZE);
        let address = address.ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        let protection = protection(self.is_writable());
        // SAFETY: The page is within this mapping, which is ours, and accessible before and after.
        unsafe {
            mm::mmap(
                address.cast(),
                PAGE_SIZE,
                protection,
                flags,
                file,
                at as u64,
            )
        }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Host;
    use crate::grant::Grants;
    use io_buffer::Buffer;

    #[test]
    fn mapped_pages_are_shared() {
        let host = Host::new();
        let (own, references) = host.grant(5, 3, Access::ReadWrite).unwrap();
        let order = [references[2], references[0]];
        let mapped = host.map(5, &order, Access::ReadWrite).unwrap();
        assert_eq!(host.mapped(), 2);
        own.store(0, 1);
        own.store(2 * 1024, 3);
        assert_eq!((mapped.load(0), mapped.load(1024)), (3, 1));
        mapped.store(1025, 7);
        assert_eq!(own.load(1), 7);
        drop(mapped);
        assert_eq!(host.mapped(), 0);
    }

    #[test]
    fn grants_are_of_one_domain_and_may_be_read_only() {
        let host = Host::new();
        let (own, references) = host.grant(5, 1, Access::ReadOnly).unwrap();
        assert!(host.map(6, &references, Access::ReadOnly).is_err());
        assert!(host.map(5, &references, Access::ReadWrite).is_err());
        assert!(host.map(5, &[1], Access::ReadOnly).is_err());
        let mapped = host.map(5, &references, Access::ReadOnly).unwrap();
        own.store(0, 4);
        mapped.store(0, 5);
        assert_eq!(mapped.load(0), 4);
        host.end_grants(&references);
        assert!(host.map(5, &references, Access::ReadOnly).is_err());
    }

    #[test]
    fn each_copy_has_its_status() {
        let host = Host::new();
        let (own, references) = host.grant(5, 1, Access::ReadOnly).unwrap();
        own.store(1, 9);
        let [mut first, second, mut third] = [(); 3].map(|()| Buffer::allocate(8, 8).unwrap());
        let pieces = |reference| {
            let piece = Piece {
                reference,
                offset: 4,
                len: 4,
            };
            [piece; 2].into_iter()
        };
        let mut copies = Copies::new(5, 6);
        let good = copies.fetch(&mut first, pieces(references[0])).unwrap();
        let denied = copies.store(&second, pieces(references[0])).unwrap();
        let bad = copies.fetch(&mut third, pieces(1)).unwrap();
        host.copy(&mut copies).unwrap();
        assert_eq!(copies.status(good), CopyStatus::OKAY);
        assert_eq!(copies.status(denied), CopyStatus::PERMISSION_DENIED);
        assert_eq!(copies.status(bad), CopyStatus::BAD_REFERENCE);
        let mut bytes = [1; 8];
        first.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [9, 0, 0, 0, 9, 0, 0, 0]);
    }
}
