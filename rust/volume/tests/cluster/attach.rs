// SPDX-License-Identifier: GPL-2.0-only

//! Hosts that compete for a volume.
//!
//! A host is a process with a name and a PID namespace of its own.

use crate::host::{Host, HostProcess, LEASE};
use crate::io::{self, pattern};
use daemons::Etcd;
use std::thread;
use std::time::Instant;
use volume::{Errno, VolumeName};

const SIZE: u64 = 4 << 20;

fn name() -> VolumeName {
    "s/a".parse().unwrap()
}

/// Starts etcd, and creates the volume on a storage.
fn start_on(members: u16, uri: &str) -> (Etcd, Host, Host) {
    let etcd = Etcd::start(members);
    let [first, second] = ["first", "second"].map(|host| Host::new(etcd.urls(), host));
    first.registry.add_storage("s", uri).unwrap();
    first.registry.create(&name(), SIZE).unwrap();
    (etcd, first, second)
}

/// Starts etcd, and creates the volume in a directory.
fn start(members: u16, dir: &str) -> (Etcd, Host, Host) {
    let dir = daemons::work_dir(dir);
    start_on(members, &format!("dir:{}", dir.display()))
}

#[test]
fn a_second_writer_is_refused_and_learns_who_the_first_is() {
    let (_etcd, first, second) = start(1, "attach-second");
    let writer = first.attach(&name(), false).unwrap();
    for host in [&first, &second] {
        for read_only in [false, true] {
            let error = host.attach(&name(), read_only).err().unwrap();
            assert_eq!(error.errno(), Errno::BUSY);
            assert!(error.cause().contains("5/51712 on host first"), "{error}");
        }
    }
    for error in [
        second.registry.remove(&name()).err(),
        second.registry.release(&name()).err(),
    ] {
        let error = error.unwrap();
        assert!(error.cause().contains("host first"), "{error}");
    }
    writer.detach(true);
    let readers = [&first, &second].map(|host| host.attach(&name(), true).unwrap());
    let error = second.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    assert_eq!(second.registry.info(&name()).unwrap().readers.len(), 2);
    for reader in readers {
        reader.detach(true);
    }
    second.attach(&name(), false).unwrap().detach(true);
    assert_eq!(second.registry.info(&name()).unwrap().last_writer, None);
    first.registry.remove(&name()).unwrap();
    let error = first.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::NOENT);
}

#[test]
fn a_dead_process_of_the_same_host_is_replaced_at_once() {
    let (_etcd, first, second) = start(1, "attach-replaced");
    HostProcess::start_here(&first, &name()).kill();
    let error = second.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    first.attach(&name(), false).unwrap().detach(true);
}

#[test]
fn without_a_fence_the_administrator_says_that_a_host_is_off() {
    let (_etcd, first, second) = start(1, "attach-released");
    HostProcess::start(&first, &name()).kill();
    daemons::wait_until("the lease ends", || {
        second.registry.info(&name()).unwrap().writer.is_none()
    });
    let error = second.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    assert!(error.cause().contains("on host first"), "{error}");
    assert!(
        error.remedy().contains("rblk volume release s/a"),
        "{error}"
    );
    second.registry.release(&name()).unwrap();
    second.attach(&name(), false).unwrap().detach(true);
}

#[test]
fn a_host_whose_clock_is_an_hour_wrong_keeps_its_lease_and_loses_it_when_it_dies() {
    let (_etcd, first, second) = start(1, "attach-clock");
    for hours in [-1, 1] {
        let process = HostProcess::start_with_clock(&first, &name(), hours);
        let begin = Instant::now();
        while begin.elapsed() < 2 * LEASE {
            process.wait_for_writes(1);
            let error = second.attach(&name(), false).err().unwrap();
            assert!(error.cause().contains("on host first"), "{error}");
        }
        process.kill();
        daemons::wait_until("the lease ends", || {
            second.registry.info(&name()).unwrap().writer.is_none()
        });
        second.registry.release(&name()).unwrap();
    }
}

#[test]
fn late_writes_of_a_frozen_host_do_not_land() {
    let (_etcd, first, second) = start_on(1, &crate::ceph_storage("frozen"));
    let process = HostProcess::start(&first, &name());
    process.wait_for_writes(50);
    process.freeze();
    daemons::wait_until("the lease ends", || {
        second.registry.info(&name()).unwrap().writer.is_none()
    });
    let begin = Instant::now();
    let writer = second.attach(&name(), false).unwrap();
    let mut image = io::Image::open(&writer.uri);
    eprintln!(
        "rbd, a frozen host is fenced: longest stall: {} ms",
        begin.elapsed().as_millis()
    );
    let data = pattern(200);
    for block in 0..SIZE / io::BLOCK {
        image.write(block, &data).unwrap();
    }
    // The text begins with the year, so it can be compared.
    let fences = crate::ceph().ceph(&["osd", "blocklist", "ls", "--format", "json"]);
    // The list of refused ranges of addresses follows.
    let mut lists = serde_json::Deserializer::from_str(&fences).into_iter::<serde_json::Value>();
    let fences = lists.next().unwrap().unwrap();
    let fences = fences.as_array().unwrap().iter();
    let until = fences.filter_map(|fence| fence["until"].as_str()).max();
    let later = daemons::run("date", &["--utc", "--date=+360 days", "+%FT%T"]);
    assert!(until.unwrap() > later.as_str(), "{until:?}");
    process.thaw();
    // It writes as long as no write fails, and says why it ends.
    let end = process.wait_for_end();
    assert!(end.contains("taken"), "{end}");
    for block in 0..SIZE / io::BLOCK {
        assert!(image.read(block).unwrap() == data, "block {block}");
    }
    image.close();
    writer.detach(true);
    first.attach(&name(), false).unwrap().detach(true);
}

/// Hands the volume over to the second host, and back.
fn hand_over(kind: &str, (etcd, first, second): &(Etcd, Host, Host)) {
    let process = HostProcess::start_that_ends(first, &name());
    let refused = |host: &Host, text: &str| {
        let error = host.attach(&name(), false).err().unwrap();
        assert_eq!(error.errno(), Errno::BUSY);
        assert!(error.cause().contains(text), "{error}");
    };
    refused(second, "on host first");
    first.registry.hand_over(&name(), "second").unwrap();
    refused(&Host::new(etcd.urls(), "third"), "on host first");
    process.wait_for_writes(20);
    let begin = Instant::now();
    let writer = thread::scope(|scope| {
        let writer = scope.spawn(|| second.attach(&name(), false).unwrap());
        process.wait_for_loss();
        // The next process of that disk.
        refused(first, "on host second");
        writer.join().unwrap()
    });
    let mut image = io::Image::open(&writer.uri);
    eprintln!(
        "{kind}, handed over to another host: longest stall: {} ms",
        begin.elapsed().as_millis()
    );
    image.write(0, &pattern(7)).unwrap();
    refused(first, "on host second");
    assert!(image.read(0).unwrap() == pattern(7));
    image.close();
    writer.detach(true);
    first.attach(&name(), false).unwrap().detach(true);
    let error = first.registry.hand_over(&name(), "second").unwrap_err();
    assert_eq!(error.errno(), Errno::NOENT);
}

#[test]
fn a_volume_on_rbd_is_handed_over_to_another_host() {
    hand_over("rbd", &start_on(1, &crate::ceph_storage("handover")));
}

#[test]
fn a_volume_in_a_directory_is_handed_over_to_another_host() {
    hand_over("dir", &start(1, "attach-handed-over"));
}

#[test]
fn a_writer_that_does_not_end_keeps_the_volume() {
    let (_etcd, first, second) = start(1, "attach-kept");
    let process = HostProcess::start(&first, &name());
    process.freeze();
    first.registry.hand_over(&name(), "second").unwrap();
    let error = second.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    process.kill();
}

#[test]
fn an_attachment_outlives_etcd() {
    let (mut etcd, first, second) = start(3, "attach-outlives");
    let writer = first.attach_for(&name(), false, LEASE).unwrap();
    for member in &mut etcd.members {
        member.kill();
    }
    let error = second.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::TIMEDOUT, "{error}");
    assert!(error.remedy().contains("majority"), "{error}");
    std::thread::sleep(LEASE * 3);
    for member in &mut etcd.members {
        member.restart();
    }
    etcd.wait();
    daemons::wait_until("the writer is registered again", || {
        let info = second.registry.info(&name());
        info.is_ok_and(|info| info.writer.is_some())
    });
    let error = second.attach(&name(), false).err().unwrap();
    assert_eq!(error.errno(), Errno::BUSY);
    writer.detach(true);
    second.attach(&name(), false).unwrap().detach(true);
}
