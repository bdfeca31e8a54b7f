// SPDX-License-Identifier: GPL-2.0-only

//! A frontend that breaks the protocol, to test what a backend must withstand.
//!
//! It binds to one virtual block device of the guest, creates no disk, and runs a list of
//! *scripts*. Each script is a connection of its own, with ring, event channel, and a thread
//! that sends valid and invalid requests. The result of each case is a line of the file `report`
//! in the device's directory in sysfs; the last line is that of the case `end`, after which the
//! device stays connected and quiet.
//!
//! The state is only switched to and from Initialising in `otherend_changed`: see
//! [`xenbus::Device::switch_state`].

#![deny(unsafe_code)]

mod raw_ring;
mod requests;
mod scripts;
mod session;
mod session_state;

use core::ffi::CStr;

use kernel::{
    device::Core,
    fmt,
    prelude::*,
    sync::{
        aref::ARef,
        new_mutex,
        Arc,
        Mutex, //
    }, //
};

use kernel_ext::{
    base::{
        jiffies::msecs_to_jiffies,
        kthread::{
            KThread,
            KThreadOptions, //
        },
        module_param::module_params,
        sysfs::{
            self,
            Attribute, //
        },
    },
    xen::{
        events::EventChannel,
        ring::RingPages,
        xenbus::{
            self,
            DeviceAction,
            DeviceId,
            IdArray,
            IdTable,
            OtherendState,
            Role,
            XenbusState, //
        },
        xenstore::{
            self,
            Reader, //
        }, //
    },
};

use blkif::wire::info;

use crate::{
    raw_ring::{
        RawRing,
        REQ_PROD,
        RSP_PROD, //
    },
    scripts::{
        Script,
        READ_ONLY_DISK,
        TROUBLE,
        WRITABLE_DISK, //
    },
    session::{
        Pages,
        Parts,
        Session, //
    },
    session_state::{
        DiskFacts,
        Outcome,
        SessionState, //
    },
};

kernel_ext::module_xenbus_driver! {
    type: Front,
    name: "rblk_hostile_front",
    authors: ["The rblkif developers"],
    description: "Frontend that breaks the rules, to test backends",
    license: "GPL",
}

module_params! {
    /// The device to bind to.
    static DEVICE("device", 0o644): u32 = 51728,
        "Virtual device number of the one device to take";
    /// The list of scripts.
    static LIST("list", 0o644): u32 = 0,
        "0: all scripts for a writable disk, 1: requests to a read-only disk, \
         2: wrong requests, then events alone";
    /// Skips scripts for which xen-blkback prints a warning with a stack trace.
    static GENTLE("gentle", 0o644): bool = false,
        "Leave out rings that are broken or gone before a backend can connect to them";
    /// Time for a backend to close a broken ring, in milliseconds.
    static TIMEOUT_MS("timeout_ms", 0o644): u32 = 60_000,
        "How long to wait for a backend to close after its ring was broken";
}

static LISTS: [&[Script]; 3] = [WRITABLE_DISK, READ_ONLY_DISK, TROUBLE];

/// Time limit for a thread to end, in milliseconds.
const STOP_MS: u32 = 10_000;
/// Number of state changes in the script that toggles the state.
const TOGGLES: u32 = 20;

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

static ATTRIBUTES: [Attribute<SessionState>; 1] = [Attribute {
    name: c"report",
    show: |session_state, output| session_state.show(output),
}];

/// A device.
#[pin_data]
struct Front {
    device: ARef<xenbus::Device>,
    session_state: Arc<SessionState>,
    scripts: &'static [Script],
    #[pin]
    inner: Mutex<Inner>,
}

/// State that changes from script to script.
struct Inner {
    /// The next one.
    next: usize,
    thread: Option<KThread>,
}

impl Front {
    /// Starts the next script, unless one runs; the bus may report a state twice.
    fn begin(&self) -> Result {
        let mut inner = self.inner.lock();
        if inner.thread.is_some() {
            return Ok(());
        }
        let Some(script) = self.next_script(&mut inner) else {
            return Ok(());
        };
        self.device.switch_state(XenbusState::Initialising);
        let parts = self.create_parts(script)?;
        // The state that the last connection has recorded is out of date.
        self.session_state.set_backend_state(XenbusState::InitWait);
        let options = KThreadOptions::default();
        let thread = KThread::spawn(fmt!("hostile"), options, move |current| {
            run_script(Session::new(parts, current), script);
        })?;
        inner.thread = Some(thread);
        self.device.switch_state(XenbusState::Initialised);
        Ok(())
    }

    fn next_script(&self, inner: &mut Inner) -> Option<&'static Script> {
        let left = self.scripts.get(inner.next..)?;
        let skipped = left.iter().take_while(|one| one.is_harsh() && GENTLE.get());
        let skipped = skipped.count();
        inner.next = inner.next.wrapping_add(skipped).wrapping_add(1);
        left.get(skipped)
    }

    /// Creates ring and event channel, and publishes them.
    fn create_parts(&self, script: &Script) -> Result<Parts> {
        let device = &self.device;
        let ring = RingPages::new(device, script.order)?;
        let (req_prod, rsp_prod) = script.start;
        ring.store(REQ_PROD, req_prod);
        ring.store(RSP_PROD, rsp_prod);
        let channel = EventChannel::alloc_unbound(device, c"hostile", self.session_state.clone())?;
        publish(device, &ring, &channel, script)?;
        Ok(Parts {
            device: device.clone(),
            session_state: self.session_state.clone(),
            raw_ring: RawRing::new(ring, script.abi),
            channel,
            pages: Pages::new(device)?,
            timeout_ms: TIMEOUT_MS.get(),
        })
    }

    /// Runs the script on the connected ring.
    fn connected(&self, dev: &xenbus::Device<Core<'_>>) -> Result {
        let reader = Reader::new(dev.otherend()?);
        self.session_state.set_facts(DiskFacts {
            sectors: reader.number("sectors")?.into(),
            read_only: reader.number("info")? & info::READONLY != 0,
        });
        let inner = self.inner.lock();
        // The bus may report a state twice, and the script may have ended meanwhile.
        if inner.thread.is_none() || dev.state() != XenbusState::Initialised {
            return Ok(());
        }
        let running = self.scripts.get(inner.next.wrapping_sub(1));
        if running.is_some_and(|script| script.toggle) {
            self.toggle();
        }
        dev.switch_state(XenbusState::Connected);
        Ok(())
    }

    /// Switches through all states faster than a backend can follow.
    fn toggle(&self) {
        for _ in 0..TOGGLES {
            for state in [
                XenbusState::Connected,
                XenbusState::Closing,
                XenbusState::Closed,
                XenbusState::Initialising,
                XenbusState::Initialised,
            ] {
                self.device.switch_state(state);
            }
        }
    }
}

/// Ends the script that is running.
fn end(inner: &mut Inner) {
    let Some(thread) = inner.thread.take() else {
        return;
    };
    thread.stop();
    if !thread.join(msecs_to_jiffies(STOP_MS)) {
        pr_err!(
            "the thread of a script has not ended within {} ms\n",
            STOP_MS
        );
    }
}

/// Runs a script, in its thread.
fn run_script(session: Session<'_>, script: &Script) {
    let device = session.parts.device.clone();
    if session.await_connection() {
        (script.run)(session, script.name);
    } else {
        let session_state = session.parts.session_state.clone();
        session_state.report(script.name, Outcome::Closing, Outcome::Closing);
    }
    if device.state() == XenbusState::Connected {
        device.switch_state(XenbusState::Closing);
    }
}

/// Writes the nodes of the frontend.
fn publish(
    device: &xenbus::Device,
    ring: &RingPages,
    channel: &EventChannel<SessionState>,
    script: &Script,
) -> Result {
    let port = channel.port().ok_or(EINVAL)?;
    let dir = device.nodename();
    xenstore::transaction(|transaction| {
        let write = |node: fmt::Arguments<'_>, value: u32| {
            xenstore::write(transaction, dir, node, fmt!("{value}"))
        };
        for (index, reference) in ring.references().enumerate() {
            if script.order == 0 {
                write(fmt!("ring-ref"), reference.value())?;
            } else {
                write(fmt!("ring-ref{index}"), reference.value())?;
            }
        }
        if script.order == 0 {
            remove(transaction, dir, c"ring-page-order")?;
        } else {
            write(fmt!("ring-page-order"), script.order)?;
        }
        write(fmt!("event-channel"), port)?;
        write(fmt!("feature-persistent"), script.persistent.into())?;
        let protocol = script.abi.name();
        xenstore::write(transaction, dir, fmt!("protocol"), fmt!("{protocol}"))
    })
}

/// Removes a node, which an earlier script may have written.
fn remove(transaction: &xenstore::Transaction, dir: &CStr, node: &CStr) -> Result {
    if xenstore::exists(transaction, dir, fmt!("{node}"))? {
        xenstore::remove(transaction, dir, fmt!("{node}"))?;
    }
    Ok(())
}

impl xenbus::Driver for Front {
    const ROLE: Role = Role::Frontend;
    const NAME: &'static CStr = c"vbd-hostile";
    const ID_TABLE: IdTable = IDS.as_table();
    const ALLOW_REBIND: bool = true;
    const NOT_ESSENTIAL: bool = true;

    fn probe(dev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        let device: ARef<xenbus::Device> = dev.into();
        let session_state = SessionState::new().and_then(|session_state| {
            if dev.handle() != Some(DEVICE.get()) {
                return Err(ENODEV);
            }
            sysfs::register(dev.as_ref(), None, &ATTRIBUTES, session_state.clone())?;
            Ok(session_state)
        });
        let list = LISTS.get(LIST.get() as usize);
        try_pin_init!(Self {
            device,
            session_state: session_state?,
            scripts: list.copied().ok_or(EINVAL)?,
            inner <- new_mutex!(Inner { next: 0, thread: None }),
        })
    }

    fn otherend_changed(
        self: Pin<&Self>,
        dev: &xenbus::Device<Core<'_>>,
        state: OtherendState,
    ) -> DeviceAction {
        let Ok(state) = state else {
            return DeviceAction::Keep;
        };
        let result = match state {
            XenbusState::InitWait => self.begin(),
            XenbusState::Connected => self.connected(dev),
            _ => Ok(()),
        };
        if let Err(error) = result {
            dev.dev_fatal(error, fmt!("starting a script"));
        }
        self.session_state.set_backend_state(state);
        if matches!(
            state,
            XenbusState::Closing | XenbusState::Closed | XenbusState::Unknown
        ) {
            end(&mut self.inner.lock());
            dev.frontend_closed();
        }
        if state == XenbusState::Closed {
            dev.switch_state(XenbusState::Initialising);
        }
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, dev: &xenbus::Device<Core<'_>>) {
        end(&mut self.inner.lock());
        // The bus may read this state at the same time, see `echo_front.rs`.
        if dev.state() != XenbusState::Initialising {
            dev.switch_state(XenbusState::Closed);
        }
    }
}
