// SPDX-License-Identifier: GPL-2.0-only

//! Event channels: notifications between two domains.
//!
//! A channel has two ends. The frontend creates an end for one other domain
//! ([`EventChannel::alloc_unbound`]) and writes its number, the *port*, to xenstore; the backend
//! connects to it ([`EventChannel::bind_interdomain`]). Each end is an interrupt of its domain.
//!
//! An event that has arrived is *pending* until it is ended (EOI), and no other event arrives
//! before that. So ending events late slows down a domain that sends too many (XSA-332, XSA-391):
//! all channels here are of the `lateeoi` kind. An event for which there was nothing to do is
//! *spurious*; after spurious events the event channel driver of Linux delays the next one, by up
//! to a second.
//!
//! C header: [`include/xen/events.h`](srctree/include/xen/events.h)

use kernel::{
    bindings,
    error::to_result,
    ffi,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        rcu,
        Arc, //
    }, //
};

use crate::base::module_ref::ModuleRef;

use super::xenbus;

#[cfg(irqreturn_is_newtype)]
const IRQ_HANDLED: bindings::irqreturn_t = bindings::irqreturn::IRQ_HANDLED;
#[cfg(not(irqreturn_is_newtype))]
const IRQ_HANDLED: bindings::irqreturn_t = bindings::irqreturn_IRQ_HANDLED;

/// Largest number of ports that a domain can have.
const PORTS: bindings_ext::evtchn_port_t = bindings_ext::EVTCHN_FIFO_NR_CHANNELS;

/// The result of a [`Handler`] for an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Eoi {
    /// There was work, and it is done: the next event may arrive.
    Done,
    /// There was nothing to do: the next event may arrive, later if there are many of these.
    Spurious,
    /// [`EventChannel::eoi`] will end the event. Without that call no further event arrives, which
    /// is intended for a domain that violates the protocol.
    ///
    /// The handler must tell the caller of `eoi` by a store with release ordering, which pairs with
    /// an acquire there. Otherwise `eoi` may not see the event yet, and do nothing. A wakeup alone
    /// is not enough, because it orders nothing if the thread is already awake.
    Later,
}

/// The handler of the events of a channel.
pub trait Handler: Send + Sync + 'static {
    /// Handles an event that has arrived.
    ///
    /// Context: hard interrupt, on one CPU at a time.
    fn handle(&self) -> Eoi;
}

/// The way to notify the other end.
#[derive(Clone, Copy)]
enum Notify {
    /// By the port, which is known from the start.
    Port(bindings_ext::evtchn_port_t),
    /// By the interrupt, whose port only the event channel driver knows.
    Irq,
}

/// Data shared by a channel and its interrupt.
///
/// # Invariants
///
/// `open` is 1 while an event has arrived and was not ended: the code that sets it to 0 ends the
/// event. Each event must be ended once, because the event channel driver adds it to a list without
/// a check for a concurrent call.
struct Shared<T> {
    handler: Arc<T>,
    open: Atomic<i32>,
}

impl<T: Handler> Shared<T> {
    /// Ends the event, if there is one.
    ///
    /// # Safety
    ///
    /// `irq` is bound to an event channel of the `lateeoi` kind, with this as its argument.
    #[inline]
    unsafe fn end(&self, irq: ffi::c_uint, spurious: bool) {
        // INVARIANT: It is ended below.
        if self.open.xchg(0, Full) == 0 {
            return;
        }
        let flags = if spurious {
            bindings_ext::XEN_EOI_FLAG_SPURIOUS
        } else {
            0
        };
        // SAFETY: By the requirements of this function. By the type invariant no other code ends
        // the event, and no other one comes before this.
        unsafe { bindings_ext::xen_irq_lateeoi(irq, flags) };
    }
}

/// A handle that notifies the other domain of a channel, without the channel
/// (`notify_remote_via_evtchn()`).
///
/// It is a number, so it can be copied. Once the channel is closed, Xen refuses the notification,
/// or another channel gets a spurious event.
#[derive(Clone, Copy)]
pub struct Notifier(bindings_ext::evtchn_port_t);

impl Notifier {
    /// Notifies the other domain.
    ///
    /// Context: any.
    #[inline]
    pub fn notify(self) {
        // SAFETY: A number, which Xen checks.
        unsafe { bindings_ext::notify_remote_via_evtchn(self.0) };
    }
}

/// This end of an event channel, with its interrupt and handler.
///
/// Dropping it closes the channel, and waits until the handler is not running on any CPU; after
/// that it is never called again. So do not drop it while holding a lock that the handler takes.
///
/// # Invariants
///
/// - `irq` is bound to an event channel of the `lateeoi` kind, with [`Self::interrupt`] as handler
///   and `shared` as its argument, which does not move.
/// - `device` is the device that the interrupt was bound for: the event channel driver may use it
///   while `irq` is bound.
pub struct EventChannel<T: Handler> {
    irq: ffi::c_uint,
    notify: Notify,
    shared: Pin<KBox<Shared<T>>>,
    _device: ARef<xenbus::Device>,
    _module: ModuleRef,
}

impl<T: Handler> EventChannel<T> {
    /// Creates an end that the domain on the other side of `device` may connect to.
    ///
    /// `name` is the name in `/proc/interrupts`. [`Self::port`] returns the port, for xenstore. The
    /// handler may be called before this returns.
    pub fn alloc_unbound(
        device: &xenbus::Device,
        name: &'static CStr,
        handler: Arc<T>,
    ) -> Result<Self> {
        Self::request(device, handler, |argument| {
            let mut port = 0;
            // SAFETY: `port` is valid for a write.
            to_result(unsafe {
                bindings_ext::evtchn_alloc_unbound(device.otherend_id().value(), &mut port)
            })?;
            // After most failures here the port is closed. Only if there is no memory for the
            // number of the interrupt, it stays open and unused until the domain ends: the error
            // does not tell which case it is, and closing the port twice could close another
            // channel that got it meanwhile.
            //
            // SAFETY: The name is `'static`; `argument` is the argument of `interrupt`, and stays
            // until the interrupt is unbound, as `request` says.
            let irq = unsafe {
                bindings_ext::bind_evtchn_to_irqhandler_lateeoi(
                    port,
                    Some(Self::interrupt),
                    0,
                    name.as_char_ptr(),
                    argument,
                )
            };
            Ok((irq, Notify::Port(port)))
        })
    }

    /// Connects to the port that the domain on the other side of `device` has created for this
    /// domain.
    ///
    /// The port is untrusted data; Xen refuses one that is not for this domain. `name` is the name
    /// in `/proc/interrupts`. The handler may be called before this returns.
    pub fn bind_interdomain(
        device: &xenbus::Device,
        remote_port: u32,
        name: &'static CStr,
        handler: Arc<T>,
    ) -> Result<Self> {
        Self::request(device, handler, |argument| {
            // SAFETY: The name is `'static`; `argument` is the argument of `interrupt`, and stays
            // until the interrupt is unbound, and so does the device, as `request` says.
            let irq = unsafe {
                bindings_ext::bind_interdomain_evtchn_to_irqhandler_lateeoi(
                    device.as_raw(),
                    remote_port,
                    Some(Self::interrupt),
                    0,
                    name.as_char_ptr(),
                    argument,
                )
            };
            Ok((irq, port_of(irq).map_or(Notify::Irq, Notify::Port)))
        })
    }

    /// Creates an `EventChannel` from the result of `bind`, which is an interrupt or a negative
    /// errno.
    ///
    /// It cannot fail after `bind` has succeeded.
    ///
    /// `bind` gets the argument for [`Self::interrupt`]. By the type invariants the argument and
    /// the device exist while the interrupt is bound.
    fn request(
        device: &xenbus::Device,
        handler: Arc<T>,
        bind: impl FnOnce(*mut ffi::c_void) -> Result<(ffi::c_int, Notify)>,
    ) -> Result<Self> {
        let module = ModuleRef::new()?;
        let shared = Shared {
            handler,
            open: Atomic::new(0),
        };
        let shared = KBox::pin(shared, GFP_KERNEL)?;
        let (irq, notify) = bind(argument(&shared))?;
        if irq < 0 {
            return Err(Error::from_errno(irq));
        }
        // INVARIANT: `bind` has bound the interrupt, with these.
        Ok(Self {
            irq: irq as ffi::c_uint,
            notify,
            shared,
            _device: ARef::from(device),
            _module: module,
        })
    }

    /// Returns the port of this end, for xenstore, if it is known.
    ///
    /// The port of an end from [`Self::bind_interdomain`] may not be known.
    pub fn port(&self) -> Option<u32> {
        match self.notify {
            Notify::Port(port) => Some(port),
            Notify::Irq => None,
        }
    }

    /// Returns `true` if the interrupt is still bound to the port of this end.
    ///
    /// After a restore it is not, as soon as this domain runs again; the channel has had no other
    /// end since the domain was saved.
    ///
    /// Context: any.
    pub fn is_open(&self) -> bool {
        let Notify::Port(port) = self.notify else {
            return true;
        };
        // The event channel driver frees its data of a port after a grace period.
        let _guard = rcu::read_lock();
        // SAFETY: The function takes any number. What it looks at stays until the guard is dropped.
        unsafe { bindings_ext::irq_from_evtchn(port) == self.irq }
    }

    /// Returns a handle that notifies the other domain without this, if the port is known.
    pub fn notifier(&self) -> Option<Notifier> {
        self.port().map(Notifier)
    }

    /// Notifies the other domain.
    ///
    /// Context: any.
    #[inline]
    pub fn notify(&self) {
        match self.notify {
            // SAFETY: A number. If the channel is gone, after a restore, then Xen refuses it, or
            // another channel gets a spurious event.
            Notify::Port(port) => unsafe { bindings_ext::notify_remote_via_evtchn(port) },
            // SAFETY: The interrupt is bound by the type invariant.
            Notify::Irq => unsafe { bindings_ext::notify_remote_via_irq(self.irq as ffi::c_int) },
        }
    }

    /// Ends the event for which the handler has returned [`Eoi::Later`], if there is one.
    ///
    /// Context: any.
    #[inline]
    pub fn eoi(&self, spurious: bool) {
        // SAFETY: The interrupt is bound, with `shared`, by the type invariant.
        unsafe { self.shared.end(self.irq, spurious) };
    }

    /// Returns the number of the interrupt, as in `/proc/interrupts`.
    pub fn irq(&self) -> u32 {
        self.irq
    }

    /// Binds the interrupt, and so the events, to a CPU.
    pub fn set_affinity(&self, cpu: kernel::cpu::CpuId) -> Result {
        // SAFETY: The interrupt is bound by the type invariant; `cpu` is in range by that of
        // `CpuId`.
        to_result(unsafe { bindings_ext::irq_set_affinity_to_cpu(self.irq, cpu.as_u32()) })
    }

    /// # Safety
    ///
    /// Only as a handler that [`Self::request`] has bound, with its argument.
    unsafe extern "C" fn interrupt(
        irq: ffi::c_int,
        shared: *mut ffi::c_void,
    ) -> bindings::irqreturn_t {
        // SAFETY: By the requirements of this function; the `EventChannel` keeps it until the
        // interrupt is unbound.
        let shared = unsafe { &*shared.cast::<Shared<T>>() };
        // First, because the handler can wake a thread that ends the event before it returns.
        //
        // INVARIANT: An event has come.
        shared.open.store(1, Relaxed);
        let spurious = match shared.handler.handle() {
            Eoi::Done => false,
            Eoi::Spurious => true,
            Eoi::Later => return IRQ_HANDLED,
        };
        // SAFETY: By the requirements of this function; the interrupt is the one being handled.
        unsafe { shared.end(irq as ffi::c_uint, spurious) };
        IRQ_HANDLED
    }
}

/// Returns the port of an interrupt that is bound.
///
/// The event channel driver only has a lookup of the interrupt of a port, so all ports are
/// searched, once. Notifying by the port saves a lookup each time.
fn port_of(irq: ffi::c_int) -> Option<bindings_ext::evtchn_port_t> {
    let irq = ffi::c_uint::try_from(irq).ok()?;
    // The event channel driver frees its data of a port after a grace period.
    let _guard = rcu::read_lock();
    // SAFETY: The function takes any number. Data of a port that is closed at this moment
    // stays until the guard is dropped.
    (1..PORTS).find(|port| unsafe { bindings_ext::irq_from_evtchn(*port) } == irq)
}

/// Returns the argument of the interrupt of a channel.
fn argument<T>(shared: &Shared<T>) -> *mut ffi::c_void {
    core::ptr::from_ref(shared).cast_mut().cast()
}

impl<T: Handler> Drop for EventChannel<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; waits until the handler has returned on all CPUs, so that
        // `shared` can be freed.
        unsafe { bindings_ext::unbind_from_irqhandler(self.irq, argument(&self.shared)) };
    }
}
