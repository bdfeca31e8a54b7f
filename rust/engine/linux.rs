// SPDX-License-Identifier: GPL-2.0-only

//! Open file description locks of byte ranges, and processes that get a signal when the thread that
//! started them ends.

use libc::flock;
use nix::fcntl::FcntlArg;
use rustix::io::Errno;
use rustix::process::{getppid, set_parent_process_death_signal, Pid, Signal};
use std::os::fd::AsFd;
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
    fcntl(file, FcntlArg::F_OFD_SETLK(&description(byte, kind)))
}

/// Returns `true` if another open file description has a lock of the byte that conflicts.
pub(crate) fn is_locked<Fd: AsFd>(file: Fd, byte: i64, kind: LockKind) -> Result<bool, Errno> {
    let mut lock = description(byte, kind);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn description(byte: i64, kind: LockKind) -> flock {
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn fcntl<Fd: AsFd>(file: Fd, argument: FcntlArg<'_>) -> Result<(), Errno> {
    let result = nix::fcntl::fcntl(file, argument);
    result.map_or_else(
        |errno| Err(Errno::from_raw_os_error(errno as i32)),
        |_| Ok(()),
    )
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
        set_parent_process_death_signal(Some(Signal::TERM))?;
        if u32::try_from(Pid::as_raw(getppid())) == Ok(parent) {
            return Ok(());
        }
        Err(Errno::SRCH.into())
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
