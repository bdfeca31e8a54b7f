// SPDX-License-Identifier: GPL-2.0-only

//! The single writer of a volume.
//!
//! A volume is attached for writing by at most one process of the cluster. Its entry has a lease,
//! which a thread keeps alive. An entry without a lease says where the volume was attached last,
//! until it is detached there. If only that one is left, the process is dead, or its host is dead,
//! frozen or without a network: writes of it may come late.
//!
//! * A storage that can [fence](crate::storage::Storage::fence) refuses such writes from then on.
//! * On other storages the volume can be attached only where the process is known to have ended: on
//!   the same host. On another host, the administrator confirms that with [`Registry::release`].
//!
//! A writer on a host that lives gives the volume up only if it is [handed over](crate::hand_over).
//!
//! A process that ends with requests in flight has a successor on the same host, which executes
//! them again. It may do so only if the volume was not used elsewhere meanwhile, even if it is free
//! again. So an entry without a lease says which disk has used the volume last. It is written when
//! the guest of that disk is about to connect ([`Attachment::record_use`]): a migration that fails
//! before that leaves the entry as it is.
//!
//! When etcd does not answer, the process continues. When etcd answers again after the lease has
//! ended, the process takes its place again, unless another one has taken it meanwhile.

use crate::hand_over::{self, handed_over, HandOver, Takeover};
use crate::holder::{Holder, User};
use crate::name::VolumeName;
use crate::random::random_uuid;
use crate::record::{image_key, image_name, parse, text};
use crate::registry::{contended, in_use, Registry};
use crate::storage::Storage;
use crate::store::{Change, Commit, Condition, Entry, Lease, Store};
use engine::{Errno, Error, Result, Uri};
use std::fmt;
use std::io::{self, Write};
use std::slice;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Time after which a writer that does not renew its lease is taken for dead.
pub const LEASE_TIME: Duration = Duration::from_secs(10);

/// The error of a process that is to continue the writes of another one, if another disk has used
/// the volume since. No library returns it.
pub const USED_SINCE: Errno = Errno::REMCHG;

/// Number of attempts against other processes that attach the same volume.
const ATTEMPTS: u32 = 4;

/// The use of a volume by a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// It reads.
    Read,
    /// It writes, and begins with what is on the storage.
    Write,
    /// It continues the writes of the process before it, whose guest is connected.
    Continue,
}

/// Records that the guest of a disk uses a volume.
pub type RecordUse = dyn Fn() -> Result<()> + Send + Sync;

/// A volume that this process has attached.
pub struct Attachment {
    /// The URI of the image.
    pub uri: String,
    /// Ends the thread; `true` also removes the entries.
    stop: Sender<bool>,
    can_fence: bool,
    record_use: Arc<RecordUse>,
    thread: Option<JoinHandle<()>>,
}

/// The entries of an attachment.
#[derive(Clone)]
struct Keys {
    name: VolumeName,
    /// The uuid of the image.
    uuid: String,
    /// The entry with the lease.
    own: String,
    /// The holder.
    value: String,
    /// The disk that it serves.
    user: User,
    /// The time after which the lease ends.
    lease_time: Duration,
}

/// An attachment that was written to the store.
#[derive(Clone, Copy)]
enum Held {
    /// The volume is attached for reading.
    Reader(Lease),
    /// The volume is attached for writing.
    Writer(Lease),
}

impl Held {
    fn lease(self) -> Lease {
        match self {
            Self::Reader(lease) | Self::Writer(lease) => lease,
        }
    }
}

impl Keys {
    fn key(&self, kind: &str) -> String {
        image_key(kind, &self.name.storage, &self.uuid)
    }

    fn hand_over(&self) -> String {
        hand_over::key(&self.name.storage, &self.uuid)
    }

    fn put_own(&self, lease: Lease) -> Change {
        Change::Put(self.own.clone(), self.value.clone(), Some(lease))
    }

    fn put_last(&self) -> Change {
        Change::Put(self.key("last"), self.value.clone(), None)
    }

    fn put_user(&self) -> Result<Change> {
        Ok(Change::Put(self.key("user"), text(&self.user)?, None))
    }

    /// Returns `true` if an entry was written by this process.
    fn is_own(&self, entry: &Entry) -> bool {
        entry.value == self.value
    }

    fn was_removed(&self) -> Error {
        Error::new(
            Errno::SHUTDOWN,
            format!(
                "{} was removed, and there is another volume of this name",
                self.name
            ),
            "detach the disk here, and attach it again",
        )
    }

    fn lost(&self) -> Error {
        Error::new(
            Errno::SHUTDOWN,
            format!("another host has taken {} over", self.name),
            "detach the disk here",
        )
    }
}

impl Attachment {
    /// Attaches a volume.
    ///
    /// The error is `EBUSY`, and names the holder, if the volume is attached for writing elsewhere,
    /// or attached at all when this is for writing. It is [`USED_SINCE`] if a process is to
    /// continue the writes of another one, and another disk has used the volume since: it must
    /// never try again. `lost` is called if another process has taken the volume over, after which
    /// the image must not be used any more.
    pub fn new<S: Store + 'static>(
        registry: Arc<Registry<S>>,
        name: &VolumeName,
        holder: &Holder,
        access: Access,
        lease_time: Duration,
        lost: impl FnOnce(Error) + Send + 'static,
    ) -> Result<Self> {
        let (_, volume) = registry.volume(name)?;
        let storage = registry.storage(&name.storage)?;
        let key = |kind| image_key(kind, &name.storage, &volume.uuid);
        let uri = storage.uri(&image_name(&volume.uuid));
        // Nothing was written so far.
        uri.parse::<Uri>()?;
        let own = match access {
            Access::Read => format!("{}/{}", key("reader"), random_uuid()?),
            Access::Write | Access::Continue => key("writer"),
        };
        let keys = Keys {
            name: name.clone(),
            uuid: volume.uuid,
            own,
            value: text(holder)?,
            user: holder.user(),
            lease_time,
        };
        let held = match access {
            Access::Read => attach_reader(&registry, &keys)?,
            _ => attach_writer(&registry, &*storage, &keys, holder, access)?,
        };
        let record_use = recorder(registry.clone(), keys.clone(), access);
        let (this_registry, these_keys) = (registry.clone(), keys.clone());
        let (stop, stopped) = channel();
        let keeper = Keeper {
            registry,
            interval: keys.lease_time.div_f64(3.0),
            keys,
            held,
        };
        let thread = thread::Builder::new().name("lease".to_owned());
        let thread = thread.spawn(move || {
            if let Err(error) = keeper.run(|time| stopped.recv_timeout(time)) {
                lost(error);
            }
        });
        let thread = thread.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            undo_attach(&this_registry, &*storage, &these_keys, held.lease());
            Error::new(
                errno,
                format!("starting a thread: {error}"),
                "free some memory",
            )
        })?;
        Ok(Self {
            uri,
            stop,
            can_fence: storage.can_fence(),
            record_use,
            thread: Some(thread),
        })
    }

    /// Returns what records that the guest uses the volume from now on. That must come before its
    /// first request.
    pub fn record_use(&self) -> Arc<RecordUse> {
        self.record_use.clone()
    }

    /// Allows other processes to attach the volume: the process that had the image open has closed
    /// it (`is_closed`), or has ended without that.
    pub fn detach(mut self, is_closed: bool) {
        // Requests of a process that has ended may still come to the storage. The next writer
        // fences them, or gets the engine's lock after them.
        let removes = is_closed || !self.can_fence;
        // A thread that has ended has lost the volume.
        let _ = self.stop.send(removes);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn attach_reader<S: Store>(registry: &Registry<S>, keys: &Keys) -> Result<Held> {
    let store = registry.store();
    let lease = store.grant(keys.lease_time)?;
    let put = keys.put_own(lease);
    let writer = keys.key("writer");
    for _ in 0..ATTEMPTS {
        let (entry, volume) = registry.volume(&keys.name)?;
        if volume.uuid != keys.uuid {
            return Err(keys.was_removed());
        }
        let conditions = [
            Condition::Unchanged(entry.key, entry.revision),
            Condition::Absent(writer.clone()),
        ];
        if let Commit::Done(_) = store.commit(&conditions, slice::from_ref(&put))? {
            return Ok(Held::Reader(lease));
        }
        if let Some(entry) = store.get(&writer)? {
            return Err(in_use(&keys.name, &parse(&entry)?));
        }
    }
    Err(contended(&keys.name))
}

/// Attaches a volume for writing. If the former writer has not detached it, its writes are not
/// accepted after this.
fn attach_writer<S: Store>(
    registry: &Registry<S>,
    storage: &dyn Storage,
    keys: &Keys,
    holder: &Holder,
    access: Access,
) -> Result<Held> {
    let lease = registry.store().grant(keys.lease_time)?;
    let attached = attach_with(registry, storage, keys, holder, access, lease);
    if attached.is_err() {
        undo_attach(registry, storage, keys, lease);
    }
    attached.map(|()| Held::Writer(lease))
}

/// Removes what an attempt to attach a volume may have written. The image was not opened.
fn undo_attach<S: Store>(registry: &Registry<S>, storage: &dyn Storage, keys: &Keys, lease: Lease) {
    let store = registry.store();
    // It ends by itself otherwise. A transaction with it that is applied late fails.
    let _ = store.revoke(lease);
    // On a storage with a fence the entry stands for a former writer, which may not be fenced yet.
    if !storage.can_fence() {
        // If this fails, the next process on this host finds that this one has ended.
        let _ = remove_last(store, keys, &[]);
    }
}

/// Removes the entry of the last writer if it is this process, and with it other keys.
fn remove_last<S: Store>(store: &S, keys: &Keys, others: &[String]) -> Result<()> {
    for _ in 0..ATTEMPTS {
        let last = store.get(&keys.key("last"))?;
        let Some(last) = last.filter(|entry| keys.is_own(entry)) else {
            return Ok(());
        };
        let conditions = [Condition::Unchanged(last.key.clone(), last.revision)];
        let others = others.iter().cloned().map(Change::Delete);
        let changes: Vec<Change> = others.chain([Change::Delete(last.key)]).collect();
        if let Commit::Done(_) = store.commit(&conditions, &changes)? {
            return Ok(());
        }
    }
    Err(contended(&keys.name))
}

fn attach_with<S: Store>(
    registry: &Registry<S>,
    storage: &dyn Storage,
    keys: &Keys,
    holder: &Holder,
    access: Access,
    lease: Lease,
) -> Result<()> {
    let store = registry.store();
    let readers = keys.key("reader") + "/";
    let takeover = Takeover {
        store,
        name: &keys.name,
        uuid: &keys.uuid,
        holder,
    };
    takeover.request(lease)?;
    for _ in 0..ATTEMPTS {
        let (entry, volume) = registry.volume(&keys.name)?;
        let user = store.get(&keys.key("user"))?;
        if access == Access::Continue {
            check_user(keys, &user)?;
        }
        let hand_over = takeover.check(storage.can_fence())?;
        let writer = store.get(&keys.own)?;
        let last = store.get(&keys.key("last"))?;
        check_former(keys, holder, storage.can_fence(), &writer, &last)?;
        if volume.uuid != keys.uuid {
            return Err(keys.was_removed());
        }
        let conditions = [
            Condition::Unchanged(entry.key, entry.revision),
            unchanged(&writer, &keys.own),
            unchanged(&last, &keys.key("last")),
            unchanged(&hand_over, &keys.hand_over()),
            unchanged(&user, &keys.key("user")),
            Condition::NoneWith(readers.clone()),
        ];
        let mut changes = vec![keys.put_own(lease), keys.put_last()];
        if access == Access::Continue {
            changes.push(keys.put_user()?);
        }
        if !keeps_permission(access, &hand_over)? {
            changes.push(Change::Delete(keys.hand_over()));
        }
        if let Commit::Done(_) = store.commit(&conditions, &changes)? {
            return match last.is_some() && storage.can_fence() {
                true => fence(store, storage, keys, lease),
                false => Ok(()),
            };
        }
        if let Some(entry) = store.list(&readers)?.first() {
            return Err(in_use(&keys.name, &parse(entry)?));
        }
    }
    Err(contended(&keys.name))
}

/// Returns `true` if a hand-over stays allowed: it is for a guest that still has the disk.
fn keeps_permission(access: Access, entry: &Option<Entry>) -> Result<bool> {
    let value: Option<HandOver> = entry.as_ref().map(parse).transpose()?;
    let is_permission = value.is_some_and(|value| value.taker().is_none());
    Ok(access == Access::Continue && is_permission)
}

/// Checks that no other disk has used the volume since this one did.
fn check_user(keys: &Keys, entry: &Option<Entry>) -> Result<()> {
    let user: Option<User> = entry.as_ref().map(parse).transpose()?;
    match user.filter(|user| *user != keys.user) {
        Some(user) => Err(Error::new(
            USED_SINCE,
            format!("{} was used {user} after this disk", keys.name),
            "detach the disk here: its guest does not know what was written there",
        )),
        None => Ok(()),
    }
}

/// Returns what records that the guest uses the volume.
fn recorder<S: Store + 'static>(
    registry: Arc<Registry<S>>,
    keys: Keys,
    access: Access,
) -> Arc<RecordUse> {
    Arc::new(move || match access {
        Access::Write => record_use(registry.store(), &keys),
        // One that continues has recorded it with the attachment.
        Access::Read | Access::Continue => Ok(()),
    })
}

/// Records that the guest of this disk uses the volume, which this process still has.
fn record_use<S: Store>(store: &S, keys: &Keys) -> Result<()> {
    for _ in 0..ATTEMPTS {
        let last = store.get(&keys.key("last"))?;
        let Some(last) = last.filter(|entry| keys.is_own(entry)) else {
            return Err(keys.lost());
        };
        let conditions = [Condition::Unchanged(last.key, last.revision)];
        if let Commit::Done(_) = store.commit(&conditions, &[keys.put_user()?])? {
            return Ok(());
        }
    }
    Err(contended(&keys.name))
}

/// Checks that the former writer has ended, or that its writes can be refused.
fn check_former(
    keys: &Keys,
    holder: &Holder,
    can_fence: bool,
    writer: &Option<Entry>,
    last: &Option<Entry>,
) -> Result<()> {
    if let Some(entry) = writer {
        let current: Holder = parse(entry)?;
        if !current.has_ended(holder) {
            return Err(in_use(&keys.name, &current));
        }
    }
    if let Some(entry) = last.as_ref().filter(|_| !can_fence) {
        let former: Holder = parse(entry)?;
        if !former.has_ended(holder) && !former.has_rebooted(holder) {
            return Err(Error::new(
                Errno::BUSY,
                format!(
                    "{} was attached {former}, which may still write to it",
                    keys.name
                ),
                format!(
                    "wait until that host answers again, or make sure that it is off and run rblk \
                     volume release {}",
                    keys.name
                ),
            ));
        }
    }
    Ok(())
}

fn unchanged(entry: &Option<Entry>, key: &str) -> Condition {
    match entry {
        Some(entry) => Condition::Unchanged(entry.key.clone(), entry.revision),
        None => Condition::Absent(key.to_owned()),
    }
}

/// Has the storage refuse the writes of the former writer.
///
/// A process that is slower than its lease does not harm the next writer: the storage has the lock
/// of the former one while the lease is confirmed, and breaks that lock only.
fn fence<S: Store>(store: &S, storage: &dyn Storage, keys: &Keys, lease: Lease) -> Result<()> {
    let confirm = || match store.keep_alive(lease)? {
        true => Ok(()),
        false => Err(keys.lost()),
    };
    storage.fence(&image_name(&keys.uuid), &confirm)
}

/// Keeps the lease of an attachment alive.
struct Keeper<S> {
    registry: Arc<Registry<S>>,
    keys: Keys,
    held: Held,
    /// The time between two renewals.
    interval: Duration,
}

/// Writes a message. `eprintln!` would end the process if the file system of its messages is full.
fn report(volume: &VolumeName, text: &dyn fmt::Display) {
    let _ = writeln!(io::stderr(), "{volume}: {text}");
}

/// Returns `true` if the error of a renewal means that the volume is no longer attached.
fn is_loss(error: &Error) -> bool {
    matches!(error.errno(), Errno::SHUTDOWN | Errno::NOENT | Errno::BUSY)
}

impl<S: Store> Keeper<S> {
    /// Runs until `wait` returns how the attachment ends. The error is that it was lost.
    fn run(
        mut self,
        mut wait: impl FnMut(Duration) -> std::result::Result<bool, RecvTimeoutError>,
    ) -> Result<()> {
        let mut reported = String::new();
        let removes = loop {
            match wait(self.interval) {
                Ok(removes) => break removes,
                Err(RecvTimeoutError::Timeout) => {}
                // The image may still be open, so the lease just ends.
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            // etcd may answer again.
            let failure = match self.renew() {
                Err(error) if is_loss(&error) => return Err(error),
                Err(error) => error.to_string(),
                Ok(()) => String::new(),
            };
            if !failure.is_empty() && failure != reported {
                report(&self.keys.name, &failure);
            }
            reported = failure;
        };
        if let Err(error) = self.detach(removes) {
            report(&self.keys.name, &format_args!("not detached: {error}"));
        }
        Ok(())
    }

    fn renew(&mut self) -> Result<()> {
        let store = self.registry.store();
        if store.keep_alive(self.held.lease())? {
            return self.check_hand_over();
        }
        self.held = match self.held {
            Held::Reader(_) => attach_reader(&self.registry, &self.keys).map_err(|error| {
                // Another process writes to the volume.
                match error.errno() {
                    Errno::BUSY => self.keys.lost(),
                    _ => error,
                }
            })?,
            Held::Writer(_) => self.attach_again()?,
        };
        Ok(())
    }

    /// Returns an error if the volume is handed over. Once that is allowed, checks are frequent.
    fn check_hand_over(&mut self) -> Result<()> {
        if let Held::Reader(_) = self.held {
            return Ok(());
        }
        let entry = self.registry.store().get(&self.keys.hand_over())?;
        self.interval = match entry {
            Some(_) => hand_over::INTERVAL,
            None => self.keys.lease_time.div_f64(3.0),
        };
        self.refuse_taker(&entry)
    }

    /// Returns an error if another process takes the volume over.
    fn refuse_taker(&self, entry: &Option<Entry>) -> Result<()> {
        let value: Option<HandOver> = entry.as_ref().map(parse).transpose()?;
        match value.as_ref().and_then(HandOver::taker) {
            Some(taker) => Err(handed_over(&self.keys.name, taker)),
            None => Ok(()),
        }
    }

    /// Takes the place of the writer again, which no other process has taken meanwhile.
    fn attach_again(&self) -> Result<Held> {
        let (store, keys) = (self.registry.store(), &self.keys);
        let lease = store.grant(keys.lease_time)?;
        let hand_over = store.get(&keys.hand_over())?;
        self.refuse_taker(&hand_over)?;
        let own = store.get(&keys.own)?;
        let last = store.get(&keys.key("last"))?;
        // An attempt whose answer was lost may have written both.
        let is_own = |entry: &Entry| keys.is_own(entry);
        if !last.as_ref().is_some_and(is_own) || !own.as_ref().is_none_or(is_own) {
            return Err(keys.lost());
        }
        let readers = keys.key("reader") + "/";
        let conditions = [
            unchanged(&own, &keys.own),
            unchanged(&last, &keys.key("last")),
            unchanged(&hand_over, &keys.hand_over()),
            Condition::NoneWith(readers.clone()),
        ];
        let changes = [keys.put_own(lease), keys.put_last()];
        match store.commit(&conditions, &changes)? {
            Commit::Done(_) => Ok(Held::Writer(lease)),
            Commit::Conflict if !store.list(&readers)?.is_empty() => Err(keys.lost()),
            // The next renewal looks again.
            Commit::Conflict => Err(contended(&keys.name)),
        }
    }

    /// Ends the lease, and before that removes the entries, if `removes` is set and they are still
    /// those of this attachment.
    fn detach(&self, removes: bool) -> Result<()> {
        let store = self.registry.store();
        if let (true, Held::Writer(_)) = (removes, self.held) {
            remove_last(store, &self.keys, slice::from_ref(&self.keys.own))?;
        }
        store.revoke(self.held.lease())
    }
}

#[cfg(test)]
mod tests;
