// SPDX-License-Identifier: GPL-2.0

//! A bound device outside of the callbacks of its driver: in watches and threads.

use super::is_bound_to;
use super::Device;
use super::Driver;
use crate::xen::xenstore::Watch;
use crate::xen::xenstore::WatchHandler;
use core::ptr::addr_of_mut;
use kernel::device::Bound;
use kernel::devres;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;

/// What a watch of a bound device calls.
pub trait Handler: Send + Sync + 'static {
    /// Like [`WatchHandler::changed`]. May run at the same time as the driver's `remove`, and after
    /// it.
    fn changed(&self, device: &Device<Bound>);
}

/// Watches `dir`/`node` until the device is unbound.
pub fn watch<T: Handler>(
    device: &Device<Bound>,
    dir: &CStr,
    node: fmt::Arguments<'_>,
    handler: Arc<T>,
) -> Result {
    let inner = Inner { device: device.into(), handler };
    let watch = Watch::new(dir, node, Arc::new(inner, GFP_KERNEL)?)?;
    devres::register(device.as_ref(), watch, GFP_KERNEL)
}

/// The handler of a watch that ends before its device is unbound.
///
/// # Invariants
///
/// The device is bound whenever the handler is called.
struct Inner<T> {
    device: ARef<Device>,
    handler: Arc<T>,
}

impl<T: Handler> WatchHandler for Inner<T> {
    fn changed(&self) {
        // SAFETY: The layout does not depend on the context, and by the type invariant the device
        // is bound: the watch belongs to it, and dropping a watch waits for its handler.
        let device = unsafe { &*self.device.as_raw().cast::<Device<Bound>>() };
        self.handler.changed(device);
    }
}

/// Runs `body` unless the device is not bound to the driver `T` any more. The device stays bound
/// meanwhile: this takes the lock of the device.
///
/// For threads that the driver does not wait for in `probe` and `remove`, where the lock is held.
pub fn with<T: Driver, R>(device: &Device, body: impl FnOnce(&Device<Bound>) -> R) -> Option<R> {
    // SAFETY: The device is valid by the type invariant.
    let dev = unsafe { addr_of_mut!((*device.as_raw()).dev) };
    // SAFETY: As above.
    unsafe { bindings_ext::device_lock(dev) };
    // SAFETY: The device is valid, and locked just now.
    let result = unsafe { is_bound_to(dev, T::NAME) }.then(|| {
        // SAFETY: The layout does not depend on the context. A device with a driver is bound, or is
        // being probed or removed, and the latter two happen under the lock.
        body(unsafe { &*device.as_raw().cast::<Device<Bound>>() })
    });
    // SAFETY: Locked above.
    unsafe { bindings_ext::device_unlock(dev) };
    result
}
