// SPDX-License-Identifier: GPL-2.0-only

//! Event channels: waking the other domain, and being woken.
//!
//! A channel has two ends. The frontend makes an end that a certain domain may connect to
//! ([`EventChannel::alloc_unbound`]) and tells its number, the *port*, through xenstore; the
//! backend connects ([`EventChannel::bind_interdomain`]). Each end is an interrupt of its domain.
//!
//! An event that has arrived is *pending* until it is ended (EOI), and no other one comes before
//! that. So ending events late slows a domain down that sends too many (XSA-332, XSA-391): all
//! channels here are of the `lateeoi` kind. An event for which there was nothing to do is
//! *spurious*; after spurious events Xen's glue code delays the next one, up to a second.
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

/// As many ports as a domain can have.
const PORTS: bindings_ext::evtchn_port_t = bindings_ext::EVTCHN_FIFO_NR_CHANNELS;

/// The result of a [`Handler`] for an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Eoi {
    /// There was work, and it is done: the next event may come.
    Done,
    /// There was nothing to do: the next event may come, later if there are more of these.
    Spurious,
    /// [`EventChannel::eoi`] will end the event. Without that no further event comes, which
    /// silences a domain that breaks the rules.
    ///
    /// The handler must notify the caller of `eoi` with a release, which pairs with an acquire
    /// there. A wake-up alone is not enough, because a thread that is awake does not need it.
    /// Otherwise `eoi` may not see the event yet, and does nothing.
    Later,
}

/// Is called when an event has arrived.
pub trait Handler: Send + Sync + 'static {
    /// Handles an event.
    ///
    /// Context: hard interrupt, on one CPU at a time.
    fn handle(&self) -> Eoi;
}

/// The way to notify the other end.
#[derive(Clone, Copy)]
enum Notify {
    /// By the port, known from the start.
    Port(bindings_ext::evtchn_port_t),
    /// By the interrupt, whose port only Xen's glue code knows.
    Irq,
}

/// Data shared by a channel and its interrupt.
///
/// # Invariants
///
/// `open` is 1 while an event has come and was not ended: whoever makes it 0 ends the event. The
/// glue code must be told once of each end: it puts the event to a list, without checking
/// whether other code does so at the same time.
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

/// A handle that wakes the other domain of a channel, without the channel
/// (`notify_remote_via_evtchn()`).
///
/// It is a number, which costs nothing to keep or copy. Once the channel is closed, Xen refuses the
/// notification, or another channel gets a spurious event.
#[derive(Clone, Copy)]
pub struct Notifier(bindings_ext::evtchn_port_t);

impl Notifier {
    /// Wakes the other domain. Any context.
    #[inline]
    pub fn notify(self) {
        // SAFETY: A number, which Xen checks.
        unsafe { bindings_ext::notify_remote_via_evtchn(self.0) };
    }
}

/// Our end of an event channel, with its interrupt and handler.
///
/// Dropping it closes the channel, and waits until the handler is not running on any CPU; after
/// that it is never called again. So do not drop it while holding a lock that the handler takes.
///
/// # Invariants
///
/// - `irq` is bound to an event channel of the `lateeoi` kind, with [`Self::interrupt`] as handler
///   and `shared` as its argument, which does not move.
/// - `device` is what the interrupt was bound for: the glue code may use it while `irq` is bound.
pub struct EventChannel<T: Handler> {
    irq: ffi::c_uint,
    notify: Notify,
    shared: Pin<KBox<Shared<T>>>,
    _device: ARef<xenbus::Device>,
    _module: ModuleRef,
}

impl<T: Handler> EventChannel<T> {
    /// Makes an end that the other end's domain of `device` may connect to.
    ///
    /// `name` is shown in `/proc/interrupts`. The port, for xenstore, is [`Self::port`]. The
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
            // Of what can fail here, most closes the port. Only if there is no memory for the
            // number of the interrupt, it stays open and unused until the domain ends: the error
            // does not tell, and closing it twice could close another channel that got the port
            // meanwhile.
            //
            // SAFETY: The name is `'static`; `argument` is what `interrupt` wants, and stays until
            // the interrupt is unbound, as `request` says.
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

    /// Connects to the port that the other end's domain of `device` has made for us.
    ///
    /// The port is data from the other domain; Xen refuses one that is not meant for us. `name` is
    /// shown in `/proc/interrupts`. The handler may be called before this returns.
    pub fn bind_interdomain(
        device: &xenbus::Device,
        remote_port: u32,
        name: &'static CStr,
        handler: Arc<T>,
    ) -> Result<Self> {
        Self::request(device, handler, |argument| {
            // SAFETY: The name is `'static`; `argument` is what `interrupt` wants, and stays until
            // the interrupt is unbound, and so does the device, as `request` says.
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

    /// Makes an `EventChannel` of what `bind` returns: an interrupt or a negative errno. There is
    /// nothing to be undone after that.
    ///
    /// `bind` gets the argument for [`Self::interrupt`]. By the type invariants it stays while the
    /// interrupt is bound, and so does the device.
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

    /// Returns our port, for xenstore. An end made by [`Self::bind_interdomain`] may not know it.
    pub fn port(&self) -> Option<u32> {
        match self.notify {
            Notify::Port(port) => Some(port),
            Notify::Irq => None,
        }
    }

    /// Returns `true` if the interrupt is still bound to our port. After a restore it is not, from
    /// the moment on at which this domain runs again; the other end has known nothing of the
    /// channel since the domain was saved. Any context.
    pub fn is_open(&self) -> bool {
        let Notify::Port(port) = self.notify else {
            return true;
        };
        // The glue code frees what it knows of a port after a grace period.
        let _guard = rcu::read_lock();
        // SAFETY: The function takes any number. What it looks at stays until the guard is dropped.
        unsafe { bindings_ext::irq_from_evtchn(port) == self.irq }
    }

    /// Returns a handle that wakes the other domain without this, if our port is known.
    pub fn notifier(&self) -> Option<Notifier> {
        self.port().map(Notifier)
    }

    /// Wakes the other domain. Any context.
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

    /// Ends the event for which the handler has said [`Eoi::Later`]. Any context; does nothing if
    /// there is no such event.
    #[inline]
    pub fn eoi(&self, spurious: bool) {
        // SAFETY: The interrupt is bound, with `shared`, by the type invariant.
        unsafe { self.shared.end(self.irq, spurious) };
    }

    /// Returns the number of the interrupt, as in `/proc/interrupts`.
    pub fn irq(&self) -> u32 {
        self.irq
    }

    /// Lets the interrupt, and so the events, come to one CPU.
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

/// Returns the port of an interrupt that is bound. The glue code tells only whose interrupt a port
/// is, so it is searched once; an event sent by its port costs a look-up less.
fn port_of(irq: ffi::c_int) -> Option<bindings_ext::evtchn_port_t> {
    let irq = ffi::c_uint::try_from(irq).ok()?;
    // The glue code frees what it knows of a port after a grace period.
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
        // SAFETY: By the type invariant; waits until the handler has returned everywhere, so that
        // `shared` can go.
        unsafe { bindings_ext::unbind_from_irqhandler(self.irq, argument(&self.shared)) };
    }
}
