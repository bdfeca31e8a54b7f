// SPDX-License-Identifier: GPL-2.0-only

//! Xenstore: the tree of strings through which the two sides of a device negotiate.
//!
//! A *node* has a path, a value and children; a *watch* calls its handler when a node at or below a
//! path changes. All functions here sleep until the daemon replies. The values are untrusted input:
//! they have a bounded length and are parsed strictly, and an error names the node.
//!
//! C header: [`include/xen/xenbus.h`](srctree/include/xen/xenbus.h)

use core::{
    ffi::CStr,
    ops::Deref,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi,
    fmt,
    prelude::*,
    str::{
        CString,
        NullTerminatedFormatter, //
    },
    sync::Arc,
    types::Opaque, //
};

use xen_io::node::{
    self,
    InvalidNode, //
};

use crate::{
    base::{
        fmt::AsKernelDisplay,
        module_ref::ModuleRef, //
    },
    ratelimited, //
};

/// Longest value that is written, and longest node name below a directory, in bytes with the zero.
///
/// Longer ones fail with `E2BIG`; drivers write much shorter ones.
const TEXT_MAX: usize = 256;

/// Number of attempts at a transaction while other writers change nodes that it has read.
const TRANSACTION_TRIES: usize = 32;

/// A short zero-terminated text on the stack: writing to xenstore must not allocate memory, because
/// the disk that reconnects may be the swap disk.
struct NodeName([u8; TEXT_MAX]);

impl NodeName {
    fn new(args: fmt::Arguments<'_>) -> Result<Self> {
        let mut text = [0; TEXT_MAX];
        let mut formatter = NullTerminatedFormatter::new(&mut text).ok_or(EINVAL)?;
        fmt::Write::write_fmt(&mut formatter, args).map_err(|_| E2BIG)?;
        Ok(Self(text))
    }

    /// Returns the text up to the first zero.
    fn as_cstr(&self) -> Result<&CStr> {
        CStr::from_bytes_until_nul(&self.0).map_err(|_| EINVAL)
    }
}

/// The transaction of an access: a [`Transaction`], or [`NoTransaction`].
pub trait Context {
    #[doc(hidden)]
    fn id(&self) -> u32;
}

/// No transaction (`XBT_NIL`).
pub struct NoTransaction;

impl Context for NoTransaction {
    fn id(&self) -> u32 {
        0
    }
}

/// A transaction: its reads see one state of the tree, and its writes take effect together or not
/// at all.
///
/// Only [`transaction`] creates one.
pub struct Transaction(u32);

impl Context for Transaction {
    fn id(&self) -> u32 {
        self.0
    }
}

fn raw(context: &impl Context) -> bindings_ext::xenbus_transaction {
    bindings_ext::xenbus_transaction { id: context.id() }
}

/// Runs `body` in a transaction and commits it if `body` succeeds.
///
/// If another writer has changed a node that `body` has used, `body` is called again, so it must
/// not have other effects. Fails with `EAGAIN` after 32 attempts.
pub fn transaction<R>(mut body: impl FnMut(&Transaction) -> Result<R>) -> Result<R> {
    for _ in 0..TRANSACTION_TRIES {
        let mut started = bindings_ext::xenbus_transaction { id: 0 };
        // SAFETY: `started` is valid for a write.
        to_result(unsafe { bindings_ext::xenbus_transaction_start(&mut started) })?;
        let transaction = Transaction(started.id);

        let result = body(&transaction);
        // SAFETY: The transaction was started above and ends here, once.
        let ended = to_result(unsafe {
            bindings_ext::xenbus_transaction_end(raw(&transaction), result.is_err())
        });
        match (result, ended) {
            (Err(error), _) => return Err(error),
            (Ok(value), Ok(())) => return Ok(value),
            (Ok(_), Err(error)) if error == EAGAIN => continue,
            (Ok(_), Err(error)) => return Err(error),
        }
    }
    Err(EAGAIN)
}

/// The value of a node: up to 4096 bytes, none of which is zero.
///
/// # Invariants
///
/// The pointer comes from `xenbus_read`: a buffer of the slab allocator, owned by this, that
/// contains `len` bytes without a zero, and a zero after them.
pub struct Value {
    bytes: NonNull<u8>,
    len: usize,
}

// SAFETY: A plain buffer that is owned.
unsafe impl Send for Value {}
// SAFETY: It is only read through a shared reference.
unsafe impl Sync for Value {}

impl Value {
    /// Returns the bytes, without the zero at the end.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: By the type invariant.
        unsafe { core::slice::from_raw_parts(self.bytes.as_ptr(), self.len) }
    }
}

impl Deref for Value {
    type Target = CStr;

    fn deref(&self) -> &CStr {
        // SAFETY: By the type invariant there is a zero after the last byte, and none before.
        unsafe {
            CStr::from_bytes_with_nul_unchecked(core::slice::from_raw_parts(
                self.bytes.as_ptr(),
                self.len.wrapping_add(1),
            ))
        }
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the buffer is ours and from the slab allocator.
        unsafe { bindings::kfree(self.bytes.as_ptr().cast()) };
    }
}

/// Reads a node.
///
/// Fails with `ENOENT` if there is no such node, or if this domain may not read it.
pub fn read(context: &impl Context, dir: &CStr, node: fmt::Arguments<'_>) -> Result<Value> {
    let node = NodeName::new(node)?;
    let mut len = 0;
    // SAFETY: Both strings are zero-terminated and outlive the call, `len` is valid for a write.
    let bytes = from_err_ptr(unsafe {
        bindings_ext::xenbus_read(
            raw(context),
            dir.as_char_ptr(),
            node.as_cstr()?.as_char_ptr(),
            &mut len,
        )
    })
    // The reply for a missing node if this domain may not read its parent.
    .map_err(|error| if error == EACCES { ENOENT } else { error })?;
    let bytes = NonNull::new(bytes.cast::<u8>()).ok_or(ENOENT)?;
    // SAFETY: `xenbus_read` gives a buffer of `len` bytes and a zero after them.
    let value = unsafe { core::slice::from_raw_parts(bytes.as_ptr(), len as usize) };
    let len = value
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(value.len());
    // INVARIANT: The buffer is owned by the caller of `xenbus_read`; `len` is where its first zero
    // is.
    Ok(Value { bytes, len })
}

/// Returns `true` if a node exists and this domain may read it.
pub fn exists(context: &impl Context, dir: &CStr, node: fmt::Arguments<'_>) -> Result<bool> {
    match read(context, dir, node) {
        Ok(_) => Ok(true),
        Err(error) if error == ENOENT => Ok(false),
        Err(error) => Err(error),
    }
}

/// The names of the nodes of a directory, which saves a query for each node that does not exist.
///
/// # Invariants
///
/// If there are names, they come from `xenbus_directory`: one buffer of the slab allocator, owned
/// by this, that begins with as many pointers to zero-terminated strings in it.
pub struct DirectoryListing(Option<(NonNull<*mut ffi::c_char>, usize)>);

// SAFETY: A plain buffer that is owned.
unsafe impl Send for DirectoryListing {}
// SAFETY: It is only read through a shared reference.
unsafe impl Sync for DirectoryListing {}

impl DirectoryListing {
    /// Lists a directory.
    ///
    /// If that fails, [`Self::may_have`] returns `true` for all nodes.
    pub fn new(context: &impl Context, dir: &CStr) -> Self {
        let mut count = 0;
        // SAFETY: Both strings are zero-terminated and outlive the call, `count` is valid for a
        // write.
        let names = from_err_ptr(unsafe {
            bindings_ext::xenbus_directory(
                raw(context),
                dir.as_char_ptr(),
                c"".as_char_ptr(),
                &mut count,
            )
        });
        // INVARIANT: The buffer is owned by the caller of `xenbus_directory`.
        Self(
            names
                .ok()
                .and_then(NonNull::new)
                .map(|names| (names, count as usize)),
        )
    }

    /// Returns `true` if a node may exist, and `false` if it did not exist.
    pub fn may_have(&self, node: &str) -> bool {
        let Some((names, count)) = self.0 else {
            return true;
        };
        // SAFETY: By the type invariant.
        let names = unsafe { core::slice::from_raw_parts(names.as_ptr(), count) };
        names.iter().any(|name| {
            // SAFETY: By the type invariant.
            let name = unsafe { CStr::from_char_ptr(*name) };
            name.to_bytes() == node.as_bytes()
        })
    }
}

impl Drop for DirectoryListing {
    fn drop(&mut self) {
        if let Some((names, _)) = self.0 {
            // SAFETY: By the type invariant the buffer is ours and from the slab allocator.
            unsafe { bindings::kfree(names.as_ptr().cast()) };
        }
    }
}

/// Writes a node, and creates it and its parents if they do not exist.
pub fn write(
    context: &impl Context,
    dir: &CStr,
    node: fmt::Arguments<'_>,
    value: fmt::Arguments<'_>,
) -> Result {
    let node = NodeName::new(node)?;
    let value = NodeName::new(value)?;
    // SAFETY: All strings are zero-terminated and outlive the call.
    to_result(unsafe {
        bindings_ext::xenbus_write(
            raw(context),
            dir.as_char_ptr(),
            node.as_cstr()?.as_char_ptr(),
            value.as_cstr()?.as_char_ptr(),
        )
    })
}

/// Removes a node and all nodes below it.
///
/// Fails with `ENOENT` if there is no such node.
pub fn remove(context: &impl Context, dir: &CStr, node: fmt::Arguments<'_>) -> Result {
    let node = NodeName::new(node)?;
    // SAFETY: Both strings are zero-terminated and outlive the call.
    to_result(unsafe {
        bindings_ext::xenbus_rm(
            raw(context),
            dir.as_char_ptr(),
            node.as_cstr()?.as_char_ptr(),
        )
    })
}

/// The reason why a [`Reader`] has no value of a node.
#[derive(Clone, Copy, Debug)]
pub enum NodeError {
    /// The text of the node is not valid.
    Invalid(InvalidNode),
    /// The access to xenstore has failed.
    Xenstore(Error),
}

impl From<NodeError> for Error {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Invalid(_) => EINVAL,
            NodeError::Xenstore(error) => error,
        }
    }
}

/// Reads nodes of one directory (`xenbus_scanf`, `xenbus_gather`).
///
/// A missing node is `None`. The functions of [`xen_io::node`] parse the others.
#[derive(Clone, Copy)]
pub struct Reader<'a, C: Context = NoTransaction> {
    context: &'a C,
    dir: &'a CStr,
    listing: Option<&'a DirectoryListing>,
    ignores_empty: bool,
}

impl<'a> Reader<'a> {
    /// Creates a reader of `dir`, outside of any transaction.
    pub fn new(dir: &'a CStr) -> Self {
        Self::within(&NoTransaction, dir)
    }

    /// Creates a reader of `dir` that reads only nodes that `listing` may have.
    pub fn listed(dir: &'a CStr, listing: &'a DirectoryListing) -> Self {
        Self {
            listing: Some(listing),
            ..Self::new(dir)
        }
    }
}

impl<'a, C: Context> Reader<'a, C> {
    /// Creates a reader of `dir`, in a transaction.
    pub fn within(context: &'a C, dir: &'a CStr) -> Self {
        Self {
            context,
            dir,
            listing: None,
            ignores_empty: false,
        }
    }

    /// Treats empty nodes as missing, as `xenbus_scanf()` does.
    pub fn ignore_empty(self) -> Self {
        Self {
            ignores_empty: true,
            ..self
        }
    }

    /// Returns the directory.
    pub fn dir(&self) -> &'a CStr {
        self.dir
    }

    /// Reads a node of the directory.
    ///
    /// A missing node is `None`.
    pub fn value(&self, node: &str) -> Result<Option<Value>> {
        if self.listing.is_some_and(|listing| !listing.may_have(node)) {
            return Ok(None);
        }
        self.value_at(fmt!("{node}"))
    }

    /// Reads a node at a path below the directory.
    ///
    /// A missing node is `None`.
    pub fn value_at(&self, path: fmt::Arguments<'_>) -> Result<Option<Value>> {
        match read(self.context, self.dir, path) {
            Ok(value) if self.ignores_empty && value.as_bytes().is_empty() => Ok(None),
            Ok(value) => Ok(Some(value)),
            Err(error) if error == ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a node of the directory, and parses it.
    ///
    /// A missing node is `None`.
    pub fn parse<T>(&self, node: &'static str, parse: Parser<T>) -> Result<Option<T>, NodeError> {
        parse_value(node, self.value(node), parse)
    }

    /// Reads a node at a path below the directory, and parses it as the node `name`.
    ///
    /// A missing node is `None`.
    pub fn parse_at<T>(
        &self,
        path: fmt::Arguments<'_>,
        name: &'static str,
        parse: Parser<T>,
    ) -> Result<Option<T>, NodeError> {
        parse_value(name, self.value_at(path), parse)
    }

    /// Reads a decimal number.
    ///
    /// Fails with `EINVAL`, and logs that, if the node is missing or invalid.
    pub fn number(&self, node: &'static str) -> Result<u32> {
        self.number_at(fmt!("{node}"), node)
    }

    /// Reads a decimal number at a path below the directory, like [`Self::number`].
    pub fn number_at(&self, path: fmt::Arguments<'_>, name: &'static str) -> Result<u32> {
        let number = self.parse_at(path, name, node::decimal_u32);
        let number = number.and_then(|number| {
            number.ok_or_else(|| NodeError::Invalid(InvalidNode::missing(name)))
        });
        number.map_err(|error| {
            if let NodeError::Invalid(invalid) = &error {
                ratelimited!(pr_warn!("{}/{}\n", self.dir, AsKernelDisplay(invalid)));
            }
            error.into()
        })
    }
}

/// Parses the text of a node. The name is for the error.
pub type Parser<T> = fn(&'static str, &[u8]) -> Result<T, InvalidNode>;

fn parse_value<T>(
    name: &'static str,
    value: Result<Option<Value>>,
    parse: Parser<T>,
) -> Result<Option<T>, NodeError> {
    match value.map_err(NodeError::Xenstore)? {
        Some(value) => parse(name, value.as_bytes())
            .map(Some)
            .map_err(NodeError::Invalid),
        None => Ok(None),
    }
}

/// The callback of a [`Watch`].
pub trait WatchHandler: Send + Sync + 'static {
    /// Called when a node at or below the watched one has changed, and once after the watch was
    /// registered.
    ///
    /// Changes that happen before the call are merged into one call, so read the current state of
    /// the nodes.
    ///
    /// Context: the `xenwatch` thread, which calls all watches of the kernel. It may sleep, but
    /// delays all other devices meanwhile.
    fn changed(&self);
}

/// Data shared by a watch and its callback.
#[repr(C)]
struct WatchInner<T> {
    /// The first field, so that the callback finds the others at the pointer that it gets.
    watch: Opaque<bindings_ext::xenbus_watch>,
    node: CString,
    handler: Arc<T>,
}

/// A registered watch on a node, until it is dropped.
///
/// Dropping it waits for a running callback, unless the callback itself drops it. So do not drop it
/// while holding a lock that the callback takes.
///
/// # Invariants
///
/// `inner` is registered with xenbus as a watch, and does not move.
pub struct Watch<T: WatchHandler> {
    inner: Pin<KBox<WatchInner<T>>>,
    /// `None` if the module's exit waits for the watch to be dropped.
    _module: Option<ModuleRef>,
}

// SAFETY: The watch may be unregistered from any thread, the handler is shared with the `xenwatch`
// thread anyway.
unsafe impl<T: WatchHandler> Send for Watch<T> {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl<T: WatchHandler> Sync for Watch<T> {}

impl<T: WatchHandler> Watch<T> {
    /// Watches `dir`/`node`, or `dir` itself if `node` is empty.
    ///
    /// The handler is called once, soon.
    pub fn new(dir: &CStr, node: fmt::Arguments<'_>, handler: Arc<T>) -> Result<Self> {
        Self::register(dir, node, handler, Some(ModuleRef::new()?))
    }

    /// Registers a watch like [`Self::new`].
    ///
    /// Without a reference to the module, the module's exit must wait for the drop of the watch.
    pub(super) fn register(
        dir: &CStr,
        node: fmt::Arguments<'_>,
        handler: Arc<T>,
        module: Option<ModuleRef>,
    ) -> Result<Self> {
        let node = NodeName::new(node)?;
        let node = node.as_cstr()?;
        let node = if node.is_empty() {
            CString::try_from_fmt(fmt!("{}", dir))?
        } else {
            CString::try_from_fmt(fmt!("{}/{}", dir, node))?
        };
        let watch = bindings_ext::xenbus_watch {
            node: node.as_char_ptr(),
            will_handle: Some(Self::will_handle),
            callback: Some(Self::callback),
            ..Default::default()
        };
        let inner = KBox::pin(
            WatchInner {
                watch: Opaque::new(watch),
                node,
                handler,
            },
            GFP_KERNEL,
        )?;
        // SAFETY: The watch is initialised, does not move, and stays until it is unregistered in
        // `drop`; its node is a zero-terminated string that exists as long.
        to_result(unsafe { bindings_ext::register_xenbus_watch(inner.watch.get()) })?;
        // INVARIANT: Registered just above.
        Ok(Self {
            inner,
            _module: module,
        })
    }

    /// Returns `true` if the event has to be queued: not if one is queued already.
    ///
    /// Context: under a spinlock of xenbus.
    ///
    /// # Safety
    ///
    /// For xenbus: `watch` is registered.
    unsafe extern "C" fn will_handle(
        watch: *mut bindings_ext::xenbus_watch,
        _path: *const ffi::c_char,
        _token: *const ffi::c_char,
    ) -> bool {
        // SAFETY: By the requirements of this function: a watch that is registered is valid. The
        // number may change meanwhile, hence the volatile read of one word.
        unsafe { (&raw const (*watch).nr_pending).read_volatile() == 0 }
    }

    /// # Safety
    ///
    /// For xenbus: `watch` is registered, and the first field of the `WatchInner<T>` of a
    /// [`Watch`].
    unsafe extern "C" fn callback(
        watch: *mut bindings_ext::xenbus_watch,
        _path: *const ffi::c_char,
        _token: *const ffi::c_char,
    ) {
        // The handler may drop the watch, so nothing of it is used once the handler runs.
        //
        // SAFETY: By the requirements of this function; `unregister_xenbus_watch` waits for this
        // function in all threads but this one, so `inner` is valid here.
        let handler = unsafe { (*watch.cast::<WatchInner<T>>()).handler.clone() };
        handler.changed();
    }
}

impl<T: WatchHandler> Drop for Watch<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the watch is registered.
        unsafe { bindings_ext::unregister_xenbus_watch(self.inner.watch.get()) };
    }
}

/// Waits until every callback of the `xenwatch` thread that is running now has returned.
///
/// For code that was called there and will be freed. It does not wait if the caller is that thread,
/// or if no watch can be registered, for lack of memory or because of xenstore's limit.
pub(crate) fn synchronize() {
    struct Nothing;
    impl WatchHandler for Nothing {
        fn changed(&self) {}
    }

    let Ok(handler) = Arc::new(Nothing, GFP_KERNEL) else {
        return;
    };
    // Unregistering a watch waits; the kernel has no other function for that.
    let _ = Watch::register(c"domid", fmt!(""), handler, None);
}
