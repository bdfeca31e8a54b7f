// SPDX-License-Identifier: GPL-2.0-only

//! Exports of NBD servers, over TCP or a unix socket.
//!
//! It corresponds to QEMU's `block/nbd.c`. Each queue has a connection of its own. When a
//! connection is lost, the queue connects again and sends the requests in flight again, for up to
//! [`Options::reconnect_timeout`]; then they fail with `ENOTCONN`.
//!
//! NBD has no locks: another client may write to the same export.

mod connect;
mod protocol;
mod queue;
mod reply;
mod server;

use crate::connect::{Connect, Protocol};
use crate::error::{Error, Result};
use crate::info::{Discard, Guarantees, Info};
use crate::memory::{allocate, in_use};
use crate::options::Options;
use crate::reconnect::connect_in_time;
use crate::uri::NbdExport;
use crate::writes::Writes;
use crate::{Engine, Queue};
pub(crate) use connect::connect_to;
use connect::{negotiate, ExportInfo, Stream};
use io_buffer::Buffer;
use protocol::{
    FLAG_CAN_MULTI_CONN, FLAG_READ_ONLY, FLAG_SEND_FLUSH, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES,
};
use queue::{flush_blocking, NbdQueue};
use rustix::io::Errno;
pub use server::{Export, DEPTH};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The greatest length of a transfer that a server has to support by default.
const MAX_TRANSFER: u32 = 32 << 20;

/// The greatest number of buffers of a request.
const MAX_BUFFERS: usize = 8192;

/// The smallest and the greatest block size that a disk can have.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;

/// The greatest number of connections.
const MAX_QUEUES: usize = 16;

/// An export of an NBD server.
pub struct NbdEngine {
    shared: Arc<Shared>,
}

/// The state that the queues of an export share.
struct Shared {
    export: NbdExport,
    server: Arc<dyn Connect>,
    /// The server keeps the writes that a flush could not make durable for lack of space.
    keeps_writes: bool,
    writes: Writes,
    reconnect_timeout: Duration,
    /// The features of the server.
    flags: u16,
    /// The geometry, with the size at the time of opening.
    info: Info,
    size: AtomicU64,
    queues: AtomicUsize,
    /// A connection that no queue uses.
    idle: Mutex<Option<Stream>>,
}

impl NbdEngine {
    /// Opens `export` over connections that `server` makes.
    pub fn open(export: &NbdExport, options: &Options, server: Arc<dyn Connect>) -> Result<Self> {
        Self::new(export, options, server, false)
    }

    /// Opens the export of a daemon that belongs to the image.
    pub(crate) fn of_daemon(
        export: &NbdExport,
        options: &Options,
        server: Arc<dyn Connect>,
    ) -> Result<Self> {
        Self::new(export, options, server, true)
    }

    fn new(
        export: &NbdExport,
        options: &Options,
        server: Arc<dyn Connect>,
        keeps_writes: bool,
    ) -> Result<Self> {
        let (stream, found) = negotiate(export, server.connect(Protocol::Nbd, false)?)?;
        let info = info(export, &found, options)?;
        Ok(Self {
            shared: Arc::new(Shared {
                export: export.clone(),
                server,
                keeps_writes,
                writes: Writes::default(),
                reconnect_timeout: options.reconnect_timeout,
                flags: found.flags,
                info,
                size: AtomicU64::new(info.size),
                queues: AtomicUsize::new(0),
                idle: Mutex::new(Some(stream)),
            }),
        })
    }
}

/// Returns the geometry of an export.
fn info(export: &NbdExport, found: &ExportInfo, options: &Options) -> Result<Info> {
    let refuse = |errno, why: &str, remedy: &'static str| {
        Err(Error::new(
            errno,
            format!("{export} cannot be used: {why}"),
            remedy,
        ))
    };
    let has = |flag| found.flags & flag != 0;
    if has(FLAG_READ_ONLY) && !options.read_only {
        return refuse(
            Errno::ROFS,
            "the server exports it for reading only",
            "attach the disk read-only, or export it for writing",
        );
    }
    let (least, preferred, most) = found.blocks.unwrap_or((1, 512, MAX_TRANSFER));
    let logical = least.max(*BLOCK_SIZES.start());
    if !logical.is_power_of_two() || !BLOCK_SIZES.contains(&logical) {
        return refuse(
            Errno::INVAL,
            "its smallest block size is no power of two up to 4096",
            "configure the server",
        );
    }
    let in_blocks = |value: u64| value.saturating_sub(value % u64::from(logical));
    let size = in_blocks(found.size);
    if size == 0 {
        return refuse(Errno::INVAL, "it is empty", "export an image with a size");
    }
    let physical = match preferred.is_power_of_two() {
        true => preferred.clamp(logical, 64 << 10),
        false => logical,
    };
    Ok(Info {
        size,
        logical_block_size: logical,
        physical_block_size: physical,
        max_transfer: in_blocks(u64::from(most.min(MAX_TRANSFER))).max(u64::from(logical)),
        max_buffers: MAX_BUFFERS,
        max_queues: match has(FLAG_CAN_MULTI_CONN) {
            true => MAX_QUEUES,
            false => 1,
        },
        buffer_alignment: 1,
        read_only: options.read_only,
        discard: (has(FLAG_SEND_TRIM) && !options.read_only).then_some(Discard {
            granularity: physical,
            alignment: 0,
        }),
        write_zeroes: has(FLAG_SEND_WRITE_ZEROES) && !options.read_only,
        guarantees: Guarantees {
            durable: has(FLAG_SEND_FLUSH),
            direct: false,
            exclusive: false,
        },
    })
}

impl Shared {
    fn info(&self) -> Info {
        Info {
            size: self.size.load(Ordering::Relaxed),
            ..self.info
        }
    }

    fn idle(&self) -> MutexGuard<'_, Option<Stream>> {
        // The option is valid at any time.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects again.
    ///
    /// The export must be at least as large as before and support the same.
    fn reconnect(&self) -> Result<Stream> {
        let is_dirty = self.writes.is_dirty();
        let stream = self.server.connect(Protocol::Nbd, is_dirty)?;
        let (stream, found) = negotiate(&self.export, stream)?;
        if found.size < self.info().size || found.flags != self.flags {
            return Err(Error::new(
                Errno::NOTRECOVERABLE,
                format!("{} has changed while it was not connected", self.export),
                "export the same image again",
            ));
        }
        Ok(stream)
    }
}

impl Engine for NbdEngine {
    fn info(&self) -> Info {
        self.shared.info()
    }

    fn refresh(&self) -> Result<Info> {
        // The protocol tells the size at the start of a connection only.
        let shared = self.shared.clone();
        let found = connect_in_time(move || {
            let is_dirty = shared.writes.is_dirty();
            let stream = shared.server.connect(Protocol::Nbd, is_dirty)?;
            Ok(negotiate(&shared.export, stream)?.1)
        })?;
        let block = u64::from(self.shared.info.logical_block_size);
        let size = found.size.saturating_sub(found.size % block);
        self.shared.size.store(size, Ordering::Relaxed);
        Ok(self.info())
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn Queue>> {
        let max = self.shared.info.max_queues;
        let count = |count: usize| (count < max).then(|| count.saturating_add(1));
        self.shared
            .queues
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, count)
            .map_err(|_| {
                Error::new(
                    Errno::BUSY,
                    format!("{} supports {max} queues only", self.shared.export),
                    "use fewer queues, or a server that supports several connections",
                )
            })?;
        match NbdQueue::new(self.shared.clone(), depth) {
            Ok(queue) => Ok(Box::new(queue)),
            Err(error) => {
                self.shared.queues.fetch_sub(1, Ordering::AcqRel);
                Err(error)
            }
        }
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        allocate(len, 4096)
    }

    fn close(self: Box<Self>) -> Result<()> {
        if self.shared.queues.load(Ordering::Acquire) > 0 {
            return Err(in_use());
        }
        if self.shared.info.read_only || !self.shared.info.guarantees.durable {
            return Ok(());
        }
        let idle = self.shared.idle().take();
        match idle.map(|stream| flush_blocking(&self.shared, stream)) {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => flush_blocking(&self.shared, self.shared.reconnect()?),
        }
    }
}
