// SPDX-License-Identifier: GPL-2.0-only

//! Confinement of QEMU's programs, which parse images with a format.
//!
//! `rblktap launch --user N --root DIR [--read PATH] [--write PATH] -- PROGRAM` runs a program that
//! sees the named files and directories, `/dev/null`, and the programs and libraries of the
//! system, and nothing else. The monitor starts `qemu-storage-daemon` and `qemu-img` with it. As in
//! [`crate::confine`], the layers do not depend on each other:
//!
//! | layer | effect |
//! |---|---|
//! | a user and a group of its own | no access to other processes |
//! | one capability, `CAP_DAC_OVERRIDE` | the files may belong to anyone |
//! | a mount namespace, and a root directory with the files | no other files, devices and sockets |
//! | network and IPC namespaces of its own | no network |
//! | `no_new_privs` | no privileges from programs |
//! | seccomp | only the system calls that such a program uses; the others fail with `ENOSYS` |
//! | a resource limit | no core files |

use crate::confine::limit;
use crate::confine::set_user;
use crate::confine::Error;
use crate::confine::Step;
use crate::filter;
use crate::filter::fail;
use crate::filter::install;
use crate::filter::masked;
use crate::filter::one_of;
use crate::filter::Rules;
use crate::root;
use clap::value_parser;
use clap::Arg;
use clap::ArgAction;
use clap::ArgMatches;
use nix::sched::unshare;
use nix::sched::CloneFlags;
use rustix::process::Pid;
use rustix::process::Resource;
use rustix::process::Signal;
use rustix::thread;
use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;
use seccompiler::BackendError;
use seccompiler::SeccompAction;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

/// The first argument of the program that asks for this.
pub const NAME: &str = "launch";

/// The search path for programs.
const PATH: &str = "/usr/bin:/bin";

/// System calls that are allowed with all arguments, beside those of all confined processes: those
/// with which `qemu-storage-daemon` and `qemu-img` open, serve, check and enlarge an image.
const SYSTEM_CALLS: &[libc::c_long] = &[
    // The start of a program.
    libc::SYS_execve,
    libc::SYS_arch_prctl,
    libc::SYS_set_tid_address,
    // Files.
    libc::SYS_openat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_newfstatat,
    libc::SYS_fstatfs,
    libc::SYS_readlink,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_unlink,
    // I/O.
    libc::SYS_fadvise64,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_io_destroy,
    // Sockets. `socket` is limited to those with a path.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    libc::SYS_signalfd4,
    // Threads, and the end of the process.
    libc::SYS_getppid,
    libc::SYS_getrusage,
];

/// The numbers of `ioctl`s: `BLKROGET`, `BLKSECTGET`, `BLKSSZGET`, `BLKPBSZGET`, `BLKGETSIZE64`,
/// `BLKDISCARD`, `BLKZEROOUT`, `XFS_IOC_DIOINFO`, `FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR` and
/// `FIONBIO`.
const REQUESTS: [u64; 11] = [
    0x125e,
    0x1267,
    0x1268,
    0x127b,
    0x8008_1272,
    0x1277,
    0x127f,
    0x800c_581e,
    0x801c_581f,
    0x401c_5820,
    libc::FIONBIO,
];

/// The commands of `fcntl`: descriptors, flags, and the locks of images and of the file with the
/// number of the process.
const COMMANDS: [libc::c_int; 8] = [
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_SETLK,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
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
    let parent = rustix::process::getppid();
    limit(Resource::Core, 0)?;
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).step("unshare")?;
    let user = matches.get_one("user").copied().unwrap_or(u32::MAX);
    let root = matches.get_one::<PathBuf>("root").cloned();
    let root = root.unwrap_or_default();
    let paths = |name| matches.get_many::<PathBuf>(name).into_iter().flatten();
    root::fill(&root, paths("read"), paths("write")).step("creating the root directory")?;
    root::enter(&root).step("chroot")?;
    keep_one_capability(user).step("setuid")?;
    thread::set_no_new_privs(true).step("no_new_privs")?;
    // Changing the user has ended the effect of an earlier call.
    end_with(parent).step("prctl")?;
    filter_system_calls()
}

/// Makes the kernel send `SIGTERM` when the parent ends, which waits for the program: that writes
/// its caches when it ends. The error is `ESRCH` if the parent has ended already.
fn end_with(parent: Option<Pid>) -> rustix::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
    match rustix::process::getppid() == parent {
        true => Ok(()),
        false => Err(rustix::io::Errno::SRCH),
    }
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

/// Allows the system calls of QEMU's programs. For any other the kernel says that it does not have
/// it, so that a library that tries a new one uses the one before it.
fn filter_system_calls() -> Result<(), Error> {
    let rules = rules().step("seccomp")?;
    install(rules, fail(libc::ENOSYS), SeccompAction::Allow).step("seccomp")
}

fn rules() -> Result<Rules, BackendError> {
    let mut rules = filter::common()?;
    rules.extend(filter::calls(SYSTEM_CALLS));
    rules.insert(libc::SYS_ioctl, one_of(1, REQUESTS)?);
    let commands = COMMANDS.map(i64::from).map(i64::unsigned_abs);
    rules.insert(libc::SYS_fcntl, one_of(1, commands)?);
    let options = [libc::PR_SET_NAME, libc::PR_SET_TIMERSLACK];
    let options = options.map(i64::from).map(i64::unsigned_abs);
    rules.insert(libc::SYS_prctl, one_of(0, options)?);
    let local = i64::from(libc::AF_UNIX).unsigned_abs();
    rules.insert(libc::SYS_socket, one_of(0, [local])?);
    // Reads a limit, and changes none.
    rules.insert(libc::SYS_prlimit64, masked(2, u64::MAX, 0)?);
    // Libraries are mapped as code.
    rules.insert(libc::SYS_mmap, filter::code_or_data(2)?);
    Ok(rules)
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::mount::mount;
    use nix::mount::MsFlags;
    use nix::sys::ptrace;
    use nix::unistd::Pid;
    use rustix::process::chroot;
    use rustix::process::setrlimit;
    use rustix::process::Rlimit;
    use std::fs;
    use std::io;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::os::unix::net::UnixStream;

    /// Returns what `call` returns in a thread with the filter.
    fn filtered<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
        let limited = move || {
            thread::set_no_new_privs(true).unwrap();
            filter_system_calls().unwrap();
            call()
        };
        std::thread::spawn(limited).join().unwrap()
    }

    #[test]
    fn images_and_sockets_can_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let (file, socket) = (dir.path().join("file"), dir.path().join("socket"));
        let path = socket.clone();
        let listener = filtered(move || {
            fs::write(&file, "data").unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "data");
            std::thread::spawn(|| ()).join().unwrap();
            UnixListener::bind(path).unwrap()
        });
        let client = UnixStream::connect(&socket).unwrap();
        let accept = move || listener.accept().map(drop);
        filtered(accept).unwrap();
        drop(client);
    }

    #[test]
    fn a_program_does_not_outlive_a_parent_that_has_ended() {
        let parent = rustix::process::getppid();
        let other = rustix::process::Pid::from_raw(i32::MAX);
        let end = move || (end_with(parent), end_with(other));
        let (of_parent, of_another) = std::thread::spawn(end).join().unwrap();
        assert_eq!(of_parent, Ok(()));
        assert_eq!(of_another, Err(rustix::io::Errno::SRCH));
    }

    #[test]
    fn other_system_calls_are_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let directory = dir.path().join("directory");
        let raw = |errno: Errno| io::Error::from(errno);
        let tried: Vec<(_, io::Result<()>)> = filtered(move || {
            let root = Some("/");
            let flags = CloneFlags::CLONE_NEWUSER;
            let limit = Rlimit {
                current: None,
                maximum: None,
            };
            vec![
                ("run a program", Command::new("/bin/true").spawn().map(drop)),
                ("connect", UnixStream::connect(path).map(drop)),
                ("listen", TcpListener::bind("127.0.0.1:0").map(drop)),
                ("create a directory", fs::create_dir(directory)),
                ("trace", ptrace::attach(Pid::parent()).map_err(raw)),
                ("change the root", chroot("/").map_err(io::Error::from)),
                (
                    "mount",
                    mount(root, "/", root, MsFlags::MS_BIND, root).map_err(raw),
                ),
                ("create a namespace", unshare(flags).map_err(raw)),
                (
                    "raise a limit",
                    setrlimit(Resource::Core, limit).map_err(io::Error::from),
                ),
            ]
        });
        for (what, result) in tried {
            let error = result.expect_err(what).raw_os_error();
            assert_eq!(error, Some(libc::ENOSYS), "{what}");
        }
    }
}
