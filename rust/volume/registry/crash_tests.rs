// SPDX-License-Identifier: GPL-2.0-only

//! All points at which a process can die, or another one can get ahead of it, enumerated.
//!
//! Store and storage are a model in memory, which counts the calls of a process. At each call,
//! before or after its effect, the process dies, or another process carries out a whole operation,
//! with or without the end of all leases. After that and a collection the storage has exactly the
//! images of the registry.

use super::{Collected, Registry, VolumeName};
use crate::record::{image_name, Volume, ROOT};
use crate::storage::Storage;
use crate::store::{Change, Commit, Condition, Entry, Lease, Store};
use engine::{Errno, Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SIZE: u64 = 1 << 20;

#[derive(Default)]
struct Keys {
    entries: BTreeMap<String, (Entry, Option<i64>)>,
    leases: BTreeSet<i64>,
    counter: i64,
}

#[derive(Clone, Default)]
struct Image {
    size: u64,
    /// The snapshots with their sizes.
    snapshots: BTreeMap<String, u64>,
    parent: Option<String>,
}

/// The store and the storage that all processes share.
#[derive(Default)]
struct World {
    keys: Mutex<Keys>,
    images: Mutex<BTreeMap<String, Image>>,
}

impl World {
    fn expire_leases(&self) {
        let mut keys = self.keys.lock().unwrap();
        keys.leases.clear();
        keys.entries.retain(|_, (_, lease)| lease.is_none());
    }
}

/// When a fault happens, in relation to the effect of a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum When {
    Before,
    After,
}

/// An event at a call.
enum Event {
    Death,
    /// Another process does something.
    Interruption(Box<dyn FnOnce() + Send>),
}

struct Plan {
    calls: u32,
    at: u32,
    when: When,
    event: Option<Event>,
    dead: bool,
}

/// One process: its access to the world.
#[derive(Clone)]
struct Process {
    world: Arc<World>,
    plan: Arc<Mutex<Plan>>,
}

fn death() -> Error {
    Error::new(Errno::OWNERDEAD, "the process is dead", "none")
}

impl Process {
    fn new(world: &Arc<World>, at: u32, when: When, event: Option<Event>) -> Self {
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

    fn healthy(world: &Arc<World>) -> Self {
        Self::new(world, u32::MAX, When::Before, None)
    }

    fn registry(&self) -> Registry<Self> {
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
        self.fault(When::After)?;
        self.plan.lock().unwrap().calls += 1;
        result
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
        image.to_owned()
    }

    fn can_fence(&self) -> bool {
        false
    }

    fn fence(&self, _image: &str, _confirm: &dyn Fn() -> Result<()>) -> Result<()> {
        Err(error(Errno::OPNOTSUPP))
    }
}

/// An operation on the volume `s/old`, which has the snapshot `first`, or on the name `s/new`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Operation {
    Create,
    Clone,
    Resize,
    ResizeMore,
    Snapshot,
    Remove,
    Collect,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Create,
    Operation::Clone,
    Operation::Resize,
    Operation::ResizeMore,
    Operation::Snapshot,
    Operation::Remove,
    Operation::Collect,
];

fn name(volume: &str) -> VolumeName {
    format!("s/{volume}").parse().unwrap()
}

fn run(process: &Process, operation: Operation) -> Result<()> {
    let registry = process.registry();
    match operation {
        Operation::Create => registry.create(&name("new"), SIZE),
        Operation::Clone => registry.clone_volume(&name("old"), "first", &name("new")),
        Operation::Resize => registry.resize(&name("old"), 2 * SIZE),
        Operation::ResizeMore => registry.resize(&name("old"), 3 * SIZE),
        Operation::Snapshot => registry.snapshot(&name("old"), "second"),
        Operation::Remove => registry.remove(&name("old")).map(drop),
        Operation::Collect => registry.collect("s").map(drop),
    }
}

fn world() -> Arc<World> {
    let world = Arc::new(World::default());
    let registry = Process::healthy(&world).registry();
    registry.add_storage("s", "model").unwrap();
    registry.create(&name("old"), SIZE).unwrap();
    registry.snapshot(&name("old"), "first").unwrap();
    // What a creator leaves that died: an orphan, and an image that is not known at all.
    let process = Process::healthy(&world);
    let unknown = image_name("00000000-0000-0000-0000-000000000001");
    process.create(&unknown, SIZE).unwrap();
    world
}

/// Checks that registry and storage agree after all processes have ended.
fn check(world: &Arc<World>, context: &str) {
    world.expire_leases();
    let registry = Process::healthy(world).registry();
    // Clones come before their parents in the second run only.
    registry.collect("s").unwrap();
    let collected = registry.collect("s").unwrap();
    let volumes = registry.list(Some("s")).unwrap();
    let images = world.images.lock().unwrap().clone();
    let is_clone = |volume: &Volume| volume.clone_of.is_some();
    let has_clone = volumes.iter().any(|info| is_clone(&info.volume));
    let allowed = collected.waiting.len();
    assert!(
        allowed == 0 || (has_clone && allowed == 1),
        "{context}: {collected:?}"
    );
    assert_eq!(
        images.len(),
        volumes.len() + allowed,
        "{context}: {:?}",
        images.keys()
    );
    assert_eq!(collected.missing, Vec::<String>::new(), "{context}");
    for info in volumes {
        let volume = info.volume;
        let image = &images[&image_name(&volume.uuid)];
        assert_eq!(volume.pending, None, "{context}");
        assert_eq!(volume.size, image.size, "{context}");
        let snapshots = volume.snapshots.iter();
        let names: BTreeSet<String> = snapshots.map(|s| image_name(&s.uuid)).collect();
        assert_eq!(
            names,
            image.snapshots.keys().cloned().collect(),
            "{context}"
        );
    }
    let keys = world.keys.lock().unwrap();
    let kinds = ["intent/", "orphan/", "writer/"].map(|kind| format!("{ROOT}{kind}"));
    let left = keys
        .entries
        .keys()
        .filter(|key| kinds.iter().any(|kind| key.starts_with(kind)));
    assert_eq!(left.count(), allowed, "{context}");
}

/// Runs an operation with an event at each of its calls; `event` makes the event.
fn at_each_call(
    operation: Operation,
    mut event: impl FnMut(&Arc<World>) -> Event,
    mut checked: impl FnMut(&Arc<World>, Result<()>, String),
) -> u32 {
    let mut runs = 0;
    for when in [When::Before, When::After] {
        for at in 0.. {
            let world = world();
            let process = Process::new(&world, at, when, Some(event(&world)));
            let result = run(&process, operation);
            let happened = process.plan.lock().unwrap().event.is_none();
            checked(&world, result, format!("{operation:?}, {when:?} call {at}"));
            runs += 1;
            if !happened {
                break;
            }
        }
    }
    runs
}

#[test]
fn a_process_dies_at_any_call() {
    let mut runs = 0;
    for operation in OPERATIONS {
        runs += at_each_call(
            operation,
            |_| Event::Death,
            |world, _, context| {
                check(world, &context);
                // The operation succeeds afterwards, or its effect is there.
                let again = run(&Process::healthy(world), operation);
                let refused = again.as_ref().err().map(|error| error.errno());
                let expected = match operation {
                    Operation::Create | Operation::Clone | Operation::Snapshot => Errno::EXIST,
                    _ => Errno::NOENT,
                };
                assert!(
                    again.is_ok() || refused == Some(expected),
                    "{context}: {again:?}"
                );
                check(world, &context);
            },
        );
    }
    assert!(runs > 90, "{runs}");
}

#[test]
fn another_process_is_faster_at_any_call() {
    let mut runs = 0;
    for operation in OPERATIONS {
        for other in OPERATIONS {
            for expires in [false, true] {
                let results = Arc::new(Mutex::new(None));
                let event = |world: &Arc<World>| {
                    let (world, results) = (world.clone(), results.clone());
                    Event::Interruption(Box::new(move || {
                        if expires {
                            world.expire_leases();
                            run(&Process::healthy(&world), Operation::Collect).unwrap();
                        }
                        let result = run(&Process::healthy(&world), other);
                        *results.lock().unwrap() = Some(result.is_ok());
                    }))
                };
                runs += at_each_call(operation, event, |world, result, context| {
                    let context = format!("{context}, {other:?}, leases end: {expires}");
                    let other_ok = results.lock().unwrap().take();
                    let creates =
                        |operation| matches!(operation, Operation::Create | Operation::Clone);
                    if creates(operation) && creates(other) {
                        assert!(!(result.is_ok() && other_ok == Some(true)), "{context}");
                        assert!(
                            result.is_ok() || other_ok == Some(true),
                            "{context}: {result:?}"
                        );
                    }
                    check(world, &context);
                });
            }
        }
    }
    assert!(runs > 1000, "{runs}");
}

#[test]
fn a_second_process_dies_while_the_first_waits() {
    for operation in OPERATIONS {
        for other in OPERATIONS {
            for at in 0..20 {
                let event = |world: &Arc<World>| {
                    let world = world.clone();
                    Event::Interruption(Box::new(move || {
                        let plan = Some(Event::Death);
                        let _ = run(&Process::new(&world, at, When::After, plan), other);
                    }))
                };
                at_each_call(operation, event, |world, _, context| {
                    check(world, &format!("{context}, {other:?} dies at {at}"));
                });
            }
        }
    }
}

#[test]
fn nothing_is_collected_where_all_is_well() {
    let world = world();
    check(&world, "start");
    let registry = Process::healthy(&world).registry();
    assert_eq!(registry.collect("s").unwrap(), Collected::default());
    assert_eq!(
        registry.remove_storage("s").unwrap_err().errno(),
        Errno::BUSY
    );
    assert!(registry.remove(&name("old")).unwrap());
    registry.remove_storage("s").unwrap();
    assert_eq!(registry.storages().unwrap().len(), 0);
}
