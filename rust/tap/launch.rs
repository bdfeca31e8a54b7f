// SPDX-License-Identifier: GPL-2.0-only

//! Confinement of QEMU's programs, which parse images with a format.
//!
//! `rblktap launch --user N --root DIR [--read PATH] [--write PATH] -- PROGRAM` runs a program that
//! sees the named files and directories, and the programs and libraries of the system, and nothing
//! else. The monitor starts `qemu-storage-daemon` and `qemu-img` with it. As in [`crate::confine`],
//! the layers do not depend on each other:
//!
//! | layer | effect |
//! |---|---|
//! | a user and a group of its own | no access to other processes |
//! | one capability, `CAP_DAC_OVERRIDE` | the files may belong to anyone |
//! | a mount namespace, and a root directory with the files | no other files, devices and sockets |
//! | network and IPC namespaces of its own | no network |
//! | `no_new_privs` | no privileges from programs |
//! | seccomp | none of the system calls that such a program never uses; these fail with `EPERM` |
//! | a resource limit | no core files |

use crate::confine::install;
use crate::confine::set_user;
use crate::confine::Error;
use crate::confine::Step;
use clap::value_parser;
use clap::Arg;
use clap::ArgAction;
use clap::ArgMatches;
use nix::mount::mount;
use nix::mount::MsFlags;
use nix::sched::unshare;
use nix::sched::CloneFlags;
use rustix::process::chdir;
use rustix::process::chroot;
use rustix::process::setrlimit;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::Signal;
use rustix::thread;
use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen::Qword;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompRule;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

/// The first argument of the program that asks for this.
pub const NAME: &str = "launch";

/// The directories with the programs and libraries of the system.
const SYSTEM: [&str; 4] = ["/usr", "/bin", "/lib", "/lib64"];

/// The search path for programs.
const PATH: &str = "/usr/bin:/bin";

/// System calls that a program that serves or checks an image does not use.
const DENIED: &[libc::c_long] = &[
    // The root directory and the namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_fork,
    libc::SYS_vfork,
    // Servers.
    libc::SYS_connect,
    // Interfaces of the kernel with a large surface.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
];

/// Returns the command that runs a program as `user`: `root` is an empty directory.
pub fn launcher(user: u32, root: &Path) -> Vec<OsString> {
    vec![
        "/proc/self/exe".into(),
        NAME.into(),
        "--user".into(),
        user.to_string().into(),
        "--root".into(),
        root.into(),
    ]
}

fn command() -> clap::Command {
    let path = |name: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("PATH")
            .value_parser(value_parser!(PathBuf))
    };
    clap::Command::new(NAME)
        .arg(
            Arg::new("user")
                .long("user")
                .required(true)
                .value_parser(value_parser!(u32).range(1..)),
        )
        .arg(path("root").required(true))
        .arg(path("read").action(ArgAction::Append))
        .arg(path("write").action(ArgAction::Append))
        .arg(
            Arg::new("program")
                .last(true)
                .required(true)
                .num_args(1..)
                .value_parser(value_parser!(OsString)),
        )
}

/// Confines this process and runs the program that the arguments, which begin with [`NAME`], ask
/// for. Returns only if that fails, with the reason.
///
/// Context: the process has no other thread, and is root.
pub fn run(arguments: impl Iterator<Item = OsString>) -> String {
    let matches = command().get_matches_from(arguments);
    match confine(&matches) {
        Ok(()) => execute(&matches),
        Err(error) => error.to_string(),
    }
}

fn confine(matches: &ArgMatches) -> Result<(), Error> {
    let (core, current) = (Resource::Core, Some(0));
    let maximum = current;
    setrlimit(core, Rlimit { current, maximum }).step("setrlimit")?;
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).step("unshare")?;
    let user = matches.get_one("user").copied().unwrap_or(u32::MAX);
    let root = matches.get_one::<PathBuf>("root").cloned();
    make_root(&root.unwrap_or_default(), matches).step("creating the root directory")?;
    keep_one_capability(user).step("setuid")?;
    thread::set_no_new_privs(true).step("no_new_privs")?;
    // Changing the user has ended the effect of an earlier call. The parent waits for the program,
    // which writes its caches when it ends.
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).step("prctl")?;
    deny_system_calls()
}

/// Fills the root directory, and makes it that of this process.
fn make_root(root: &Path, matches: &ArgMatches) -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let options = Some("size=1m,mode=755");
    mount(Some("tmpfs"), root, Some("tmpfs"), RESTRICTED, options)?;
    for path in SYSTEM.map(Path::new) {
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_symlink() => {
                symlink(fs::read_link(path)?, place(root, path)?)?;
            }
            Ok(_) => show(root, path, Some(RESTRICTED))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    for path in matches.get_many::<PathBuf>("read").into_iter().flatten() {
        show(root, path, Some(MsFlags::MS_NOSUID))?;
    }
    for path in matches.get_many::<PathBuf>("write").into_iter().flatten() {
        show(root, path, None)?;
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | RESTRICTED;
    mount(none, root, none, flags, none)?;
    chroot(root)?;
    Ok(chdir("/")?)
}

/// The flags of mounts without devices.
const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Returns the place of a path below the root directory.
fn place(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let path = path.strip_prefix("/").map_err(io::Error::other)?;
    Ok(root.join(path))
}

/// Shows a file or a directory below the root directory. With flags, nothing in it can be written.
fn show(root: &Path, path: &Path, read_only: Option<MsFlags>) -> io::Result<()> {
    let none = None::<&str>;
    let named = |error: io::Error| io::Error::other(format!("{}: {error}", path.display()));
    let target = place(root, path).map_err(named)?;
    if fs::metadata(path).map_err(named)?.is_dir() {
        fs::create_dir_all(&target).map_err(named)?;
    } else if !target.exists() {
        let parent = target.parent().unwrap_or(root);
        fs::create_dir_all(parent).map_err(named)?;
        File::create(&target).map_err(named)?;
    }
    let shown = mount(Some(path), &target, none, MsFlags::MS_BIND, none);
    shown.map_err(|error| named(error.into()))?;
    if let Some(flags) = read_only {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
        let limited = mount(none, &target, none, flags, none);
        limited.map_err(|error| named(error.into()))?;
    }
    Ok(())
}

/// Changes user and group, and keeps the capability to use files that belong to others.
fn keep_one_capability(user: u32) -> rustix::io::Result<()> {
    let kept = CapabilitySet::DAC_OVERRIDE;
    for capability in CapabilitySet::all().difference(kept).iter() {
        match thread::remove_capability_from_bounding_set(capability) {
            // The kernel does not know it.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    thread::set_keep_capabilities(true)?;
    set_user(user)?;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: kept,
    };
    thread::set_capabilities(None, sets)?;
    thread::configure_capability_in_ambient_set(kept, true)
}

fn deny_system_calls() -> Result<(), Error> {
    let mut rules: BTreeMap<_, _> = DENIED.iter().map(|call| (*call, vec![])).collect();
    // New processes; threads are allowed.
    let thread = libc::CLONE_THREAD.unsigned_abs().into();
    let operator = SeccompCmpOp::MaskedEq(thread);
    let rule = SeccompCondition::new(0, Qword, operator, 0)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .step("seccomp")?;
    rules.insert(libc::SYS_clone, vec![rule]);
    let errno = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    // Has glibc use clone, whose flags can be checked.
    let clone3 = [(libc::SYS_clone3, Vec::new())].into();
    install(clone3, SeccompAction::Allow, errno(libc::ENOSYS))?;
    install(rules, SeccompAction::Allow, errno(libc::EPERM))
}

/// Runs the program. Returns only if that fails.
fn execute(matches: &ArgMatches) -> String {
    let mut words = matches
        .get_many::<OsString>("program")
        .into_iter()
        .flatten();
    let program = words.next().cloned().unwrap_or_default();
    let error = Command::new(&program)
        .args(words)
        .env_clear()
        .env("PATH", PATH)
        .exec();
    format!("{} cannot be run: {error}", program.to_string_lossy())
}
