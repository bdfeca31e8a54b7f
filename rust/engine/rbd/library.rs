// SPDX-License-Identifier: GPL-2.0-only

//! librados and librbd, loaded when the first image is opened.
//!
//! All unsafe code for these libraries. The functions are those of `rados/librados.h` and
//! `rbd/librbd.h`; their errors are negative error numbers.

use crate::callback::Task;
use crate::error::{Error, Result};
use crate::request::Operation;
use libc::{c_char, c_int, c_void, iovec, size_t, ssize_t};
use libloading::Library as Loaded;
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::ptr;
use std::sync::{Arc, OnceLock};

/// A handle of a library: `rados_t`, `rados_ioctx_t`, `rbd_image_t` or `rbd_completion_t`.
type Handle = *mut c_void;

type Callback = extern "C" fn(Handle, *mut c_void);

/// `librbd_progress_fn_t`.
type Progress = extern "C" fn(u64, u64, *mut c_void) -> c_int;

/// `rbd_snap_info_t`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SnapshotInfo {
    id: u64,
    size: u64,
    name: *const c_char,
}

/// `LIBRADOS_OP_FLAG`s of a request: none.
const NO_FLAGS: c_int = 0;
/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`.
const THICK_PROVISION: c_int = 1;
/// `RBD_LOCK_MODE_EXCLUSIVE`.
const LOCK_EXCLUSIVE: c_int = 0;
/// `RBD_FEATURE_LAYERING`, `_EXCLUSIVE_LOCK`, `_OBJECT_MAP`, `_FAST_DIFF` and `_DEEP_FLATTEN`: what
/// `rbd create` uses.
const FEATURES: u64 = 0x3d;
/// `RBD_IMAGE_OPTION_FEATURES`.
const OPTION_FEATURES: c_int = 1;

/// The greatest length of a value of metadata that is read.
const MAX_METADATA: usize = 4096;

/// The number of snapshots for which there is room at first.
const SNAPSHOTS: usize = 64;

/// The longest range of a discard or of write zeroes that is one operation.
const MAX_RANGE: u64 = 1 << 30;

macro_rules! functions {
    ($($library:ident: { $($name:ident($($argument:ty),*) -> $result:ty;)* })*) => {
        /// The functions of both libraries.
        ///
        /// # Invariants
        ///
        /// Each is the function of its name, which the libraries keep while the process exists.
        struct Functions {
            $($($name: unsafe extern "C" fn($($argument),*) -> $result,)*)*
        }

        impl Functions {
            fn load() -> std::result::Result<Self, libloading::Error> {
                $(
                    // SAFETY: The library's constructors have no requirements.
                    let $library = Box::leak(Box::new(unsafe { Loaded::new(soname::$library) }?));
                )*
                // INVARIANT: The types are those of the headers, and no library is ever unloaded.
                Ok(Self {
                    $($($name: {
                        let name = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: The type is that of the header.
                        *unsafe { $library.get(name) }?
                    },)*)*
                })
            }
        }
    };
}

/// The file names of the libraries.
#[allow(non_upper_case_globals)]
mod soname {
    pub(super) const librados: &str = "librados.so.2";
    pub(super) const librbd: &str = "librbd.so.1";
}

functions! {
    librados: {
        rados_create(*mut Handle, *const c_char) -> c_int;
        rados_conf_read_file(Handle, *const c_char) -> c_int;
        rados_conf_set(Handle, *const c_char, *const c_char) -> c_int;
        rados_connect(Handle) -> c_int;
        rados_shutdown(Handle) -> ();
        rados_blocklist_add(Handle, *mut c_char, u32) -> c_int;
        rados_ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
        rados_ioctx_set_namespace(Handle, *const c_char) -> ();
        rados_ioctx_destroy(Handle) -> ();
    }
    librbd: {
        rbd_open(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_open_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_close(Handle) -> c_int;
        rbd_list(Handle, *mut c_char, *mut size_t) -> c_int;
        rbd_image_options_create(*mut Handle) -> ();
        rbd_image_options_set_uint64(Handle, c_int, u64) -> c_int;
        rbd_image_options_destroy(Handle) -> ();
        rbd_create4(Handle, *const c_char, u64, Handle) -> c_int;
        rbd_clone3(Handle, *const c_char, *const c_char, Handle, *const c_char, Handle) -> c_int;
        rbd_remove(Handle, *const c_char) -> c_int;
        rbd_resize2(Handle, u64, bool, Progress, *mut c_void) -> c_int;
        rbd_get_size(Handle, *mut u64) -> c_int;
        rbd_metadata_get(Handle, *const c_char, *mut c_char, *mut size_t) -> c_int;
        rbd_pool_metadata_get(Handle, *const c_char, *mut c_char, *mut size_t) -> c_int;
        rbd_snap_list(Handle, *mut SnapshotInfo, *mut c_int) -> c_int;
        rbd_snap_list_end(*mut SnapshotInfo) -> ();
        rbd_snap_create(Handle, *const c_char) -> c_int;
        rbd_snap_remove(Handle, *const c_char) -> c_int;
        rbd_snap_protect(Handle, *const c_char) -> c_int;
        rbd_snap_unprotect(Handle, *const c_char) -> c_int;
        rbd_lock_acquire(Handle, c_int) -> c_int;
        rbd_lock_get_owners(Handle, *mut c_int, *mut *mut c_char, *mut size_t) -> c_int;
        rbd_lock_get_owners_cleanup(*mut *mut c_char, size_t) -> ();
        rbd_lock_break(Handle, c_int, *const c_char) -> c_int;
        rbd_flush(Handle) -> c_int;
        rbd_aio_create_completion(*mut c_void, Callback, *mut Handle) -> c_int;
        rbd_aio_get_return_value(Handle) -> ssize_t;
        rbd_aio_release(Handle) -> ();
        rbd_aio_readv(Handle, *const iovec, c_int, u64, Handle) -> c_int;
        rbd_aio_writev(Handle, *const iovec, c_int, u64, Handle) -> c_int;
        rbd_aio_discard(Handle, u64, u64, Handle) -> c_int;
        rbd_aio_write_zeroes(Handle, u64, size_t, Handle, c_int, c_int) -> c_int;
        rbd_aio_flush(Handle, Handle) -> c_int;
    }
}

/// Returns the libraries' functions, which the first call loads.
fn functions() -> Result<&'static Functions> {
    static FUNCTIONS: OnceLock<std::result::Result<Functions, String>> = OnceLock::new();
    if cfg!(target_feature = "crt-static") {
        return Err(Error::new(
            Errno::NOSYS,
            "this program is linked statically, so it cannot load librbd",
            "use the one that make install-tap installs",
        ));
    }
    let loaded = FUNCTIONS.get_or_init(|| Functions::load().map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|error| {
        Error::new(
            Errno::NOENT,
            format!("loading librbd: {error}"),
            "install librbd1, version 16 or later",
        )
    })
}

/// Converts a result of a function: the error number, or a number that is not negative.
fn converted(result: c_int) -> std::result::Result<c_int, Errno> {
    match result {
        0.. => Ok(result),
        _ => Err(Errno::from_raw_os_error(result.saturating_neg())),
    }
}

/// Returns a text as the libraries take it.
fn c_string(text: &str) -> std::result::Result<CString, Errno> {
    CString::new(text).map_err(|_| Errno::INVAL)
}

/// Reads a value of metadata with `get`, which is called with a text and with memory for the value,
/// of the length that the last argument has and changes.
fn read_metadata(
    key: &str,
    get: impl FnOnce(*const c_char, *mut c_char, *mut size_t) -> c_int,
) -> std::result::Result<Option<String>, Errno> {
    let key = c_string(key)?;
    let mut value = vec![0u8; MAX_METADATA];
    let mut length = value.len();
    match converted(get(key.as_ptr(), value.as_mut_ptr().cast(), &mut length)) {
        Ok(_) => {
            let end = value.iter().position(|byte| *byte == 0);
            value.truncate(end.unwrap_or(0));
            Ok(Some(String::from_utf8_lossy(&value).into_owned()))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// A connection to a pool of a cluster.
///
/// # Invariants
///
/// `cluster` is connected, and `ioctx` belongs to it.
pub(super) struct Pool {
    functions: &'static Functions,
    cluster: Handle,
    ioctx: Handle,
}

// SAFETY: librados allows calls with these handles from any thread at any time.
unsafe impl Send for Pool {}

// SAFETY: As for `Send`.
unsafe impl Sync for Pool {}

/// The step of a connection that has failed.
pub(super) enum ConnectError {
    /// The library cannot be used.
    Library(Error),
    /// The configuration cannot be read.
    Configuration(Errno),
    /// The cluster does not accept the connection.
    Cluster(Errno),
    /// The pool cannot be opened.
    Pool(Errno),
}

impl Pool {
    /// Connects to a pool as the client `id`, by the configuration file `conf` and by `settings`.
    pub(super) fn connect(
        id: Option<&str>,
        conf: Option<&str>,
        settings: &[(&str, &str)],
        pool: &str,
        namespace: &str,
    ) -> std::result::Result<Self, ConnectError> {
        let functions = functions().map_err(ConnectError::Library)?;
        let id = id.map(c_string).transpose();
        let id = id.map_err(ConnectError::Configuration)?;
        let id = id.as_ref().map_or(ptr::null(), |id| id.as_ptr());
        let mut cluster = ptr::null_mut();
        // SAFETY: The first argument is where the handle is written; the id may be null.
        converted(unsafe { (functions.rados_create)(&mut cluster, id) })
            .map_err(ConnectError::Configuration)?;
        // If a later step fails, it is dropped, perhaps without an `ioctx`.
        let mut this = Self {
            functions,
            cluster,
            ioctx: ptr::null_mut(),
        };
        this.configure(conf, settings)
            .map_err(ConnectError::Configuration)?;
        // SAFETY: The handle was created above and is configured.
        converted(unsafe { (functions.rados_connect)(cluster) }).map_err(ConnectError::Cluster)?;
        let name = c_string(pool).map_err(ConnectError::Pool)?;
        let mut ioctx = ptr::null_mut();
        // SAFETY: The cluster is connected.
        converted(unsafe { (functions.rados_ioctx_create)(cluster, name.as_ptr(), &mut ioctx) })
            .map_err(ConnectError::Pool)?;
        // INVARIANT: The cluster is connected, and the context was just created for it.
        this.ioctx = ioctx;
        let namespace = c_string(namespace).map_err(ConnectError::Pool)?;
        // SAFETY: By the type invariants.
        unsafe { (functions.rados_ioctx_set_namespace)(ioctx, namespace.as_ptr()) };
        Ok(this)
    }

    fn configure(
        &self,
        conf: Option<&str>,
        settings: &[(&str, &str)],
    ) -> std::result::Result<(), Errno> {
        let conf = conf.map(c_string).transpose()?;
        let conf = conf.as_ref().map_or(ptr::null(), |conf| conf.as_ptr());
        // SAFETY: The handle exists; without a path the library uses its own list of paths.
        converted(unsafe { (self.functions.rados_conf_read_file)(self.cluster, conf) })?;
        for (key, value) in settings {
            let (key, value) = (c_string(key)?, c_string(value)?);
            // SAFETY: The handle exists, and the library copies the texts.
            converted(unsafe {
                (self.functions.rados_conf_set)(self.cluster, key.as_ptr(), value.as_ptr())
            })?;
        }
        Ok(())
    }

    /// Has the storage daemons refuse the client with an address for some time.
    pub(super) fn refuse_client(
        &self,
        address: &str,
        seconds: u32,
    ) -> std::result::Result<(), Errno> {
        let address = c_string(address)?;
        // SAFETY: By the type invariants; the library only reads the text.
        converted(unsafe {
            let address = address.as_ptr().cast_mut();
            (self.functions.rados_blocklist_add)(self.cluster, address, seconds)
        })?;
        Ok(())
    }

    /// Lists the names of the images.
    pub(super) fn list(&self) -> std::result::Result<Vec<String>, Errno> {
        let mut names = vec![0u8; 1 << 16];
        loop {
            let mut size = names.len();
            // SAFETY: By the type invariants; the library writes up to `size` bytes.
            let result = converted(unsafe {
                (self.functions.rbd_list)(self.ioctx, names.as_mut_ptr().cast(), &mut size)
            });
            match result {
                Ok(count) => {
                    names.truncate(usize::try_from(count).unwrap_or(0));
                    break;
                }
                Err(Errno::RANGE) if size > names.len() => names.resize(size, 0),
                Err(errno) => return Err(errno),
            }
        }
        let names = names
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty());
        Ok(names
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect())
    }

    /// Creates an image.
    pub(super) fn create(&self, name: &str, size: u64) -> std::result::Result<(), Errno> {
        let name = c_string(name)?;
        let options = ImageOptions::new(self.functions)?;
        // SAFETY: By the type invariants of both.
        converted(unsafe {
            (self.functions.rbd_create4)(self.ioctx, name.as_ptr(), size, options.handle)
        })?;
        Ok(())
    }

    /// Creates an image with the contents of a protected snapshot in the same pool.
    pub(super) fn clone_image(
        &self,
        parent: &str,
        snapshot: &str,
        name: &str,
    ) -> std::result::Result<(), Errno> {
        let (parent, snapshot, name) = (c_string(parent)?, c_string(snapshot)?, c_string(name)?);
        let options = ImageOptions::new(self.functions)?;
        // SAFETY: By the type invariants of both.
        converted(unsafe {
            (self.functions.rbd_clone3)(
                self.ioctx,
                parent.as_ptr(),
                snapshot.as_ptr(),
                self.ioctx,
                name.as_ptr(),
                options.handle,
            )
        })?;
        Ok(())
    }

    /// Removes an image without snapshots.
    pub(super) fn remove(&self, name: &str) -> std::result::Result<(), Errno> {
        let name = c_string(name)?;
        // SAFETY: By the type invariants.
        converted(unsafe { (self.functions.rbd_remove)(self.ioctx, name.as_ptr()) })?;
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.ioctx.is_null() {
            // SAFETY: It was created, and by `RbdImage`'s ownership of the pool no image uses it.
            unsafe { (self.functions.rados_ioctx_destroy)(self.ioctx) };
        }
        // SAFETY: It was created, and is not used after this.
        unsafe { (self.functions.rados_shutdown)(self.cluster) };
    }
}

/// The options of a new image.
///
/// # Invariants
///
/// `handle` was created by the library and not destroyed.
struct ImageOptions {
    functions: &'static Functions,
    handle: Handle,
}

impl ImageOptions {
    fn new(functions: &'static Functions) -> std::result::Result<Self, Errno> {
        let mut handle = ptr::null_mut();
        // SAFETY: The argument is where the handle is written.
        unsafe { (functions.rbd_image_options_create)(&mut handle) };
        // INVARIANT: It was just created.
        let this = Self { functions, handle };
        // SAFETY: By the type invariants.
        converted(unsafe {
            (functions.rbd_image_options_set_uint64)(handle, OPTION_FEATURES, FEATURES)
        })?;
        Ok(this)
    }
}

impl Drop for ImageOptions {
    fn drop(&mut self) {
        // SAFETY: By the type invariants; it is not used after this.
        unsafe { (self.functions.rbd_image_options_destroy)(self.handle) };
    }
}

/// An open image.
///
/// # Invariants
///
/// `handle` is open, and belongs to `pool`.
pub(super) struct RbdImage {
    pool: Arc<Pool>,
    handle: Handle,
}

// SAFETY: librbd allows calls with this handle from any thread at any time.
unsafe impl Send for RbdImage {}

// SAFETY: As for `Send`.
unsafe impl Sync for RbdImage {}

impl RbdImage {
    /// Opens an image, or a snapshot of it, which can be read only.
    pub(super) fn open(
        pool: Arc<Pool>,
        name: &str,
        snapshot: Option<&str>,
        read_only: bool,
    ) -> std::result::Result<Self, Errno> {
        let name = c_string(name)?;
        let snapshot = snapshot.map(c_string).transpose()?;
        let snapshot = snapshot.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        let mut handle = ptr::null_mut();
        let open = if read_only {
            pool.functions.rbd_open_read_only
        } else {
            pool.functions.rbd_open
        };
        // SAFETY: By the type invariants of `pool`; the snapshot may be null.
        converted(unsafe { open(pool.ioctx, name.as_ptr(), &mut handle, snapshot) })?;
        // INVARIANT: It was just opened.
        Ok(Self { pool, handle })
    }

    /// Returns the size in bytes.
    pub(super) fn size(&self) -> std::result::Result<u64, Errno> {
        let mut size = 0;
        // SAFETY: By the type invariants.
        converted(unsafe { (self.pool.functions.rbd_get_size)(self.handle, &mut size) })?;
        Ok(size)
    }

    /// Returns a value of the image's metadata, if there is one.
    pub(super) fn metadata(&self, key: &str) -> std::result::Result<Option<String>, Errno> {
        read_metadata(key, |key, value, length| {
            // SAFETY: By the type invariants and the requirements of `read_metadata`.
            unsafe { (self.pool.functions.rbd_metadata_get)(self.handle, key, value, length) }
        })
    }

    /// Returns a value of the metadata of the image's pool, if there is one.
    pub(super) fn pool_metadata(&self, key: &str) -> std::result::Result<Option<String>, Errno> {
        let ioctx = self.pool.ioctx;
        read_metadata(key, |key, value, length| {
            // SAFETY: As above, by the type invariants of the pool.
            unsafe { (self.pool.functions.rbd_pool_metadata_get)(ioctx, key, value, length) }
        })
    }

    /// Enlarges the image. The error is `EINVAL` if it is larger.
    pub(super) fn enlarge(&self, size: u64) -> std::result::Result<(), Errno> {
        let may_shrink = false;
        // SAFETY: By the type invariants; `progress` takes any argument.
        converted(unsafe {
            (self.pool.functions.rbd_resize2)(
                self.handle,
                size,
                may_shrink,
                progress,
                ptr::null_mut(),
            )
        })?;
        Ok(())
    }

    /// Waits until all completed writes are durable.
    pub(super) fn flush(&self) -> std::result::Result<(), Errno> {
        // SAFETY: By the type invariants.
        converted(unsafe { (self.pool.functions.rbd_flush)(self.handle) })?;
        Ok(())
    }

    /// Lists the names of the snapshots.
    pub(super) fn snapshots(&self) -> std::result::Result<Vec<String>, Errno> {
        let functions = self.pool.functions;
        let empty = SnapshotInfo {
            id: 0,
            size: 0,
            name: ptr::null(),
        };
        let mut infos = vec![empty; SNAPSHOTS];
        loop {
            let mut room = c_int::try_from(infos.len()).map_err(|_| Errno::RANGE)?;
            // SAFETY: By the type invariants; the library writes up to `room` elements.
            let result = converted(unsafe {
                (functions.rbd_snap_list)(self.handle, infos.as_mut_ptr(), &mut room)
            });
            match result {
                Ok(count) => {
                    infos.truncate(usize::try_from(count).unwrap_or(0));
                    break;
                }
                Err(Errno::RANGE) => {
                    let room = usize::try_from(room).unwrap_or(0);
                    infos.resize(room.max(infos.len().saturating_mul(2)), empty);
                }
                Err(errno) => return Err(errno),
            }
        }
        let name = |info: &SnapshotInfo| {
            // SAFETY: The library has written a text for each element that is left.
            let name = unsafe { CStr::from_ptr(info.name) };
            name.to_string_lossy().into_owned()
        };
        let names = infos.iter().map(name).collect();
        if !infos.is_empty() {
            infos.push(empty);
            // SAFETY: It frees the texts up to the first element without one, which was just added.
            unsafe { (functions.rbd_snap_list_end)(infos.as_mut_ptr()) };
        }
        Ok(names)
    }

    /// Creates a snapshot, and protects it so that it can be cloned.
    pub(super) fn create_snapshot(&self, name: &str) -> std::result::Result<(), Errno> {
        let name = c_string(name)?;
        let functions = self.pool.functions;
        // SAFETY: By the type invariants.
        match converted(unsafe { (functions.rbd_snap_create)(self.handle, name.as_ptr()) }) {
            Ok(_) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        // SAFETY: By the type invariants.
        match converted(unsafe { (functions.rbd_snap_protect)(self.handle, name.as_ptr()) }) {
            Ok(_) | Err(Errno::BUSY) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Removes a snapshot.
    ///
    /// The error is `EBUSY` if there is a clone of it.
    pub(super) fn remove_snapshot(&self, name: &str) -> std::result::Result<(), Errno> {
        let name = c_string(name)?;
        let functions = self.pool.functions;
        // SAFETY: By the type invariants.
        match converted(unsafe { (functions.rbd_snap_unprotect)(self.handle, name.as_ptr()) }) {
            Ok(_) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        // SAFETY: By the type invariants.
        match converted(unsafe { (functions.rbd_snap_remove)(self.handle, name.as_ptr()) }) {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Acquires the exclusive lock, and no longer passes it on to a client that asks for it.
    pub(super) fn acquire_lock(&self) -> std::result::Result<(), Errno> {
        // SAFETY: By the type invariants.
        converted(unsafe { (self.pool.functions.rbd_lock_acquire)(self.handle, LOCK_EXCLUSIVE) })?;
        Ok(())
    }

    /// Returns the address of the client that has the exclusive lock, if there is one.
    pub(super) fn lock_owner(&self) -> std::result::Result<Option<String>, Errno> {
        let functions = self.pool.functions;
        let mut mode = 0;
        let mut owners = [ptr::null_mut(); 8];
        let mut count = owners.len();
        // SAFETY: By the type invariants; the library writes up to `count` pointers.
        let result = converted(unsafe {
            (functions.rbd_lock_get_owners)(self.handle, &mut mode, owners.as_mut_ptr(), &mut count)
        });
        match result {
            Ok(_) => {}
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno),
        }
        let owner = owners.first().filter(|_| count > 0).map(|owner| {
            // SAFETY: The library has written `count` texts.
            unsafe { CStr::from_ptr(*owner) }
                .to_string_lossy()
                .into_owned()
        });
        // SAFETY: The library has written `count` texts, which are not used after this.
        unsafe { (functions.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count) };
        Ok(owner)
    }

    /// Breaks the exclusive lock of a client, which the storage daemons no longer accept then.
    pub(super) fn break_lock(&self, owner: &str) -> std::result::Result<(), Errno> {
        let owner = c_string(owner)?;
        // SAFETY: By the type invariants.
        converted(unsafe {
            (self.pool.functions.rbd_lock_break)(self.handle, LOCK_EXCLUSIVE, owner.as_ptr())
        })?;
        Ok(())
    }

    /// Starts a request.
    ///
    /// The image must not be closed before it completes.
    pub(super) fn start(&self, mut task: Task) {
        let vectors = task.vectors();
        Box::new(Call {
            functions: self.pool.functions,
            image: self.handle,
            vectors,
            done: 0,
            task,
        })
        .start();
    }
}

impl Drop for RbdImage {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, and no request is in flight, see `start`.
        unsafe { (self.pool.functions.rbd_close)(self.handle) };
    }
}

/// A request that librbd works on.
///
/// # Invariants
///
/// `image` is open until the request completes.
struct Call {
    functions: &'static Functions,
    image: Handle,
    /// The memory of the buffers of the task.
    vectors: Vec<iovec>,
    /// The bytes of a discard or of write zeroes that are done.
    done: u64,
    task: Task,
}

impl Call {
    /// Starts the next operation of the request.
    fn start(self: Box<Self>) {
        let functions = self.functions;
        let this = Box::into_raw(self);
        let mut completion = ptr::null_mut();
        // SAFETY: `completed` takes a pointer to a call; librbd does not use it before that.
        let created = converted(unsafe {
            (functions.rbd_aio_create_completion)(this.cast(), completed, &mut completion)
        });
        if let Err(errno) = created {
            // SAFETY: It was made by `into_raw`, and librbd has not taken it.
            unsafe { Box::from_raw(this) }.complete(Err(errno));
            return;
        }
        // SAFETY: It was made by `into_raw`, and `completed` is not called before `submit` is.
        let started = unsafe { Self::submit(this, completion) };
        if let Err(errno) = started {
            // SAFETY: librbd has not taken the completion.
            unsafe { (functions.rbd_aio_release)(completion) };
            // SAFETY: It was made by `into_raw`, and librbd does not call `completed` then.
            unsafe { Box::from_raw(this) }.complete(Err(errno));
        }
    }

    /// Calls librbd's function.
    ///
    /// # Safety
    ///
    /// `this` points to a call. It may be gone after this if the result is no error.
    unsafe fn submit(this: *mut Self, completion: Handle) -> std::result::Result<(), Errno> {
        // SAFETY: It points to a call, by the requirements of this function.
        let call = unsafe { &*this };
        let (functions, image) = (call.functions, call.image);
        let request = &call.task.request;
        let offset = request.offset.saturating_add(call.done);
        let length = request.length.saturating_sub(call.done).min(MAX_RANGE);
        let vectors = call.vectors.as_ptr();
        let count = c_int::try_from(call.vectors.len()).map_err(|_| Errno::INVAL)?;
        let operation = request.operation;
        // SAFETY: By the type invariants the image is open. The memory and the vectors exist until
        // the completion is called, since the call owns both. `call` is not used after this.
        let result = unsafe {
            match operation {
                Operation::Read => {
                    (functions.rbd_aio_readv)(image, vectors, count, offset, completion)
                }
                // Without a cache a completed write is durable.
                Operation::Write { .. } => {
                    (functions.rbd_aio_writev)(image, vectors, count, offset, completion)
                }
                Operation::Flush => (functions.rbd_aio_flush)(image, completion),
                Operation::Discard => {
                    (functions.rbd_aio_discard)(image, offset, length, completion)
                }
                Operation::WriteZeroes { may_unmap } => {
                    let flags = if may_unmap { 0 } else { THICK_PROVISION };
                    let length = usize::try_from(length).unwrap_or(0);
                    (functions.rbd_aio_write_zeroes)(
                        image, offset, length, completion, flags, NO_FLAGS,
                    )
                }
            }
        };
        converted(result).map(drop)
    }

    /// Continues after an operation, with the next one or with the completion.
    fn finish(mut self: Box<Self>, result: ssize_t) {
        if let Ok(negative @ ..=-1) = i32::try_from(result) {
            return self.complete(Err(Errno::from_raw_os_error(negative.saturating_neg())));
        }
        let request = &self.task.request;
        let count = u64::try_from(result).unwrap_or(0);
        match request.operation {
            Operation::Read if count != request.length => self.complete(Err(Errno::IO)),
            Operation::Discard | Operation::WriteZeroes { .. } => {
                self.done = self.done.saturating_add(MAX_RANGE);
                if self.done < self.task.request.length {
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
        let result = result.map_err(|errno| super::io_error(errno, request));
        self.task.complete(result);
    }
}

/// Called by librbd, in a thread of its own, when an operation has completed.
extern "C" fn completed(completion: Handle, argument: *mut c_void) {
    // SAFETY: `Call::start` has made it by `into_raw`, and librbd calls this once.
    let call: Box<Call> = unsafe { Box::from_raw(argument.cast()) };
    // SAFETY: The completion exists until it is released, and has completed.
    let result = unsafe { (call.functions.rbd_aio_get_return_value)(completion) };
    // SAFETY: It is not used after this.
    unsafe { (call.functions.rbd_aio_release)(completion) };
    call.finish(result);
}

/// Called by librbd as an operation proceeds, which takes no time that matters here.
extern "C" fn progress(_done: u64, _all: u64, _argument: *mut c_void) -> c_int {
    0
}
