// SPDX-License-Identifier: GPL-2.0-only

//! Confinement of a process that serves an image of Ceph.
//!
//! Its library connects to other daemons as the cluster changes, and has threads of its own. So
//! such a process keeps more than one that is confined by [`crate::confine`]:
//!
//! | layer | effect |
//! |---|---|
//! | a user and a group of its own, no capabilities | no access to other processes |
//! | a root directory with the system's libraries, and the files for host names | no other files, devices and sockets with a path |
//! | `no_new_privs` | no privileges from programs |
//! | seccomp | only the system calls of serving a disk and of network connections |
//! | a resource limit | no core files |
//!
//! It has the network of the host, the connections to the cluster, and in its memory the key of the
//! client. The library reads its configuration and the key when the image is opened, before that.

use crate::confine::forbid_privileges;
use crate::confine::limit;
use crate::confine::rules;
use crate::confine::Error;
use crate::confine::Step;
use crate::filter;
use crate::filter::one_of;
use crate::filter::Rules;
use crate::root;
use nix::sched::unshare;
use nix::sched::CloneFlags;
use nix::unistd::setgroups;
use nix::unistd::setresgid;
use nix::unistd::setresuid;
use nix::unistd::Gid;
use nix::unistd::Uid;
use rustix::process::Resource;
use seccompiler::BackendError;
use std::path::Path;
use std::path::PathBuf;

/// The files with which the C library finds the addresses of hosts.
const NAMES: [&str; 6] = [
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/services",
];

/// System calls that are allowed with all arguments, beside those of every server: connections,
/// the files for host names, and libraries that are loaded late.
const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_sendmmsg,
    libc::SYS_openat,
    libc::SYS_access,
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_getdents64,
    // The file with the owner of an image of Ceph, which is not found: the monitor removes it.
    libc::SYS_unlink,
    libc::SYS_uname,
    libc::SYS_getrusage,
    libc::SYS_getppid,
];

/// Gives the process a root directory, which it does not use yet.
///
/// Context: the process has no other thread, and is root.
pub fn prepare(root: &Path) -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC).step("unshare")?;
    let names = NAMES.map(PathBuf::from);
    let names = names.iter().filter(|path| path.exists());
    root::fill(root, names, []).step("creating the root directory")
}

/// Confines all threads of the process, for which [`prepare`] was called.
///
/// `user` becomes the number of its user and its group. It is killed when the thread that has
/// started it ends.
pub fn confine(user: u32, root: &Path) -> Result<(), Error> {
    limit(Resource::Core, 0)?;
    root::enter(root).step("chroot")?;
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    // These functions of the C library change all threads.
    setgroups(&[]).step("setgroups")?;
    setresgid(gid, gid, gid).step("setgid")?;
    setresuid(uid, uid, uid).step("setuid")?;
    forbid_privileges()?;
    let rules = cluster_rules().step("seccomp")?;
    filter::install_in_all_threads(rules).step("seccomp")
}

fn cluster_rules() -> Result<Rules, BackendError> {
    let mut rules: Rules = rules()?;
    rules.extend(filter::calls(SYSTEM_CALLS));
    // Has glibc use clone, whose flags can be checked.
    rules.remove(&libc::SYS_clone3);
    let domains = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let domains = domains.map(i64::from).map(i64::unsigned_abs);
    rules.insert(libc::SYS_socket, one_of(0, domains)?);
    rules.insert(libc::SYS_mmap, filter::code_or_data(2)?);
    Ok(rules)
}
