// SPDX-License-Identifier: GPL-2.0-only

//! libgfapi, loaded when the first file is opened.
//!
//! All unsafe code for this library. The functions are those of `glusterfs/api/glfs.h` of version 6
//! or later; an error is -1, with the error number in `errno`.

use crate::callback::Task;
use crate::error::{Error, Result};
use crate::request::Operation;
use libc::{c_char, c_int, c_void, iovec, mode_t, off_t, size_t, ssize_t};
use libloading::Library as Loaded;
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

/// A handle of the library: `glfs_t` or `glfs_fd_t`.
type Handle = *mut c_void;

/// A function that the library calls with file, result, state before, state after and argument.
type Callback = extern "C" fn(Handle, ssize_t, *mut c_void, *mut c_void, *mut c_void);

/// The file name of the library.
const LIBRARY: &str = "libgfapi.so.0";

/// `GF_LOG_CRITICAL`. Errors of requests have messages of their own.
const LOG_LEVEL: c_int = 3;

/// The greatest size of the description of a volume.
const MAX_VOLFILE: usize = 1 << 20;

/// Number of attempts to read the description of a volume, which may become longer meanwhile.
const DESCRIPTION_ATTEMPTS: u32 = 4;

/// The longest range of a discard or of write zeroes that is one operation.
const MAX_RANGE: u64 = 64 << 20;

macro_rules! functions {
    ($($name:ident($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of the library.
        ///
        /// # Invariants
        ///
        /// Each is the function of its name, which the library keeps while the process exists.
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn load() -> std::result::Result<Self, libloading::Error> {
                // SAFETY: The library's constructors have no requirements.
                let library = Box::leak(Box::new(unsafe { Loaded::new(LIBRARY) }?));
                // INVARIANT: The types are those of the header, and the library is never unloaded.
                Ok(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: The type is that of the header.
                        *unsafe { library.get(name) }?
                    },)*
                })
            }
        }
    };
}

functions! {
    glfs_new(*const c_char) -> Handle;
    glfs_set_volfile_server(Handle, *const c_char, *const c_char, c_int) -> c_int;
    glfs_set_logging(Handle, *const c_char, c_int) -> c_int;
    glfs_init(Handle) -> c_int;
    glfs_get_volfile(Handle, *mut c_void, size_t) -> ssize_t;
    glfs_mkdir(Handle, *const c_char, mode_t) -> c_int;
    glfs_unlink(Handle, *const c_char) -> c_int;
    glfs_opendir(Handle, *const c_char) -> Handle;
    glfs_readdir(Handle) -> *mut libc::dirent;
    glfs_closedir(Handle) -> c_int;
    glfs_creat(Handle, *const c_char, c_int, mode_t) -> Handle;
    glfs_open(Handle, *const c_char, c_int) -> Handle;
    glfs_close(Handle) -> c_int;
    glfs_fstat(Handle, *mut libc::stat) -> c_int;
    glfs_ftruncate(Handle, off_t, *mut c_void, *mut c_void) -> c_int;
    glfs_fallocate(Handle, c_int, off_t, size_t) -> c_int;
    glfs_fdatasync(Handle, *mut c_void, *mut c_void) -> c_int;
    glfs_fd_set_lkowner(Handle, *mut c_void, c_int) -> c_int;
    glfs_posix_lock(Handle, c_int, *mut libc::flock) -> c_int;
    glfs_preadv_async(Handle, *const iovec, c_int, off_t, c_int, Callback, *mut c_void) -> c_int;
    glfs_pwritev_async(Handle, *const iovec, c_int, off_t, c_int, Callback, *mut c_void) -> c_int;
    glfs_fdatasync_async(Handle, Callback, *mut c_void) -> c_int;
    glfs_discard_async(Handle, off_t, size_t, Callback, *mut c_void) -> c_int;
    glfs_zerofill_async(Handle, off_t, off_t, Callback, *mut c_void) -> c_int;
}

/// Returns the library's functions, which the first call loads.
fn functions() -> Result<&'static Functions> {
    static FUNCTIONS: OnceLock<std::result::Result<Functions, String>> = OnceLock::new();
    if cfg!(target_feature = "crt-static") {
        return Err(Error::new(
            Errno::NOSYS,
            "this program is linked statically, so it cannot load libgfapi",
            "use the one that make install-tap installs",
        ));
    }
    let loaded = FUNCTIONS.get_or_init(|| Functions::load().map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|error| {
        Error::new(
            Errno::NOENT,
            format!("loading libgfapi: {error}"),
            "install libgfapi0, version 6 or later",
        )
    })
}

/// Returns the error number that the library has left in this thread.
fn last_errno() -> Errno {
    match Errno::from_io_error(&io::Error::last_os_error()) {
        Some(errno) if errno.raw_os_error() != 0 => errno,
        _ => Errno::IO,
    }
}

/// Converts a result of a function: the error number, or a number that is not negative.
fn converted<T: PartialOrd + Default>(result: T) -> std::result::Result<T, Errno> {
    if result < T::default() {
        return Err(last_errno());
    }
    Ok(result)
}

/// Returns a text as the library takes it.
fn c_string(text: &str) -> std::result::Result<CString, Errno> {
    CString::new(text).map_err(|_| Errno::INVAL)
}

/// Returns an offset as the library takes it.
fn offset(bytes: u64) -> std::result::Result<off_t, Errno> {
    off_t::try_from(bytes).map_err(|_| Errno::FBIG)
}

/// A connection to a volume.
///
/// It is never ended: `glfs_fini` takes seconds, and crashes while bricks come and go.
///
/// # Invariants
///
/// `handle` was created by the library, and is not destroyed.
pub(super) struct Volume {
    functions: &'static Functions,
    handle: Handle,
}

// SAFETY: libgfapi allows calls with this handle from any thread at any time.
unsafe impl Send for Volume {}

// SAFETY: As for `Send`.
unsafe impl Sync for Volume {}

impl Volume {
    /// Creates a connection that is not established yet.
    pub(super) fn new(name: &str) -> Result<Self> {
        let functions = functions()?;
        let failed = |errno| Error::new(errno, "libgfapi fails to start", "free some memory");
        let name = c_string(name).map_err(failed)?;
        // SAFETY: The argument is a text.
        let handle = unsafe { (functions.glfs_new)(name.as_ptr()) };
        if handle.is_null() {
            return Err(failed(Errno::NOMEM));
        }
        // INVARIANT: It was just created.
        Ok(Self { functions, handle })
    }

    /// Connects to the volume that a host knows.
    pub(super) fn connect(&self, host: &str, port: u16) -> std::result::Result<(), Errno> {
        let host = c_string(host)?;
        // SAFETY: By the type invariants; the library copies the texts.
        converted(unsafe {
            (self.functions.glfs_set_volfile_server)(
                self.handle,
                c"tcp".as_ptr(),
                host.as_ptr(),
                port.into(),
            )
        })?;
        // SAFETY: As above.
        converted(unsafe {
            (self.functions.glfs_set_logging)(self.handle, c"/dev/stderr".as_ptr(), LOG_LEVEL)
        })?;
        // SAFETY: By the type invariants.
        converted(unsafe { (self.functions.glfs_init)(self.handle) })?;
        Ok(())
    }

    /// Returns the description of the volume.
    ///
    /// The library copies as many bytes as it is asked for, even beyond the end of the description:
    /// it is asked for the length first.
    pub(super) fn description(&self) -> std::result::Result<String, Errno> {
        let mut text = Vec::<u8>::new();
        for _ in 0..DESCRIPTION_ATTEMPTS {
            // SAFETY: By the type invariants; the library writes up to the length of the vector,
            // and this is none or the length of the description.
            let length = unsafe {
                (self.functions.glfs_get_volfile)(self.handle, text.as_mut_ptr().cast(), text.len())
            };
            if length >= 0 {
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            // The vector is too short, by this number of bytes.
            let missing = length.unsigned_abs();
            let length = text.len().saturating_add(missing).min(MAX_VOLFILE);
            text.clear();
            text.resize(length, 0);
        }
        Err(Errno::RANGE)
    }

    /// Creates a directory, unless there is one.
    pub(super) fn create_dir(&self, path: &str) -> std::result::Result<(), Errno> {
        let path = c_string(path)?;
        // SAFETY: By the type invariants.
        match converted(unsafe { (self.functions.glfs_mkdir)(self.handle, path.as_ptr(), 0o700) }) {
            Ok(_) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Lists the names in a directory.
    pub(super) fn list(&self, path: &str) -> std::result::Result<Vec<String>, Errno> {
        let path = c_string(path)?;
        // SAFETY: By the type invariants.
        let dir = unsafe { (self.functions.glfs_opendir)(self.handle, path.as_ptr()) };
        if dir.is_null() {
            return Err(last_errno());
        }
        let mut names = Vec::new();
        loop {
            // SAFETY: The directory is open.
            let entry = unsafe { (self.functions.glfs_readdir)(dir) };
            if entry.is_null() {
                break;
            }
            // SAFETY: It is an entry until the next call, and its name ends with a NUL.
            let name = unsafe { CStr::from_ptr((*entry).d_name.as_ptr()) };
            names.push(name.to_string_lossy().into_owned());
        }
        // SAFETY: The directory is open, and not used after this.
        converted(unsafe { (self.functions.glfs_closedir)(dir) })?;
        Ok(names)
    }

    /// Removes a file.
    pub(super) fn remove(&self, path: &str) -> std::result::Result<(), Errno> {
        let path = c_string(path)?;
        // SAFETY: By the type invariants.
        converted(unsafe { (self.functions.glfs_unlink)(self.handle, path.as_ptr()) })?;
        Ok(())
    }
}

/// An open file.
///
/// # Invariants
///
/// `handle` is open, and belongs to `volume`.
pub(super) struct File {
    volume: &'static Volume,
    handle: Handle,
}

// SAFETY: libgfapi allows calls with this handle from any thread at any time.
unsafe impl Send for File {}

// SAFETY: As for `Send`.
unsafe impl Sync for File {}

impl File {
    /// Opens a file.
    pub(super) fn open(
        volume: &'static Volume,
        path: &str,
        read_only: bool,
    ) -> std::result::Result<Self, Errno> {
        let path = c_string(path)?;
        let flags = if read_only {
            libc::O_RDONLY
        } else {
            libc::O_RDWR
        };
        // SAFETY: By the type invariants of `volume`.
        let handle = unsafe { (volume.functions.glfs_open)(volume.handle, path.as_ptr(), flags) };
        Self::opened(volume, handle)
    }

    /// Creates a file. The error is `EEXIST` if there is one.
    pub(super) fn create(volume: &'static Volume, path: &str) -> std::result::Result<Self, Errno> {
        let path = c_string(path)?;
        let flags = libc::O_RDWR | libc::O_EXCL;
        // SAFETY: By the type invariants of `volume`.
        let handle =
            unsafe { (volume.functions.glfs_creat)(volume.handle, path.as_ptr(), flags, 0o600) };
        Self::opened(volume, handle)
    }

    fn opened(volume: &'static Volume, handle: Handle) -> std::result::Result<Self, Errno> {
        if handle.is_null() {
            return Err(last_errno());
        }
        // INVARIANT: It was just opened.
        Ok(Self { volume, handle })
    }

    /// Returns the size in bytes.
    ///
    /// `glfs_lseek` would return the offset of the handle, which requests in flight change.
    pub(super) fn size(&self) -> std::result::Result<u64, Errno> {
        // SAFETY: The structure has integers only, for which zero is a valid value.
        let mut stat: libc::stat = unsafe { mem::zeroed() };
        // SAFETY: By the type invariants; the library only writes that structure.
        converted(unsafe { (self.volume.functions.glfs_fstat)(self.handle, &mut stat) })?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Changes the size.
    pub(super) fn resize(&self, size: u64) -> std::result::Result<(), Errno> {
        let size = offset(size)?;
        let null = ptr::null_mut();
        // SAFETY: By the type invariants; both states may be null.
        converted(unsafe {
            (self.volume.functions.glfs_ftruncate)(self.handle, size, null, null)
        })?;
        Ok(())
    }

    /// Enlarges the file. A larger one stays as it is.
    pub(super) fn enlarge(&self, size: u64) -> std::result::Result<(), Errno> {
        let keeps_size = 0;
        let Some(last) = size.checked_sub(1) else {
            return Ok(());
        };
        // SAFETY: By the type invariants.
        converted(unsafe {
            (self.volume.functions.glfs_fallocate)(self.handle, keeps_size, offset(last)?, 1)
        })?;
        Ok(())
    }

    /// Makes all completed writes durable.
    pub(super) fn sync(&self) -> std::result::Result<(), Errno> {
        let null = ptr::null_mut();
        // SAFETY: By the type invariants; both states may be null.
        converted(unsafe { (self.volume.functions.glfs_fdatasync)(self.handle, null, null) })?;
        Ok(())
    }

    /// Locks the file against other writers, without waiting.
    ///
    /// A connection has one owner of locks, unless each file has an owner of its own.
    pub(super) fn lock(&self) -> std::result::Result<(), Errno> {
        static OWNER: AtomicU64 = AtomicU64::new(1);
        let mut owner = OWNER.fetch_add(1, Ordering::Relaxed).to_ne_bytes();
        // SAFETY: By the type invariants; the library copies the 8 bytes.
        converted(unsafe {
            (self.volume.functions.glfs_fd_set_lkowner)(self.handle, owner.as_mut_ptr().cast(), 8)
        })?;
        // SAFETY: The structure has integers only, for which zero is a valid value.
        let mut lock: libc::flock = unsafe { mem::zeroed() };
        lock.l_type = libc::F_WRLCK as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        // SAFETY: By the type invariants; the library only accesses that structure.
        converted(unsafe {
            (self.volume.functions.glfs_posix_lock)(self.handle, libc::F_SETLK, &mut lock)
        })?;
        Ok(())
    }

    /// Starts a request.
    ///
    /// The file must not be closed before it completes.
    pub(super) fn start(&self, mut task: Task) {
        let vectors = task.vectors();
        Box::new(Call {
            functions: self.volume.functions,
            file: self.handle,
            vectors,
            done: 0,
            step: Step::Data,
            task,
        })
        .start();
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, and no request is in flight, see `start`.
        unsafe { (self.volume.functions.glfs_close)(self.handle) };
    }
}

/// The operation of a request that is in flight.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Step {
    /// The operation of the request itself.
    Data,
    /// The data is written, and is made durable.
    Sync,
}

/// A request that libgfapi works on.
///
/// # Invariants
///
/// `file` is open until the request completes.
struct Call {
    functions: &'static Functions,
    file: Handle,
    /// The memory of the buffers of the task.
    vectors: Vec<iovec>,
    /// The bytes of a discard or of write zeroes that are done.
    done: u64,
    step: Step,
    task: Task,
}

impl Call {
    /// Starts the next operation of the request.
    fn start(self: Box<Self>) {
        let this = Box::into_raw(self);
        // SAFETY: It was made by `into_raw`, and `completed` is not called before `submit` is.
        if let Err(errno) = unsafe { Self::submit(this) } {
            // SAFETY: It was made by `into_raw`, and the library does not call `completed` then.
            unsafe { Box::from_raw(this) }.complete(Err(errno));
        }
    }

    /// Calls the library's function.
    ///
    /// # Safety
    ///
    /// `this` points to a call. It may be gone after this if the result is no error.
    unsafe fn submit(this: *mut Self) -> std::result::Result<(), Errno> {
        // SAFETY: It points to a call, by the requirements of this function.
        let call = unsafe { &*this };
        let (functions, file, step) = (call.functions, call.file, call.step);
        let request = &call.task.request;
        let operation = request.operation;
        let start = offset(request.offset.saturating_add(call.done))?;
        let range = request.length.saturating_sub(call.done).min(MAX_RANGE);
        let length = offset(range)?;
        let bytes = size_t::try_from(range).map_err(|_| Errno::INVAL)?;
        let vectors = call.vectors.as_ptr();
        let count = c_int::try_from(call.vectors.len()).map_err(|_| Errno::INVAL)?;
        let call = this.cast();
        // SAFETY: By the type invariants the file is open. The memory exists until `completed` is
        // called, since the call owns it, and the library copies the vectors. `call` is not used
        // after this.
        converted(unsafe {
            match (step, operation) {
                (Step::Sync, _) | (_, Operation::Flush) => {
                    (functions.glfs_fdatasync_async)(file, completed, call)
                }
                (_, Operation::Read) => {
                    (functions.glfs_preadv_async)(file, vectors, count, start, 0, completed, call)
                }
                (_, Operation::Write { .. }) => {
                    (functions.glfs_pwritev_async)(file, vectors, count, start, 0, completed, call)
                }
                (_, Operation::Discard) => {
                    (functions.glfs_discard_async)(file, start, bytes, completed, call)
                }
                (_, Operation::WriteZeroes { .. }) => {
                    (functions.glfs_zerofill_async)(file, start, length, completed, call)
                }
            }
        })?;
        Ok(())
    }

    /// Continues after an operation, with the next one or with the completion.
    fn finish(mut self: Box<Self>, result: std::result::Result<u64, Errno>) {
        let count = match result {
            Ok(count) => count,
            Err(errno) => return self.complete(Err(errno)),
        };
        let length = self.task.request.length;
        match (self.step, self.task.request.operation) {
            (Step::Data, Operation::Read | Operation::Write { .. }) if count != length => {
                self.complete(Err(Errno::IO));
            }
            (Step::Data, Operation::Write { fua: true }) => {
                self.step = Step::Sync;
                self.start();
            }
            (Step::Data, Operation::Discard | Operation::WriteZeroes { .. }) => {
                self.done = self.done.saturating_add(MAX_RANGE);
                if self.done < length {
                    self.start();
                } else {
                    self.complete(Ok(()));
                }
            }
            _ => self.complete(Ok(())),
        }
    }

    fn complete(self, result: std::result::Result<(), Errno>) {
        let request = &self.task.request;
        let is_flush = self.step == Step::Sync || request.operation == Operation::Flush;
        let result = result.map_err(|errno| super::io_error(errno, request, is_flush));
        self.task.complete(result);
    }
}

/// Called by libgfapi, in a thread of its own, when an operation has completed.
extern "C" fn completed(
    _file: Handle,
    result: ssize_t,
    _before: *mut c_void,
    _after: *mut c_void,
    argument: *mut c_void,
) {
    // First, before anything changes `errno`.
    let result = converted(result).map(|count| u64::try_from(count).unwrap_or(0));
    // SAFETY: `Call::start` has made it by `into_raw`, and the library calls this once.
    let call: Box<Call> = unsafe { Box::from_raw(argument.cast()) };
    call.finish(result);
}
