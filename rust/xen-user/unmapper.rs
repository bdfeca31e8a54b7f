// SPDX-License-Identifier: GPL-2.0-only

//! The end of a mapping of granted pages.

use crate::ioctl;
use crate::ioctl::Argument;
use std::fs::File;
use std::sync::Arc;

/// Ends mappings of grants when it is dropped.
pub(crate) enum Unmapper {
    /// The device forgets them.
    Device {
        /// The device that has mapped the grants.
        device: Arc<File>,
        /// Offset of the first one in the device.
        index: u64,
        /// Number of pages.
        count: u32,
    },
    /// Counts for the fake.
    #[cfg(feature = "fake")]
    Fake(Box<dyn Fn() + Send + Sync>),
}

impl Drop for Unmapper {
    fn drop(&mut self) {
        match self {
            Unmapper::Device {
                device,
                index,
                count,
            } => {
                let mut unmap = UnmapGrants {
                    index: *index,
                    count: *count,
                    pad: 0,
                };
                // SAFETY: There are no pointers in the structure. The device refuses what it does
                // not know.
                let _ = unsafe { ioctl::call(device, &mut unmap) };
            }
            #[cfg(feature = "fake")]
            Unmapper::Fake(unmap) => unmap(),
        }
    }
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
pub(crate) struct UnmapGrants {
    index: u64,
    count: u32,
    pad: u32,
}

// SAFETY: The kernel only reads the structure, which is its own.
unsafe impl Argument for UnmapGrants {
    const REQUEST: libc::Ioctl = ioctl::request(b'G', 1, size_of::<Self>());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structure_is_that_of_the_header() {
        assert_eq!(UnmapGrants::REQUEST, 0x10_4701);
    }
}
