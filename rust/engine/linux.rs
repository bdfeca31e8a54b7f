// SPDX-License-Identifier: GPL-2.0-only

//! Operations that no crate has a safe function for: open file description locks of byte ranges,
//! and processes that get a signal when the thread that started them ends.
//!
//! All unsafe code for fcntl(2) and prctl(2).

use rustix::io::Errno;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The kind of a lock.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LockKind {
    /// Several open file descriptions can hold it.
    Shared,
    /// One open file description can hold it.
    Exclusive,
}

/// Locks one byte of a file, without waiting.
///
/// The error is `EAGAIN` if another open file description has a lock that conflicts. The lock is
/// held until the open file description is closed, which includes I/O in flight.
pub(crate) fn lock_byte<Fd: AsFd>(file: Fd, byte: i64, kind: LockKind) -> Result<(), Errno> {
    let mut lock = description(byte, kind);
    fcntl(file, libc::F_OFD_SETLK, &mut lock)
}

/// Returns `true` if another open file description has a lock of the byte that conflicts.
pub(crate) fn is_locked<Fd: AsFd>(file: Fd, byte: i64, kind: LockKind) -> Result<bool, Errno> {
    let mut lock = description(byte, kind);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn description(byte: i64, kind: LockKind) -> libc::flock {
    // SAFETY: The structure has integers only, for which zero is a valid value.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    lock.l_type = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn fcntl<Fd: AsFd>(file: Fd, command: i32, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: Both commands take a pointer to a `flock` and only access that structure.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, lock) };
    if result < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

/// Makes the kernel send `SIGTERM` to the process that `command` starts when the calling thread
/// ends.
pub(crate) fn terminate_with_thread(command: &mut Command) {
    terminate_with(command, std::process::id());
}

/// Makes the kernel send `SIGTERM` when the thread of process `parent` ends. If it has ended
/// already, the command is not run.
fn terminate_with(command: &mut Command, parent: u32) {
    let set = move || {
        // SAFETY: The options have integers only, and this call changes no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: This call has no arguments.
        match u32::try_from(unsafe { libc::getppid() }) {
            Ok(found) if found == parent => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: Between fork and exec `set` only makes system calls.
    unsafe { command.pre_exec(set) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_does_not_outlive_one_that_has_ended() {
        let mut command = Command::new("true");
        terminate_with_thread(&mut command);
        assert!(command.status().unwrap().success());
        let mut command = Command::new("true");
        terminate_with(&mut command, u32::MAX);
        let error = command.status().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
