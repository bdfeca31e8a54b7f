// SPDX-License-Identifier: GPL-2.0-only

//! Kernel threads that run a closure.
//!
//! The closure gets a [`Current`] and returns when [`Current::should_stop`] says so. Stopping has
//! two steps, so that several threads can be stopped at once and no caller waits forever:
//! [`KThread::stop`] requests it, [`KThread::join`] waits with a deadline. If the thread is still
//! busy then, the [`KThread`] can be dropped: the thread owns its data and a reference to the
//! module, and frees both when it ends.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use kernel::{
    bindings,
    error::from_err_ptr,
    ffi,
    fmt,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    task::Task,
    time::Jiffies,
    types::NotThreadSafe, //
};

use super::{
    module_ref::ModuleRef,
    wait::WaitQueue, //
};

/// Data shared by a thread and its [`KThread`].
#[pin_data]
struct Shared {
    /// `true` if the thread was asked to stop.
    stop: Atomic<bool>,
    /// `true` if the closure has returned and was dropped.
    done: Atomic<bool>,
    #[pin]
    wait: WaitQueue,
}

/// Options of a thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct KThreadOptions {
    /// `true` if the thread is frozen on suspend, in [`WaitQueue::wait_idle`] and
    /// [`Current::try_to_freeze`]; other threads keep running.
    pub freezable: bool,
}

/// The argument of a new thread.
struct Start<F> {
    main: F,
    options: KThreadOptions,
    shared: Arc<Shared>,
    module: ModuleRef,
}

/// The running thread, as its closure sees it.
///
/// # Invariants
///
/// The current task is the kernel thread that this was created for; this is not `Send`.
pub struct Current {
    shared: Arc<Shared>,
    _not_send: NotThreadSafe,
}

impl Current {
    /// Returns `true` if the closure should return.
    ///
    /// It can be part of a condition to wait for: the thread is woken when the value changes.
    #[inline]
    pub fn should_stop(&self) -> bool {
        self.shared.stop.load(Relaxed)
    }

    /// Allows other tasks to run, in loops that may run for a long time.
    #[inline]
    pub fn cond_resched(&self) {
        // SAFETY: A thread that runs a closure may sleep; a closure that holds a spinlock here has
        // a bug that lockdep reports, without effect on memory safety.
        unsafe { bindings_ext::cond_resched() };
    }

    /// Freezes the thread if it has to be frozen now. For loops that may run for a long time
    /// without sleeping.
    #[inline]
    pub fn try_to_freeze(&self) {
        // SAFETY: As in `cond_resched`.
        unsafe { bindings_ext::try_to_freeze() };
    }
}

/// A kernel thread.
///
/// Dropping it asks the thread to stop and does not wait.
pub struct KThread {
    task: ARef<Task>,
    shared: Arc<Shared>,
}

impl KThread {
    /// Starts a thread that runs `main`.
    ///
    /// `name` is the name in `ps`; the kernel truncates it for other uses.
    pub fn spawn<F>(name: fmt::Arguments<'_>, options: KThreadOptions, main: F) -> Result<Self>
    where
        F: FnOnce(&Current) + Send + 'static,
    {
        let name = CString::try_from_fmt(name)?;
        let shared = Arc::pin_init(
            pin_init!(Shared {
                stop: Atomic::new(false),
                done: Atomic::new(false),
                wait <- crate::new_wait_queue!(),
            }),
            GFP_KERNEL,
        )?;
        let start = Start {
            main,
            options,
            shared: shared.clone(),
            module: ModuleRef::new()?,
        };
        let start = KBox::into_raw(KBox::new(start, GFP_KERNEL)?);

        // SAFETY: `run` takes over `start`, once; the format takes one string. The thread is never
        // stopped by `kthread_stop`, so it runs once it is woken.
        let task = unsafe {
            bindings::kthread_create_on_node(
                Some(run::<F>),
                start.cast(),
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        };
        let task = match from_err_ptr(task) {
            Ok(task) => task,
            Err(error) => {
                // SAFETY: There is no thread, so `start` is still ours.
                drop(unsafe { KBox::from_raw(start) });
                return Err(error);
            }
        };
        // SAFETY: The task is valid until the thread ends, and that has not started yet. `Task` is
        // a transparent wrapper.
        let task: ARef<Task> = unsafe { &*task.cast::<Task>() }.into();
        task.wake_up();
        Ok(Self { task, shared })
    }

    /// Asks the thread to stop, and does not wait.
    pub fn stop(&self) {
        self.shared.stop.store(true, Release);
        self.task.wake_up();
    }

    /// Waits until the closure has returned and all its data is dropped.
    ///
    /// Returns `false` if the thread still runs after `timeout`.
    #[must_use = "the thread may still run"]
    pub fn join(&self, timeout: Jiffies) -> bool {
        self.shared
            .wait
            .wait_timeout(timeout, || self.shared.done.load(Acquire))
    }
}

impl Drop for KThread {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs the closure of a thread.
///
/// # Safety
///
/// `start` comes from `KBox::<Start<F>>::into_raw`, and the caller passes its ownership.
unsafe extern "C" fn run<F: FnOnce(&Current)>(start: *mut ffi::c_void) -> ffi::c_int {
    // SAFETY: By the requirements of this function.
    let start = unsafe { KBox::from_raw(start.cast::<Start<F>>()) };
    let Start {
        main,
        options,
        shared,
        module,
    } = KBox::into_inner(start);
    if options.freezable {
        // SAFETY: Only touches the current task.
        unsafe { bindings::set_freezable() };
    }
    // INVARIANT: This is the thread.
    let current = Current {
        shared: shared.clone(),
        _not_send: NotThreadSafe,
    };
    main(&current);
    drop(current);
    shared.done.store(true, Release);
    shared.wait.wake_up();
    drop(shared);
    // SAFETY: This is the first function of a kernel thread, and all its data was dropped.
    unsafe { module.put_and_exit_thread() }
}
