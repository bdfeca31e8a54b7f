// SPDX-License-Identifier: GPL-2.0-only

//! A model of the store and of a storage in memory, which counts the calls of a process.

use crate::record::ROOT;
use crate::registry::Registry;
use crate::storage::Storage;
use crate::store::{Change, Commit, Condition, Entry, Lease, Store};
use engine::{Errno, Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The keys of a store.
#[derive(Default)]
pub(crate) struct Keys {
    pub(crate) entries: BTreeMap<String, (Entry, Option<i64>)>,
    leases: BTreeSet<i64>,
    counter: i64,
}

/// An image of the storage.
#[derive(Clone, Default)]
pub(crate) struct Image {
    pub(crate) size: u64,
    /// The snapshots with their sizes.
    pub(crate) snapshots: BTreeMap<String, u64>,
    parent: Option<String>,
}

/// The store and the storage that all processes share.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) keys: Mutex<Keys>,
    pub(crate) images: Arc<Mutex<BTreeMap<String, Image>>>,
    /// The storage has fences.
    pub(crate) can_fence: bool,
}

impl World {
    /// Returns the same storage with an empty store.
    pub(crate) fn with_other_registry(&self) -> Arc<Self> {
        Arc::new(Self {
            keys: Mutex::default(),
            images: self.images.clone(),
            can_fence: self.can_fence,
        })
    }

    /// Returns the keys of a kind.
    pub(crate) fn keys_of(&self, kind: &str) -> Vec<String> {
        let prefix = format!("{ROOT}{kind}/");
        let keys = self.keys.lock().unwrap();
        let keys = keys.entries.keys();
        keys.filter(|key| key.starts_with(&prefix))
            .cloned()
            .collect()
    }

    pub(crate) fn expire_leases(&self) {
        let mut keys = self.keys.lock().unwrap();
        keys.leases.clear();
        keys.entries.retain(|_, (_, lease)| lease.is_none());
    }
}

/// When a fault happens, in relation to the effect of a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum When {
    Before,
    After,
}

/// An event at a call.
pub(crate) enum Event {
    Death,
    /// The answer of a call is lost, which is carried out if the fault is after its effect.
    Silence,
    /// Another process does something.
    Interruption(Box<dyn FnOnce() + Send>),
}

/// The event of a process, and the call at which it happens.
pub(crate) struct Plan {
    calls: u32,
    at: u32,
    when: When,
    pub(crate) event: Option<Event>,
    dead: bool,
}

/// One process: its access to the world.
#[derive(Clone)]
pub(crate) struct Process {
    world: Arc<World>,
    pub(crate) plan: Arc<Mutex<Plan>>,
}

fn death() -> Error {
    Error::new(Errno::OWNERDEAD, "the process is dead", "none")
}

impl Process {
    pub(crate) fn new(world: &Arc<World>, at: u32, when: When, event: Option<Event>) -> Self {
        Self {
            world: world.clone(),
            plan: Arc::new(Mutex::new(Plan {
                calls: 0,
                at,
                when,
                event,
                dead: false,
            })),
        }
    }

    pub(crate) fn healthy(world: &Arc<World>) -> Self {
        Self::new(world, u32::MAX, When::Before, None)
    }

    pub(crate) fn registry(&self) -> Registry<Self> {
        let process = self.clone();
        Registry::new(self.clone(), move |_| Ok(Box::new(process.clone())))
    }

    fn fault(&self, when: When) -> Result<()> {
        let mut plan = self.plan.lock().unwrap();
        if plan.dead {
            return Err(death());
        }
        if plan.at != plan.calls || plan.when != when {
            return Ok(());
        }
        match plan.event.take() {
            Some(Event::Death) => {
                plan.dead = true;
                Err(death())
            }
            Some(Event::Silence) => Err(error(Errno::TIMEDOUT)),
            Some(Event::Interruption(other)) => {
                drop(plan);
                other();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Carries out one call.
    fn call<T>(&self, effect: impl FnOnce(&World) -> Result<T>) -> Result<T> {
        self.fault(When::Before)?;
        let result = effect(&self.world);
        let fault = self.fault(When::After);
        self.plan.lock().unwrap().calls += 1;
        fault.and(result)
    }
}

impl Store for Process {
    fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        self.call(|world| {
            let keys = world.keys.lock().unwrap();
            let entries = keys.entries.values().map(|(entry, _)| entry.clone());
            Ok(entries
                .filter(|entry| entry.key.starts_with(prefix))
                .collect())
        })
    }

    fn commit(&self, conditions: &[Condition], changes: &[Change]) -> Result<Commit> {
        self.call(|world| {
            let mut keys = world.keys.lock().unwrap();
            let revision = |key: &String| keys.entries.get(key).map(|(entry, _)| entry.revision);
            let is_true = |condition: &Condition| match condition {
                Condition::Absent(key) => revision(key).is_none(),
                Condition::Present(key) => revision(key).is_some(),
                Condition::Unchanged(key, known) => revision(key) == Some(*known),
                Condition::NoneWith(prefix) => {
                    !keys.entries.keys().any(|key| key.starts_with(prefix))
                }
            };
            if !conditions.iter().all(is_true) {
                return Ok(Commit::Conflict);
            }
            keys.counter += 1;
            for change in changes {
                match change {
                    Change::Delete(key) => drop(keys.entries.remove(key)),
                    Change::Put(_, _, Some(lease)) if !keys.leases.contains(&lease.0) => {
                        return Err(Error::new(Errno::IO, "the lease has ended", "none"));
                    }
                    Change::Put(key, value, lease) => {
                        let entry = Entry {
                            key: key.clone(),
                            value: value.clone(),
                            revision: keys.counter,
                        };
                        keys.entries
                            .insert(key.clone(), (entry, lease.map(|lease| lease.0)));
                    }
                }
            }
            Ok(Commit::Done(keys.counter))
        })
    }

    fn grant(&self, _time: Duration) -> Result<Lease> {
        self.call(|world| {
            let mut keys = world.keys.lock().unwrap();
            keys.counter += 1;
            let lease = keys.counter;
            keys.leases.insert(lease);
            Ok(Lease(lease))
        })
    }

    fn keep_alive(&self, lease: Lease) -> Result<bool> {
        self.call(|world| Ok(world.keys.lock().unwrap().leases.contains(&lease.0)))
    }

    fn revoke(&self, lease: Lease) -> Result<()> {
        self.call(|world| {
            let mut keys = world.keys.lock().unwrap();
            keys.leases.remove(&lease.0);
            keys.entries.retain(|_, (_, of)| *of != Some(lease.0));
            Ok(())
        })
    }
}

fn error(errno: Errno) -> Error {
    Error::new(errno, "the model refuses this", "none")
}

impl Process {
    fn change(&self, image: &str, change: impl FnOnce(&mut Image)) -> Result<()> {
        self.call(|world| {
            let mut images = world.images.lock().unwrap();
            change(images.get_mut(image).ok_or_else(|| error(Errno::NOENT))?);
            Ok(())
        })
    }

    fn inspect<T>(&self, image: &str, read: impl FnOnce(&Image) -> T) -> Result<T> {
        self.call(|world| {
            let images = world.images.lock().unwrap();
            images
                .get(image)
                .map(read)
                .ok_or_else(|| error(Errno::NOENT))
        })
    }
}

impl Storage for Process {
    fn create(&self, image: &str, size: u64) -> Result<()> {
        self.call(|world| {
            let mut images = world.images.lock().unwrap();
            if images.contains_key(image) {
                return Err(error(Errno::EXIST));
            }
            let new = Image {
                size,
                ..Image::default()
            };
            images.insert(image.to_owned(), new);
            Ok(())
        })
    }

    fn clone_image(&self, parent: &str, snapshot: &str, image: &str) -> Result<()> {
        self.call(|world| {
            let mut images = world.images.lock().unwrap();
            let size = images
                .get(parent)
                .and_then(|image| image.snapshots.get(snapshot));
            let size = *size.ok_or_else(|| error(Errno::NOENT))?;
            let parent = Some(parent.to_owned());
            let clone = Image {
                size,
                parent,
                ..Image::default()
            };
            images.insert(image.to_owned(), clone);
            Ok(())
        })
    }

    fn remove(&self, image: &str, snapshots: &[String]) -> Result<()> {
        self.call(|world| {
            let mut images = world.images.lock().unwrap();
            let found = images.get(image).ok_or_else(|| error(Errno::NOENT))?;
            let is_child = |other: &Image| other.parent.as_deref() == Some(image);
            if images.values().any(is_child) {
                return Err(error(Errno::BUSY));
            }
            if !found
                .snapshots
                .keys()
                .all(|known| snapshots.contains(known))
            {
                return Err(error(Errno::NOTEMPTY));
            }
            images.remove(image);
            Ok(())
        })
    }

    fn size(&self, image: &str) -> Result<u64> {
        self.inspect(image, |image| image.size)
    }

    fn enlarge(&self, image: &str, size: u64) -> Result<()> {
        self.change(image, |image| image.size = image.size.max(size))
    }

    fn snapshot(&self, image: &str, snapshot: &str) -> Result<()> {
        self.change(image, |image| {
            let size = image.size;
            image.snapshots.entry(snapshot.to_owned()).or_insert(size);
        })
    }

    fn snapshots(&self, image: &str) -> Result<Vec<String>> {
        self.inspect(image, |image| image.snapshots.keys().cloned().collect())
    }

    fn remove_snapshot(&self, image: &str, snapshot: &str) -> Result<()> {
        self.change(image, |image| {
            image.snapshots.retain(|name, _| name != snapshot)
        })
    }

    fn list(&self) -> Result<Vec<String>> {
        self.call(|world| Ok(world.images.lock().unwrap().keys().cloned().collect()))
    }

    fn uri(&self, image: &str) -> String {
        format!("raw:/{image}")
    }

    fn can_fence(&self) -> bool {
        self.world.can_fence
    }

    fn fence(&self, _image: &str, confirm: &dyn Fn() -> Result<()>) -> Result<()> {
        self.call(|_| Ok(()))?;
        confirm()
    }
}
