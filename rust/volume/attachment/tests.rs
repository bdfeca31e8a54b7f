// SPDX-License-Identifier: GPL-2.0-only

//! Attachments by a model of the store and the storage.

use super::*;
use crate::config::Config;
use crate::model_tests::{Event, Process, When, World};
use serde_json::json;

/// No lease ends by itself in these tests.
const LEASE: Duration = Duration::from_secs(3600);

fn name() -> VolumeName {
    "s/a".parse().unwrap()
}

fn world(can_fence: bool) -> Arc<World> {
    let world = Arc::new(World {
        can_fence,
        ..World::default()
    });
    let registry = Process::healthy(&world).registry();
    registry.add_storage("s", "model").unwrap();
    registry.create(&name(), 4096).unwrap();
    world
}

fn holder(host: &str) -> Holder {
    let config = Config {
        etcd: Vec::new(),
        host: host.to_owned(),
    };
    Holder::this_process(&config, "5/51712").unwrap()
}

/// Returns a process of a host that has ended.
fn ended(host: &str) -> Holder {
    let mut value = json!(holder(host));
    value["start_time"] = json!(0);
    serde_json::from_value(value).unwrap()
}

fn attach_as(process: &Process, holder: &Holder, access: Access) -> Result<Attachment> {
    let registry = Arc::new(process.registry());
    Attachment::new(registry, &name(), holder, access, LEASE, |_| {})
}

fn attach(world: &Arc<World>, holder: &Holder, access: Access) -> Result<Attachment> {
    attach_as(&Process::healthy(world), holder, access)
}

#[test]
fn a_volume_that_was_used_elsewhere_is_not_continued() {
    let world = world(true);
    let (first, second) = (holder("first"), holder("second"));
    let lost = attach(&world, &first, Access::Write).unwrap();
    lost.record_use()().unwrap();
    world.expire_leases();

    // The second host has it, and its guest does not connect.
    let other = attach(&world, &second, Access::Write).unwrap();
    let error = lost.record_use()().unwrap_err();
    assert_eq!(error.errno(), Errno::SHUTDOWN);
    other.detach(true);
    let again = attach(&world, &first, Access::Continue).unwrap();
    drop(again);
    world.expire_leases();

    // Its guest connects.
    let other = attach(&world, &second, Access::Write).unwrap();
    other.record_use()().unwrap();
    let refuses = || {
        let error = attach(&world, &first, Access::Continue).err().unwrap();
        assert_eq!(error.errno(), USED_SINCE);
        assert!(error.cause().contains("on host second"), "{error}");
    };
    refuses();
    other.detach(true);
    refuses();
    // A disk that is attached again begins with what is there.
    let attachment = attach(&world, &first, Access::Write).unwrap();
    attachment.record_use()().unwrap();
    attachment.detach(true);
    assert!(attach(&world, &second, Access::Continue).is_err());
    Process::healthy(&world).registry().remove(&name()).unwrap();
    assert!(world.keys_of("user").is_empty());
}

#[test]
fn an_attach_that_fails_leaves_a_free_volume() {
    for can_fence in [false, true] {
        for when in [When::Before, When::After] {
            for at in 0.. {
                let context = format!("fence: {can_fence}, {when:?} call {at}");
                let world = world(can_fence);
                let process = Process::new(&world, at, when, Some(Event::Silence));
                let attached = attach_as(&process, &holder("first"), Access::Write);
                if process.plan.lock().unwrap().event.is_some() {
                    attached.unwrap().detach(true);
                    break;
                }
                match attached {
                    Ok(attachment) => attachment.detach(true),
                    Err(error) => assert_eq!(error.errno(), Errno::TIMEDOUT, "{context}"),
                }
                assert!(world.keys_of("writer").is_empty(), "{context}");
                let other = attach(&world, &holder("second"), Access::Write);
                let other = other.map_err(|error| format!("{context}: {error}"));
                other.unwrap().detach(true);
            }
        }
    }
}

#[test]
fn a_writer_that_may_not_be_fenced_yet_is_kept() {
    for at in 0.. {
        let world = world(true);
        drop(attach(&world, &holder("first"), Access::Write).unwrap());
        world.expire_leases();
        let process = Process::new(&world, at, When::After, Some(Event::Silence));
        let attached = attach_as(&process, &holder("second"), Access::Write);
        assert_eq!(world.keys_of("last").len(), 1, "call {at}");
        if process.plan.lock().unwrap().event.is_some() {
            attached.unwrap().detach(true);
            break;
        }
    }
}

/// Returns a volume that is attached, with a lease that has ended, and what keeps it, whose call
/// `at` gets no answer.
fn keeper(at: u32, when: When) -> (Arc<World>, Keeper<Process>, Process) {
    let world = world(false);
    let (registry, holder) = (Process::healthy(&world).registry(), holder("first"));
    let uuid = registry.volume(&name()).unwrap().1.uuid;
    let keys = Keys {
        name: name(),
        own: image_key("writer", "s", &uuid),
        uuid,
        value: text(&holder).unwrap(),
        user: holder.user(),
        lease_time: LEASE,
    };
    let storage = registry.storage("s").unwrap();
    let held = attach_writer(&registry, &*storage, &keys, &holder, Access::Write).unwrap();
    world.expire_leases();
    let process = Process::new(&world, at, when, Some(Event::Silence));
    let keeper = Keeper {
        registry: Arc::new(process.registry()),
        keys,
        held,
        interval: LEASE,
    };
    (world, keeper, process)
}

#[test]
fn a_lost_answer_is_no_loss_of_the_volume() {
    for when in [When::Before, When::After] {
        for at in 0.. {
            let (world, mut keeper, process) = keeper(at, when);
            let renewed = keeper.renew();
            if process.plan.lock().unwrap().event.is_some() {
                renewed.unwrap();
                break;
            }
            let error = renewed.unwrap_err();
            assert!(!is_loss(&error), "{when:?} {at}: {error}");
            keeper.renew().unwrap();
            let error = attach(&world, &holder("second"), Access::Write).err();
            assert_eq!(error.unwrap().errno(), Errno::BUSY);
            keeper.detach(true).unwrap();
            assert!(world.keys_of("last").is_empty(), "{when:?} {at}");
            assert!(world.keys_of("writer").is_empty(), "{when:?} {at}");
        }
    }
}

#[test]
fn a_lost_answer_does_not_keep_a_volume_that_was_detached() {
    for at in 0.. {
        let (world, mut keeper, process) = keeper(at, When::After);
        let renewed = keeper.renew();
        if process.plan.lock().unwrap().event.is_some() {
            renewed.unwrap();
            break;
        }
        assert!(renewed.is_err(), "call {at}");
        keeper.detach(true).unwrap();
        assert!(world.keys_of("last").is_empty(), "call {at}");
    }
}

#[test]
fn a_permission_outlives_a_process_and_not_the_disk() {
    for (access, stays) in [(Access::Continue, true), (Access::Write, false)] {
        let world = world(false);
        drop(attach(&world, &ended("first"), Access::Write).unwrap());
        let registry = Process::healthy(&world).registry();
        registry.hand_over(&name(), "second").unwrap();
        let next = attach(&world, &holder("first"), access).unwrap();
        assert_eq!(!world.keys_of("handover").is_empty(), stays, "{access:?}");
        next.detach(true);
    }
}
