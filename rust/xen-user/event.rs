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
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

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

/// Open files of the device.
type Files = Arc<Mutex<Vec<Arc<File>>>>;

/// The numbers of the `ioctl`s of an [`EventDevice`] after it was opened.
pub const REQUESTS: [libc::Ioctl; 3] = [BindInterdomain::REQUEST, Unbind::REQUEST, Notify::REQUEST];

/// The device `/dev/xen/evtchn`, opened once for each channel that can be bound at the same time.
///
/// It binds channels of one domain only, and needs no access to the file system after it was
/// opened.
pub struct EventDevice {
    /// Open files that no channel uses.
    unused: Files,
}

impl EventDevice {
    /// Path of the device.
    pub const PATH: &'static str = "/dev/xen/evtchn";

    /// Opens the device for up to `count` channels of a domain.
    pub fn open(domain: u16, count: usize) -> io::Result<Self> {
        let files = (0..count).map(|_| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(Self::PATH)?;
            restrict(&file, domain)?;
            Ok(Arc::new(file))
        });
        Ok(Self {
            unused: Arc::new(Mutex::new(files.collect::<io::Result<_>>()?)),
        })
    }
}

impl Events for EventDevice {
    fn bind(&self, domain: u16, port: u32) -> io::Result<Box<dyn Channel>> {
        let file = lock(&self.unused).pop();
        let file = file.ok_or(io::ErrorKind::ResourceBusy)?;
        let mut bind = BindInterdomain {
            domain: domain.into(),
            port,
        };
        // SAFETY: There are no pointers in the structure.
        match unsafe { ioctl::call(&file, &mut bind) } {
            Ok(port) => Ok(Box::new(BoundChannel {
                file,
                port,
                unused: self.unused.clone(),
            })),
            Err(error) => {
                lock(&self.unused).push(file);
                Err(error)
            }
        }
    }
}

/// Locks a list of files, which is valid at any time.
fn lock(files: &Mutex<Vec<Arc<File>>>) -> MutexGuard<'_, Vec<Arc<File>>> {
    files.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the device bind channels of one domain only.
fn restrict(file: &File, domain: u16) -> io::Result<()> {
    let mut restrict = RestrictDomain { domain };
    // SAFETY: There are no pointers in the structure.
    unsafe { ioctl::call(file, &mut restrict) }.map(|_| ())
}

struct BoundChannel {
    file: Arc<File>,
    /// Number of the port here.
    port: u32,
    /// Receives the file when the channel is closed.
    unused: Files,
}

impl Channel for BoundChannel {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn take(&mut self) -> io::Result<bool> {
        let mut port = [0; 4];
        let mut file = &*self.file;
        match file.read(&mut port) {
            Ok(4) => {
                // Events of the port are masked until it is written back.
                file.write_all(&port)?;
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

impl Drop for BoundChannel {
    fn drop(&mut self) {
        let mut unbind = Unbind { port: self.port };
        // SAFETY: There are no pointers in the structure.
        let unbound = unsafe { ioctl::call(&self.file, &mut unbind) };
        // It fails only for a port that is not bound, and a file whose port is bound is not used
        // again.
        if unbound.is_ok() {
            lock(&self.unused).push(self.file.clone());
        }
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

/// `struct ioctl_evtchn_unbind`.
#[repr(C)]
struct Unbind {
    port: u32,
}

// SAFETY: The kernel only reads the structure, which is its own.
unsafe impl Argument for Unbind {
    const REQUEST: libc::Ioctl = ioctl::request(b'E', 3, size_of::<Self>());
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
        assert_eq!(Unbind::REQUEST, 0x4_4503);
        assert_eq!(Notify::REQUEST, 0x4_4504);
        assert_eq!(REQUESTS, [0x8_4501, 0x4_4503, 0x4_4504]);
        assert_eq!(RestrictDomain::REQUEST, 0x2_4506);
    }
}
