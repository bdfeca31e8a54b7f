// SPDX-License-Identifier: GPL-2.0-only

//! The memory that stores the data of the disk.

use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

use kernel_ext::{
    base::page::{
        Page,
        PageSliceMut, //
    },
    block::mq::{
        BlkStatus,
        Op,
        Operations,
        Request,
        State,
        SECTOR_SIZE, //
    },
};

/// The memory that stores the data of the disk.
pub(crate) struct Store {
    pages: KVVec<Page>,
}

impl Store {
    /// Allocates `mib` MiB of zeroes.
    pub(crate) fn new(mib: u32) -> Result<Self> {
        let count = (mib as usize)
            .checked_mul((1 << 20) / PAGE_SIZE)
            .ok_or(EINVAL)?;
        let mut pages = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            pages.push(Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?, GFP_KERNEL)?;
        }
        Ok(Self { pages })
    }

    /// Executes a request.
    pub(crate) fn execute<D: Operations, S: State>(&self, rq: &mut Request<D, S>) -> BlkStatus {
        // A flush has no position: its sector is all ones.
        let position = rq.sector().wrapping_mul(u64::from(SECTOR_SIZE));
        let result = match rq.op() {
            Op::Read => self.read(position, rq),
            Op::Write => self.write(position, rq),
            Op::Discard | Op::WriteZeroes => self.fill(position, rq.bytes() as usize, 0),
            Op::SecureErase => self.fill(position, rq.bytes() as usize, 0xff),
            // All memory is equally stable.
            Op::Flush => Some(()),
            Op::Other(_) => return BlkStatus::NOTSUPP,
        };
        match result {
            Some(()) => BlkStatus::OK,
            None => BlkStatus::IOERR,
        }
    }

    fn read<D: Operations, S: State>(
        &self,
        mut position: u64,
        rq: &mut Request<D, S>,
    ) -> Option<()> {
        for segment in rq.segments_mut() {
            let mut done = 0;
            while done < segment.len() {
                let here = self.slice(position, segment.len().saturating_sub(done))?;
                segment.get(done, here.len())?.copy_from(here.as_slice());
                done = done.wrapping_add(here.len());
                position = position.wrapping_add(here.len() as u64);
            }
        }
        Some(())
    }

    fn write<D: Operations, S: State>(&self, mut position: u64, rq: &Request<D, S>) -> Option<()> {
        for segment in rq.segments() {
            let mut done = 0;
            while done < segment.len() {
                let here = self.slice(position, segment.len().saturating_sub(done))?;
                here.copy_from(segment.get(done, here.len())?);
                done = done.wrapping_add(here.len());
                position = position.wrapping_add(here.len() as u64);
            }
        }
        Some(())
    }

    fn fill(&self, mut position: u64, mut len: usize, byte: u8) -> Option<()> {
        while len > 0 {
            let here = self.slice(position, len.min(SECTOR_SIZE as usize))?;
            here.write(&[byte; SECTOR_SIZE as usize]);
            len = len.saturating_sub(here.len());
            position = position.wrapping_add(here.len() as u64);
        }
        Some(())
    }

    /// Returns the bytes from `position` to the end of their page, but not more than `len`.
    fn slice(&self, position: u64, len: usize) -> Option<PageSliceMut<'_>> {
        let position = usize::try_from(position).ok()?;
        let offset = position % PAGE_SIZE;
        let page = self.pages.get(position / PAGE_SIZE)?;
        PageSliceMut::new(page, offset, len.min(PAGE_SIZE.saturating_sub(offset)))
    }
}
