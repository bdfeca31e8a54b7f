// SPDX-License-Identifier: GPL-2.0-only

//! Filters of system calls (seccomp), for the processes that are confined.

use seccompiler::apply_filter;
use seccompiler::apply_filter_all_threads;
use seccompiler::BackendError;
use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpArgLen::Qword;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use std::collections::BTreeMap;

/// System calls that every confined process needs, and that are allowed with all arguments.
const COMMON: &[libc::c_long] = &[
    // I/O on open files.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_close,
    // Sockets that exist.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Threads, and the end of the process.
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// System calls, each with the conditions of which one has to hold. Without conditions it matches
/// with all arguments.
pub(crate) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Returns rules that match these system calls with all arguments.
pub(crate) fn calls(calls: &[libc::c_long]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Returns the rules for what every confined process needs. It can start threads and no processes,
/// and cannot make memory executable.
pub(crate) fn common() -> Result<Rules, BackendError> {
    let mut rules = calls(COMMON);
    // For abort.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, one_of(0, [own])?);
    let thread = libc::CLONE_THREAD.unsigned_abs().into();
    rules.insert(libc::SYS_clone, masked(0, thread, thread)?);
    let executable = libc::PROT_EXEC.unsigned_abs().into();
    rules.insert(libc::SYS_mprotect, masked(2, executable, 0)?);
    Ok(rules)
}

/// Returns conditions that hold for these values of an argument of 32 bits.
pub(crate) fn one_of(
    argument: u8,
    values: impl IntoIterator<Item = u64>,
) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value| condition(argument, Dword, SeccompCmpOp::Eq, value);
    values.into_iter().map(rule).collect()
}

/// Returns a condition that holds if the bits of `mask` in an argument have this value.
pub(crate) fn masked(
    argument: u8,
    mask: u64,
    value: u64,
) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = condition(argument, Qword, SeccompCmpOp::MaskedEq(mask), value)?;
    Ok(vec![rule])
}

/// Returns conditions that hold unless an argument, the protection of a mapping, allows both to
/// write and to execute it.
pub(crate) fn code_or_data(argument: u8) -> Result<Vec<SeccompRule>, BackendError> {
    let mut rules = masked(argument, libc::PROT_EXEC.unsigned_abs().into(), 0)?;
    rules.extend(masked(argument, libc::PROT_WRITE.unsigned_abs().into(), 0)?);
    Ok(rules)
}

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(argument, length, operator, value)?;
    SeccompRule::new(vec![condition])
}

/// Applies a filter to the calling thread and all that it starts: `action` for the system calls
/// that match, and `otherwise` for the others.
pub(crate) fn install(
    rules: Rules,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<(), seccompiler::Error> {
    apply_filter(&compile(rules, otherwise, action)?)
}

/// Applies a filter to all threads of this process: the system calls that do not match fail as if
/// the kernel did not have them.
pub(crate) fn install_in_all_threads(rules: Rules) -> Result<(), seccompiler::Error> {
    let program = compile(rules, fail(libc::ENOSYS), SeccompAction::Allow)?;
    apply_filter_all_threads(&program)
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram, seccompiler::Error> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, otherwise, action, arch)?.try_into()?)
}

/// Returns the action that lets a system call fail.
pub(crate) fn fail(errno: i32) -> SeccompAction {
    SeccompAction::Errno(errno.unsigned_abs())
}
