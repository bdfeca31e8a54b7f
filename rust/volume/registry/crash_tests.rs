// SPDX-License-Identifier: GPL-2.0-only

//! All points at which a process can die, or another one can get ahead of it, enumerated.
//!
//! At each call of a process to the store or the storage, before or after its effect, the process
//! dies, or another process carries out a whole operation, with or without the end of all leases.
//! After that and a collection the storage has exactly the images of the registry.

use super::{Collected, VolumeName};
use crate::model_tests::{Event, Image, Process, When, World};
use crate::record::{image_name, marked_uuid, Volume, ROOT};
use crate::storage::Storage;
use engine::{Errno, Result};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

const SIZE: u64 = 1 << 20;

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
        Operation::Collect => registry.collect("s", true).map(drop),
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
    registry.collect("s", true).unwrap();
    let collected = registry.collect("s", true).unwrap();
    let volumes = registry.list(Some("s")).unwrap();
    let mut images = world.images.lock().unwrap().clone();
    let marks = images.keys().filter(|image| marked_uuid(image).is_some());
    assert_eq!(marks.count(), 1, "{context}");
    images.retain(|image, _| marked_uuid(image).is_none());
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
    let collected = registry.collect("s", false).unwrap();
    assert_eq!(collected, Collected::default());
    assert_eq!(
        registry.remove_storage("s").unwrap_err().errno(),
        Errno::BUSY
    );
    assert!(registry.remove(&name("old")).unwrap());
    registry.remove_storage("s").unwrap();
    assert_eq!(registry.storages().unwrap().len(), 0);
}

#[test]
fn a_place_belongs_to_one_storage_of_one_registry() {
    let world = world();
    let registry = Process::healthy(&world).registry();
    let images = world.images.lock().unwrap().clone();
    let other = Process::healthy(&world.with_other_registry()).registry();
    for (registry, cause) in [
        (&registry, "is the storage s already"),
        (&other, "belongs to another registry"),
    ] {
        let error = registry.add_storage("t", "model").unwrap_err();
        assert_eq!(error.errno(), Errno::EXIST);
        assert!(error.cause().contains(cause), "{error}");
    }
    assert_eq!(world.images.lock().unwrap().len(), images.len());

    // The same URI names another place here, or one that is not mounted.
    let mark = images.keys().find(|image| marked_uuid(image).is_some());
    let mark = mark.unwrap();
    for marks in [&[][..], &["rblk-storage-x"], &[mark, "rblk-storage-x"]] {
        let mut found = world.images.lock().unwrap();
        *found = images.clone();
        found.remove(mark);
        found.extend(
            marks
                .iter()
                .map(|name| ((*name).to_owned(), Image::default())),
        );
        let expected = found.len();
        drop(found);
        let error = registry.collect("s", true).unwrap_err();
        assert_eq!(error.errno(), Errno::STALE, "{marks:?}");
        assert!(registry.check_storage("s").is_err(), "{marks:?}");
        assert_eq!(world.images.lock().unwrap().len(), expected, "{marks:?}");
    }
}

#[test]
fn of_two_registries_that_take_a_place_at_once_at_most_one_has_it() {
    for when in [When::Before, When::After] {
        for at in 0.. {
            let world = Arc::new(World::default());
            let added = Arc::new(Mutex::new(None));
            let interruption = {
                let (other, added) = (world.with_other_registry(), added.clone());
                Box::new(move || {
                    let registry = Process::healthy(&other).registry();
                    let is_added = registry.add_storage("s", "model").is_ok();
                    *added.lock().unwrap() = Some(is_added);
                })
            };
            let event = Some(Event::Interruption(interruption));
            let process = Process::new(&world, at, when, event);
            let result = process.registry().add_storage("s", "model");
            let Some(other_added) = added.lock().unwrap().take() else {
                break;
            };
            let winners = usize::from(result.is_ok()) + usize::from(other_added);
            assert!(winners <= 1, "{when:?} {at}");
            let marks = world.images.lock().unwrap().len();
            assert_eq!(marks, winners, "{when:?} {at}");
        }
    }
}

#[test]
fn images_that_the_registry_does_not_know_are_kept() {
    let world = world();
    let process = Process::healthy(&world);
    let unknown = image_name("00000000-0000-0000-0000-000000000002");
    process.create(&unknown, SIZE).unwrap();
    let registry = process.registry();
    let collected = registry.collect("s", false).unwrap();
    assert!(collected.unknown.contains(&unknown), "{collected:?}");
    assert!(world.images.lock().unwrap().contains_key(&unknown));
    let collected = registry.collect("s", true).unwrap();
    assert!(collected.removed.contains(&unknown), "{collected:?}");
    assert!(!world.images.lock().unwrap().contains_key(&unknown));
}

#[test]
fn a_storage_that_is_removed_leaves_its_place() {
    let world = Arc::new(World::default());
    let registry = Process::healthy(&world).registry();
    registry.add_storage("s", "model").unwrap();
    let error = registry.add_storage("s", "model").unwrap_err();
    assert!(error.cause().contains("there is a storage s"), "{error}");
    assert_eq!(world.images.lock().unwrap().len(), 1);
    registry.remove_storage("s").unwrap();
    assert_eq!(world.images.lock().unwrap().len(), 0);
    registry.add_storage("t", "model").unwrap();
}
