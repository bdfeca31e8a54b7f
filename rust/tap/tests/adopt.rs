// SPDX-License-Identifier: GPL-2.0-only

//! A successor takes over the rings of a process that has died.

mod common;

use blkif::wire::op;
use common::*;
use engine::memory::MemoryEngine;
use std::collections::BTreeSet;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use xen_user::event::Events;
use xen_user::xenstore::Nodes;

const SECTORS: u64 = 4096;
const WRITES: u64 = 8;

fn image(hold: bool) -> Box<MemoryEngine> {
    let options = engine::Options::default();
    let image = MemoryEngine::open(SECTORS * 512, &options).unwrap();
    image.set_faults(|faults| faults.hold = hold);
    Box::new(image)
}

/// Serves a disk whose image does not answer, until all writes are in flight, and kills the server.
fn serve_until_killed(
    toolstack: &mut Toolstack,
    dir: &Path,
    choice: Choice,
    writes: impl FnOnce(&mut Front),
) -> Front {
    let store = toolstack.host.xenstore().unwrap();
    let socket = UnixStream::from(store.fd().try_clone_to_owned().unwrap());
    let mut options = Options::new(dir);
    options.persistent = choice.persistent;
    let served = serve_with(toolstack, store, image(true), &options);
    let mut front = Front::connect(toolstack, choice);
    writes(&mut front);
    wait_for("all writes in flight", || {
        control(dir, "stats")["counters"]["writes_started"] == WRITES
    });
    toolstack.host.unbind_channels().unwrap();
    socket.shutdown(Shutdown::Both).unwrap();
    assert!(served.join().unwrap().is_err());
    front
}

fn write(front: &Front, id: u64) -> blkif::wire::WireRequest {
    let segment = front.segment(id as usize, 0, 7);
    front.data.write(id as usize * 4096, &[id as u8 + 1; 4096]);
    front.request(op::WRITE, id, id * 8, &[segment])
}

fn take_over(choice: Choice) {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let mut front = serve_until_killed(&mut toolstack, dir.path(), choice, |front| {
        for id in 0..WRITES {
            let ring = id as usize % front.rings.len();
            let request = write(front, id);
            front.rings[ring].put(request);
            front.rings[ring].publish();
        }
    });
    // These are not noticed by anyone.
    for id in WRITES..WRITES + 4 {
        let request = write(&front, id);
        front.rings[0].put(request);
    }
    front.rings[0].publish();

    let mut options = Options::new(dir.path());
    options.persistent = choice.persistent;
    let served = serve(&mut toolstack, image(false), &options);
    let mut answered = BTreeSet::new();
    for ring in 0..front.rings.len() as u64 {
        let own = (0..WRITES).filter(|id| id % front.rings.len() as u64 == ring);
        let count = own.count() + if ring == 0 { 4 } else { 0 };
        for _ in 0..count {
            let response = front.rings[ring as usize].response();
            okay(response);
            assert!(answered.insert(response.id));
        }
    }
    assert_eq!(answered, (0..WRITES + 4).collect());
    assert_eq!(control(dir.path(), "stats")["counters"]["adopted"], WRITES);
    assert_eq!(toolstack.state(), "4");
    for id in 0..WRITES + 4 {
        let segment = front.segment(100, 0, 7);
        okay(front.rings[0].call(direct(op::READ, id, id * 8, &[segment])));
        let mut data = vec![0; 4096];
        front.data.read(100 * 4096, &mut data);
        assert_eq!(data, [id as u8 + 1; 4096]);
    }
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}

#[test]
fn requests_of_a_killed_process_are_completed_by_a_successor() {
    take_over(Choice::PLAIN);
}

#[test]
fn all_queues_are_taken_over() {
    take_over(Choice {
        queues: 3,
        order: 2,
        persistent: true,
        ..Choice::PLAIN
    });
}

#[test]
fn a_successor_keeps_to_the_features_of_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let mut front = serve_until_killed(&mut toolstack, dir.path(), Choice::PLAIN, |front| {
        // The frontend could use persistent grants, but the first process does not.
        let feature = format!("{FRONT}/feature-persistent");
        front.store.write(&feature, "1").unwrap();
        for id in 0..WRITES {
            let request = write(front, id);
            front.rings[0].put(request);
        }
        front.rings[0].publish();
    });
    let before = toolstack.host.mapped();
    let mut options = Options::new(dir.path());
    options.persistent = true;
    let served = serve(&mut toolstack, image(false), &options);
    for _ in 0..WRITES {
        okay(front.rings[0].response());
    }
    // Only the ring is mapped.
    assert_eq!(toolstack.host.mapped(), before + 1);
    assert_eq!(toolstack.node("feature-persistent").unwrap(), "0");
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}

#[test]
fn a_successor_waits_for_what_the_killed_process_still_has() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let mut front = serve_until_killed(&mut toolstack, dir.path(), Choice::PLAIN, |front| {
        for id in 0..WRITES {
            let request = write(front, id);
            front.rings[0].put(request);
        }
        front.rings[0].publish();
    });
    // The event channel is still bound.
    let port = front.store.read_text(&format!("{FRONT}/event-channel"));
    let port = port.unwrap().unwrap().parse().unwrap();
    let bound = toolstack.host.bind(DOMAIN, port).unwrap();
    let served = serve(&mut toolstack, image(false), &Options::new(dir.path()));
    wait_for("the error", || {
        let error = toolstack.store.read_text(&format!("error/{BACK}/error"));
        error
            .unwrap()
            .is_some_and(|error| error.contains("event-channel"))
    });
    drop(bound);
    for _ in 0..WRITES {
        okay(front.rings[0].response());
    }
    assert_eq!(control(dir.path(), "stats")["counters"]["adopted"], WRITES);
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}

#[test]
fn the_oldest_request_is_described() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    serve_until_killed(&mut toolstack, dir.path(), Choice::PLAIN, |front| {
        for id in 0..WRITES {
            let request = write(front, id);
            front.rings[0].put(request);
            front.rings[0].publish();
        }
        let mut queue = serde_json::Value::Null;
        wait_for("all writes in flight", || {
            queue = control(dir.path(), "stats")["queues"][0].clone();
            queue["in_flight"] == WRITES
        });
        let oldest = &queue["oldest"];
        assert_eq!(oldest["operation"], "write");
        assert_eq!(oldest["sectors"], 8);
        assert_eq!(oldest["retries"], 0);
    });
}

#[test]
fn an_image_that_the_guest_cannot_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let choice = Choice {
        queues: 2,
        ..Choice::PLAIN
    };
    let mut front = serve_until_killed(&mut toolstack, dir.path(), choice, |front| {
        for id in 0..WRITES {
            let request = write(front, id);
            front.rings[0].put(request);
        }
        front.rings[0].publish();
    });
    toolstack
        .store
        .remove(&format!("{BACK}/kthread-pid"))
        .unwrap();
    let small = || -> Box<MemoryEngine> {
        let options = engine::Options::default();
        Box::new(MemoryEngine::open((SECTORS - 8) * 512, &options).unwrap())
    };
    for (block_size, max_queues, other) in [
        (512, 1, image(false)),
        (4096, 4, image(false)),
        (512, 4, small()),
    ] {
        let mut options = Options::new(dir.path());
        (options.block_size, options.max_queues) = (block_size, max_queues);
        let served = serve(&mut toolstack, other, &options);
        let error = served.join().unwrap().unwrap_err();
        assert!(matches!(error, rblktap::Error::Image(_)), "{error}");
        assert_eq!(
            (toolstack.state(), toolstack.node("kthread-pid")),
            ("4".to_owned(), None)
        );
    }
    let served = serve(&mut toolstack, image(false), &Options::new(dir.path()));
    for _ in 0..WRITES {
        okay(front.rings[0].response());
    }
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}

#[test]
fn a_paused_disk_stays_paused() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let write_all = |front: &mut Front| {
        for id in 0..WRITES {
            let request = write(front, id);
            front.rings[0].put(request);
        }
        front.rings[0].publish();
    };
    let mut front = serve_until_killed(&mut toolstack, dir.path(), Choice::PLAIN, |front| {
        write_all(front);
        wait_for("all writes in flight", || {
            control(dir.path(), "stats")["counters"]["writes_started"] == WRITES
        });
        assert_eq!(control(dir.path(), "pause")["paused"], true);
    });
    let served = serve(&mut toolstack, image(false), &Options::new(dir.path()));
    wait_for("the takeover", || {
        control(dir.path(), "stats")["queues"][0]["paused"] == true
    });
    let status = control(dir.path(), "stats");
    assert_eq!(
        (&status["paused"], &status["stays_paused"]),
        (&true.into(), &true.into())
    );
    assert_eq!(front.rings[0].try_response(), None);
    control(dir.path(), "resume");
    for _ in 0..WRITES {
        okay(front.rings[0].response());
    }
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}

#[test]
fn a_disk_that_was_detached_without_a_process_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let mut front = serve_until_killed(&mut toolstack, dir.path(), Choice::PLAIN, |front| {
        for id in 0..WRITES {
            let request = write(front, id);
            front.rings[0].put(request);
        }
        front.rings[0].publish();
    });
    toolstack.start_detach();
    front.set_state("6");
    let served = serve(&mut toolstack, image(false), &Options::new(dir.path()));
    served.join().unwrap().unwrap();
    assert_eq!(toolstack.state(), "6");
}

#[test]
fn a_detach_ends_although_the_image_starts_no_more_requests() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let broken = image(false);
    broken.set_faults(|faults| faults.broken = true);
    let served = serve(&mut toolstack, broken, &Options::new(dir.path()));
    let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
    toolstack.start_detach();
    let request = write(&front, 0);
    front.rings[0].put(request);
    front.rings[0].publish();
    wait_for("the end of the process", || served.is_finished());
    served.join().unwrap().unwrap_err();
    toolstack.host.unbind_channels().unwrap();
    let served = serve(&mut toolstack, image(false), &Options::new(dir.path()));
    front.set_state("6");
    served.join().unwrap().unwrap();
}

#[test]
fn a_process_whose_image_starts_no_more_requests_has_a_successor() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let image = image(true);
    image.set_faults(|faults| faults.broken = true);
    let served = serve(&mut toolstack, image, &Options::new(dir.path()));
    let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
    for id in 0..WRITES {
        let request = write(&front, id);
        front.rings[0].put(request);
    }
    front.rings[0].publish();
    wait_for("the end of the process", || served.is_finished());
    let error = served.join().unwrap().unwrap_err();
    assert!(matches!(error, rblktap::Error::Image(_)), "{error}");
    toolstack.host.unbind_channels().unwrap();
    let served = serve(
        &mut toolstack,
        self::image(false),
        &Options::new(dir.path()),
    );
    for _ in 0..WRITES {
        okay(front.rings[0].response());
    }
    assert_eq!(toolstack.state(), "4");
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}
