// SPDX-License-Identifier: GPL-2.0-only

//! The hand-over of a volume to another host, for live migration.
//!
//! While a domain moves, both hosts have its disks. [`Registry::hand_over`] names the host that the
//! volume goes to. Nothing changes before that host attaches it. Then:
//!
//! 1. The new host writes that it takes the volume over, and waits.
//! 2. The process that has the volume reads that, and ends. The domain is suspended by then.
//! 3. The next process for the disk on the former host finds that, removes the entry of the writer,
//!    and does not attach the volume.
//! 4. The new host attaches the volume, and fences the former one if the storage can do that.
//!
//! If the domain does not arrive, the new host detaches the volume, and the former one attaches it
//! again.

use crate::holder::Holder;
use crate::name::VolumeName;
use crate::record::{image_key, parse, text};
use crate::registry::{contended, in_use, Registry};
use crate::store::{Change, Commit, Condition, Entry, Lease, Store};
use engine::{Errno, Error, Result};
use serde::{Deserialize, Serialize};
use std::thread;
use std::time::{Duration, Instant};

/// Time after which a permission that is not used ends.
const PERMISSION_TIME: Duration = Duration::from_secs(600);

/// Time for which the new host waits for the former one. The hotplug script waits longer.
const WAIT: Duration = Duration::from_secs(20);

/// Time between two checks of the entries while a hand-over is allowed.
pub(crate) const INTERVAL: Duration = Duration::from_millis(200);

/// The value of the entry of a hand-over.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HandOver {
    /// The host that has the volume.
    from: String,
    /// The host that may take it over.
    to: String,
    /// The process that takes it over.
    taker: Option<Holder>,
}

impl HandOver {
    /// Returns the process that takes the volume over.
    pub(crate) fn taker(&self) -> Option<&Holder> {
        self.taker.as_ref()
    }

    fn is_allowed(&self, from: &Holder, to: &Holder) -> bool {
        self.from == from.host && self.to == to.host && self.taker.is_none()
    }
}

/// Returns the key of the hand-over of an image.
pub(crate) fn key(storage: &str, uuid: &str) -> String {
    image_key("handover", storage, uuid)
}

/// Returns the error of a process on the former host.
pub(crate) fn handed_over(name: &VolumeName, taker: &Holder) -> Error {
    Error::new(
        Errno::BUSY,
        format!("{name} is handed over: it is being attached {taker}"),
        "detach the disk here when the domain has moved",
    )
}

impl<S: Store> Registry<S> {
    /// Allows another host to take over a volume that is attached for writing, within 10 minutes.
    pub fn hand_over(&self, name: &VolumeName, to: &str) -> Result<()> {
        let (_, volume) = self.volume(name)?;
        let writer = image_key("writer", &name.storage, &volume.uuid);
        let Some(entry) = self.store().get(&writer)? else {
            return Err(Error::new(
                Errno::NOENT,
                format!("{name} is not attached for writing"),
                "it can be attached on any host",
            ));
        };
        let holder: Holder = parse(&entry)?;
        if holder.host == to {
            return Err(Error::new(
                Errno::INVAL,
                format!("{name} is attached on host {to} already"),
                "name the host that the domain moves to",
            ));
        }
        let value = HandOver {
            from: holder.host,
            to: to.to_owned(),
            taker: None,
        };
        let lease = self.store().grant(PERMISSION_TIME)?;
        let put = Change::Put(key(&name.storage, &volume.uuid), text(&value)?, Some(lease));
        let conditions = [Condition::Unchanged(writer, entry.revision)];
        match self.store().commit(&conditions, &[put])? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict => Err(contended(name)),
        }
    }
}

/// An image whose writer another process becomes.
pub(crate) struct Takeover<'a, S> {
    pub(crate) store: &'a S,
    pub(crate) name: &'a VolumeName,
    pub(crate) uuid: &'a str,
    /// The process that attaches the volume.
    pub(crate) holder: &'a Holder,
}

impl<S: Store> Takeover<'_, S> {
    fn key(&self, kind: &str) -> String {
        image_key(kind, &self.name.storage, self.uuid)
    }

    fn entry(&self) -> Result<Option<(Entry, HandOver)>> {
        let entry = self.store.get(&key(&self.name.storage, self.uuid))?;
        entry
            .map(|entry| {
                let value = parse(&entry)?;
                Ok((entry, value))
            })
            .transpose()
    }

    /// Has the writer on another host end, if the volume is handed over from there to this host.
    ///
    /// `lease` is that of this process.
    pub(crate) fn request(&self, lease: Lease) -> Result<()> {
        let Some(writer) = self.store.get(&self.key("writer"))? else {
            return Ok(());
        };
        let former: Holder = parse(&writer)?;
        let Some((entry, mut value)) = self.entry()? else {
            return Ok(());
        };
        if !value.is_allowed(&former, self.holder) {
            return Ok(());
        }
        value.taker = Some(self.holder.clone());
        let conditions = [
            Condition::Unchanged(entry.key.clone(), entry.revision),
            Condition::Unchanged(writer.key.clone(), writer.revision),
        ];
        let put = Change::Put(entry.key, text(&value)?, Some(lease));
        match self.store.commit(&conditions, &[put])? {
            Commit::Done(_) => self.wait(&writer, &former, lease),
            Commit::Conflict => Err(contended(self.name)),
        }
    }

    /// Waits until the entry of the former writer is gone. After an error the former host keeps the
    /// volume, as soon as the lease has ended.
    fn wait(&self, writer: &Entry, former: &Holder, lease: Lease) -> Result<()> {
        let deadline = Instant::now() + WAIT;
        while self.store.get(&writer.key)?.is_some() {
            if Instant::now() > deadline || !self.store.keep_alive(lease)? {
                return Err(in_use(self.name, former));
            }
            thread::sleep(INTERVAL);
        }
        Ok(())
    }

    /// Returns the entry of a hand-over if there is one. The error is that another process takes
    /// the volume over, after the entry of the former writer was removed if it has ended.
    ///
    /// On a storage with a fence the new host uses that, so the entry of the last writer stays.
    pub(crate) fn check(&self, can_fence: bool) -> Result<Option<Entry>> {
        let Some((entry, value)) = self.entry()? else {
            return Ok(None);
        };
        let Some(taker) = value.taker() else {
            return Ok(Some(entry));
        };
        if taker == self.holder {
            return Ok(Some(entry));
        }
        if let Some(writer) = self.store.get(&self.key("writer"))? {
            let former: Holder = parse(&writer)?;
            if former.has_ended(self.holder) {
                let conditions = [
                    Condition::Unchanged(entry.key, entry.revision),
                    Condition::Unchanged(writer.key.clone(), writer.revision),
                ];
                let mut changes = vec![Change::Delete(writer.key)];
                if !can_fence {
                    changes.push(Change::Delete(self.key("last")));
                }
                let _done = self.store.commit(&conditions, &changes)?;
            }
        }
        Err(handed_over(self.name, taker))
    }
}
