// SPDX-License-Identifier: GPL-2.0

//! The disk behind a device: what a hotplug script has put at `physical-device`.

use blkif::request::DiskLimits;
use blkif::wire::info;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;
use kernel_ext::block::bdev::Access;
use kernel_ext::block::bdev::BlockDevice;
use kernel_ext::block::bdev::DeviceNumber;
use kernel_ext::block::bdev::Discard;

/// Segments that an indirect request may have (`MAX_INDIRECT_SEGMENTS` of the C backend).
pub(crate) const MAX_INDIRECT_SEGMENTS: u16 = 256;

/// Segments that any request may have.
pub(crate) const MAX_SEGMENTS: usize = MAX_INDIRECT_SEGMENTS as usize;

/// An open disk, as it is offered to a frontend.
pub(crate) struct Disk {
    pub(crate) number: DeviceNumber,
    /// The node `mode`.
    pub(crate) mode: CString,
    pub(crate) device: Arc<BlockDevice>,
    /// Discard as it is offered; none if the toolstack forbids it.
    pub(crate) discard: Option<Discard>,
    block_size: u32,
}

impl Disk {
    /// Opens a disk. `discard`: the toolstack does not forbid it.
    pub(crate) fn open(
        number: DeviceNumber,
        access: Access,
        mode: CString,
        discard: bool,
    ) -> Result<Self> {
        let device = BlockDevice::open(number, access)?;
        // Requests go beside the page cache.
        device.sync_and_forget_cache()?;
        let discard = device
            .discard()
            .filter(|_| discard && access == Access::ReadWrite);
        let block_size = device.logical_block_size();
        Ok(Self {
            number,
            mode,
            device,
            discard,
            block_size,
        })
    }

    /// Writes are refused.
    pub(crate) fn read_only(&self) -> bool {
        self.device.access() == Access::ReadOnly || self.device.read_only()
    }

    /// What requests are checked against. The size is that of now.
    #[inline]
    pub(crate) fn limits(&self) -> DiskLimits {
        DiskLimits {
            sectors: self.device.sectors(),
            block_size: self.block_size,
            read_only: self.device.access() == Access::ReadOnly,
            discard: self.discard.is_some(),
            secure_discard: self.discard.is_some_and(|discard| discard.secure),
            indirect_segments: MAX_INDIRECT_SEGMENTS,
        }
    }

    /// The node `info`.
    pub(crate) fn info(&self, cdrom: bool) -> u32 {
        let flag = |flag, set| if set { flag } else { 0 };
        flag(info::CDROM, cdrom || self.device.is_cdrom())
            | flag(info::REMOVABLE, self.device.is_removable())
            | flag(info::READONLY, self.read_only())
    }
}
