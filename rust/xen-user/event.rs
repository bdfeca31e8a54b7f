// SPDX-License-Identifier: GPL-2.0-only

//! Event channels: `/dev/xen/evtchn`, `include/uapi/xen/evtchn.h`.
//!
//! Each channel has a descriptor of its own, which is readable after the other side has notified.
//! [`Channel::take`] is called before one looks for what the notification was about, so that none
//! is lost.

use crate::ioctl;
use crate::ioctl::Argument;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;

/// Binds event channels of other domains.
pub trait Events: Send + Sync {
    /// Binds an event channel that a domain has allocated for this one. It is closed when the
    /// result is dropped.
    fn bind(&self, domain: u16, port: u32) -> io::Result<Box<dyn Channel>>;
}

/// An event channel that is bound.
pub trait Channel: Send {
    /// Returns the descriptor that is readable when a notification has come.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes the notifications that have come. Returns `true` if there were any. Does not wait.
    fn take(&mut self) -> io::Result<bool>;

    /// Notifies the other side.
    fn notify(&self) -> io::Result<()>;
}

/// The device `/dev/xen/evtchn`, opened once for each channel.
pub struct EventDevice;

impl EventDevice {
    /// Path of the device.
    pub const PATH: &'static str = "/dev/xen/evtchn";
}

impl Events for EventDevice {
    fn bind(&self, domain: u16, port: u32) -> io::Result<Box<dyn Channel>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(Self::PATH)?;
        restrict(&file, domain)?;
        let mut bind = BindInterdomain {
            domain: domain.into(),
            port,
        };
        // SAFETY: There are no pointers in the structure.
        let port = unsafe { ioctl::call(&file, &mut bind) }?;
        Ok(Box::new(BoundChannel { file, port }))
    }
}

/// Has the device bind channels of one domain only.
fn restrict(file: &File, domain: u16) -> io::Result<()> {
    let mut restrict = RestrictDomain { domain };
    // SAFETY: There are no pointers in the structure.
    unsafe { ioctl::call(file, &mut restrict) }.map(|_| ())
}

struct BoundChannel {
    file: File,
    /// Number of the port here.
    port: u32,
}

impl Channel for BoundChannel {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn take(&mut self) -> io::Result<bool> {
        let mut port = [0; 4];
        match self.file.read(&mut port) {
            Ok(4) => {
                // Events of the port are masked until it is written back.
                self.file.write_all(&port)?;
                Ok(true)
            }
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn notify(&self) -> io::Result<()> {
        let mut notify = Notify { port: self.port };
        // SAFETY: There are no pointers in the structure.
        unsafe { ioctl::call(&self.file, &mut notify) }.map(|_| ())
    }
}

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
struct BindInterdomain {
    domain: u32,
    port: u32,
}

// SAFETY: The kernel only reads the structure, which is its own.
unsafe impl Argument for BindInterdomain {
    const REQUEST: libc::Ioctl = ioctl::request(b'E', 1, size_of::<Self>());
}

/// `struct ioctl_evtchn_notify`.
#[repr(C)]
struct Notify {
    port: u32,
}

// SAFETY: The kernel only reads the structure, which is its own.
unsafe impl Argument for Notify {
    const REQUEST: libc::Ioctl = ioctl::request(b'E', 4, size_of::<Self>());
}

/// `struct ioctl_evtchn_restrict_domid`.
#[repr(C)]
struct RestrictDomain {
    domain: u16,
}

// SAFETY: The kernel only reads the structure, which is its own.
unsafe impl Argument for RestrictDomain {
    const REQUEST: libc::Ioctl = ioctl::request(b'E', 6, size_of::<Self>());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(BindInterdomain::REQUEST, 0x8_4501);
        assert_eq!(Notify::REQUEST, 0x4_4504);
        assert_eq!(RestrictDomain::REQUEST, 0x2_4506);
    }
}
