// SPDX-License-Identifier: GPL-2.0-only

//! Confinement of the process that serves a guest.
//!
//! The process keeps what it has opened: the image or a connection to its server,
//! `/dev/xen/gntdev`, `/dev/xen/evtchn` restricted to the guest, the control socket, the NBD
//! socket, the in-flight table, the statistics, its messages, and a socket to its
//! [`monitor`](crate::monitor). Everything else is taken away, in layers that do not depend on each
//! other:
//!
//! | layer | effect |
//! |---|---|
//! | a user and a group of its own, no capabilities | no access to other processes |
//! | an empty root directory | no files, devices and sockets, also for requests of io_uring |
//! | a network namespace of its own | no network, also for requests of io_uring |
//! | `no_new_privs` | no privileges from programs |
//! | seccomp | only the system calls that serving a disk takes; the others fail with `EPERM` |
//! | resource limits | a bounded number of descriptors, no core files |
//!
//! One limit is lifted, that of locked memory, which io_uring applies to the buffers that are
//! registered with it. Their number is limited by the pages that a disk may use.

use crate::filter;
use crate::filter::fail;
use crate::filter::install;
use crate::filter::masked;
use crate::filter::one_of;
use crate::filter::Rules;
use crate::root;
use nix::sched::unshare;
use nix::sched::CloneFlags;
use rustix::process::setrlimit;
use rustix::process::DumpableBehavior;
use rustix::process::Gid;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::Signal;
use rustix::process::Uid;
use rustix::thread;
use seccompiler::BackendError;
use seccompiler::SeccompAction;
use std::fmt;
use std::fs;
use std::path::Path;
use xen_user::event;
use xen_user::grant;

/// Descriptors that a process may have.
const MAX_DESCRIPTORS: u64 = 256;

/// The numbers of `ioctl`s of files and block devices: `BLKDISCARD`, `BLKZEROOUT` and `FIONBIO`.
const FILE_REQUESTS: [libc::Ioctl; 3] = [0x1277, 0x127f, libc::FIONBIO];

/// System calls of I/O on files and devices.
const IO_URING: &[libc::c_long] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// System calls that are allowed with all arguments, beside those of all confined processes.
const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_epoll_pwait2, libc::SYS_clone3];

/// Why a process cannot be confined.
#[derive(Debug)]
pub enum Error {
    /// The step that has failed, and why.
    Step(&'static str, String),
    /// The number of its threads, of which only one would be confined.
    Threads(usize),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the process cannot be confined: ")?;
        match self {
            Self::Step(step, why) => write!(
                f,
                "{step}: {why}; use a kernel with seccomp and network namespaces"
            ),
            Self::Threads(count) => write!(
                f,
                "it has {count} threads; this is an error of the program, report it"
            ),
        }
    }
}

impl std::error::Error for Error {}

/// Says which step of the confinement an error is from.
pub(crate) trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, Error>;
}

impl<T, E: fmt::Display> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Step(step, error.to_string()))
    }
}

/// Confines the process, whose only thread is the calling one, as [`confine_thread`] does.
pub fn confine(user: u32, root: &Path) -> Result<(), Error> {
    let threads = fs::read_dir("/proc/self/task").step("reading /proc/self/task")?;
    match threads.count() {
        1 => confine_thread(user, root),
        count => Err(Error::Threads(count)),
    }
}

/// Confines the calling thread and all that it starts.
///
/// `user` becomes the number of its user and its group, and `root`, an empty directory, its root.
/// It is killed when the thread that has started its process ends.
///
/// Context: the process is root. Other threads are not confined.
pub fn confine_thread(user: u32, root: &Path) -> Result<(), Error> {
    limit_resources()?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC).step("unshare")?;
    root::enter(root).step("chroot")?;
    set_user(user).step("setuid")?;
    forbid_privileges()?;
    filter_system_calls()
}

/// Forbids new privileges and a look at the memory, and has the process killed when the thread that
/// has started it ends: changing the user has ended the effect of an earlier call.
pub(crate) fn forbid_privileges() -> Result<(), Error> {
    thread::set_no_new_privs(true).step("no_new_privs")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("dumpable")?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("prctl")
}

fn limit_resources() -> Result<(), Error> {
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, MAX_DESCRIPTORS)?;
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    // Without it, I/O works, and costs more.
    let _ = setrlimit(Resource::Memlock, unlimited);
    Ok(())
}

/// Limits a resource for good.
pub(crate) fn limit(resource: Resource, limit: u64) -> Result<(), Error> {
    let limits = Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    setrlimit(resource, limits).step("setrlimit")
}

/// Changes user and group of the calling thread, which drops all capabilities.
pub(crate) fn set_user(user: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    thread::set_thread_groups(&[])?;
    thread::set_thread_res_gid(gid, gid, gid)?;
    thread::set_thread_res_uid(uid, uid, uid)
}

fn filter_system_calls() -> Result<(), Error> {
    // Has glibc use clone, whose flags can be checked.
    let clone3 = filter::calls(&[libc::SYS_clone3]);
    install(clone3, SeccompAction::Allow, fail(libc::ENOSYS)).step("seccomp")?;
    let mut rules = rules().step("seccomp")?;
    rules.extend(filter::calls(IO_URING));
    let executable = libc::PROT_EXEC.unsigned_abs().into();
    rules.insert(libc::SYS_mmap, masked(2, executable, 0).step("seccomp")?);
    install(rules, fail(libc::EPERM), SeccompAction::Allow).step("seccomp")
}

/// Returns the rules for every process that serves a guest, without memory that it maps.
pub(crate) fn rules() -> Result<Rules, BackendError> {
    let mut rules = filter::common()?;
    rules.extend(filter::calls(SYSTEM_CALLS));
    let requests = event::REQUESTS.iter().chain(&grant::REQUESTS);
    rules.insert(
        libc::SYS_ioctl,
        one_of(1, requests.chain(&FILE_REQUESTS).copied())?,
    );
    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
    ];
    rules.insert(
        libc::SYS_fcntl,
        one_of(1, commands.map(i64::from).map(i64::unsigned_abs))?,
    );
    rules.insert(libc::SYS_prctl, one_of(0, [libc::PR_SET_NAME as u64])?);
    Ok(rules)
}
