// SPDX-License-Identifier: GPL-2.0-only

//! A frontend reads and writes a disk, over the fake of Xen.

mod common;

use blkif::wire::info;
use blkif::wire::op;
use blkif::wire::Abi;
use blkif::wire::DiscardRequest;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use blkif::wire::WireSegment;
use common::*;
use engine::memory::MemoryEngine;
use engine::Buffer;
use engine::Completion;
use engine::Engine;
use engine::Errno;
use engine::Info;
use engine::Queue;
use serde_json::Value;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;
use xen_user::event::Channel;
use xen_user::xenstore::Nodes;

const SECTORS: u64 = 8192;

fn image() -> Box<MemoryEngine> {
    let options = engine::Options::default();
    Box::new(MemoryEngine::open(SECTORS * 512, &options).unwrap())
}

/// An image that supports a single queue, as an NBD export without several connections.
struct OneQueue {
    image: Box<MemoryEngine>,
    /// The queue has a copy.
    used: Arc<()>,
}

impl OneQueue {
    fn new() -> Self {
        Self {
            image: image(),
            used: Arc::default(),
        }
    }
}

impl Engine for OneQueue {
    fn info(&self) -> Info {
        Info {
            max_queues: 1,
            ..self.image.info()
        }
    }

    fn refresh(&self) -> engine::Result<Info> {
        self.image.refresh()
    }

    fn queue(&self, depth: u32) -> engine::Result<Box<dyn Queue>> {
        if Arc::strong_count(&self.used) > 1 {
            let cause = "the only queue is in use";
            return Err(engine::Error::new(Errno::BUSY, cause, "wait"));
        }
        Ok(Box::new(OnlyQueue {
            queue: self.image.queue(depth)?,
            _used: self.used.clone(),
        }))
    }

    fn allocate(&self, len: usize) -> engine::Result<Buffer> {
        self.image.allocate(len)
    }

    fn close(self: Box<Self>) -> engine::Result<()> {
        self.image.close()
    }
}

struct OnlyQueue {
    queue: Box<dyn Queue>,
    _used: Arc<()>,
}

impl AsFd for OnlyQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

impl Queue for OnlyQueue {
    fn submit(&mut self, request: engine::Request) {
        self.queue.submit(request);
    }

    fn kick(&mut self) -> engine::Result<()> {
        self.queue.kick()
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> engine::Result<()> {
        self.queue.completions(completions)
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }
}

/// A disk that is served, and a frontend that is connected to it.
struct TestDisk {
    dir: TempDir,
    toolstack: Toolstack,
    front: Front,
    server: JoinHandle<Result<(), rblktap::Error>>,
}

impl TestDisk {
    /// Serves an image and connects a frontend.
    fn connect(image: Box<MemoryEngine>, choice: Choice) -> Self {
        Self::with(Toolstack::new("w"), image, choice, 512)
    }

    fn with(
        mut toolstack: Toolstack,
        image: Box<MemoryEngine>,
        choice: Choice,
        block_size: u32,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            persistent: choice.persistent,
            block_size,
            ..Options::new(dir.path())
        };
        let server = serve(&mut toolstack, image, &options);
        let front = Front::connect(&mut toolstack, choice);
        Self {
            dir,
            toolstack,
            front,
            server,
        }
    }

    /// Detaches the disk, and checks that nothing of it is left.
    fn finish(self) {
        finish(self.toolstack, self.front, self.server);
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0);
    }

    fn stats(&self) -> Value {
        control(self.dir.path(), "stats")
    }
}

fn finish(
    mut toolstack: Toolstack,
    mut front: Front,
    served: JoinHandle<Result<(), rblktap::Error>>,
) {
    toolstack.start_detach();
    front.set_state("5");
    front.set_state("6");
    served.join().unwrap().unwrap();
    assert_eq!(toolstack.state(), "6");
    assert_eq!(toolstack.host.mapped(), 0);
}

/// Writes and reads random ranges with random segments, and compares them with a copy.
fn write_read_verify(front: &mut Front, random: &mut Random, rounds: u64) {
    let mut disk = vec![0u8; SECTORS as usize * 512];
    for id in 0..rounds {
        let ring = random.below(front.rings.len() as u64) as usize;
        let count = if random.below(3) == 0 {
            1 + random.below(256)
        } else {
            1 + random.below(11)
        };
        let mut segments = Vec::new();
        let mut sectors = 0;
        for page in 0..count as usize {
            let first = random.below(8) as u8;
            let last = first + random.below(8 - u64::from(first)) as u8;
            sectors += u64::from(last - first) + 1;
            segments.push(front.segment(page, first, last));
        }
        let sector = random.below(SECTORS - sectors);
        let range = sector as usize * 512..(sector + sectors) as usize * 512;
        let write = random.below(2) == 0;
        let mut at = range.start;
        let mut places = Vec::new();
        for (page, segment) in segments.iter().enumerate() {
            let len = usize::from(segment.last - segment.first + 1) * 512;
            places.push((page * 4096 + usize::from(segment.first) * 512, at, len));
            at += len;
        }
        if write {
            for (place, at, len) in &places {
                let data: Vec<u8> = (0..*len).map(|byte| (byte as u64 ^ id) as u8).collect();
                front.data.write(*place, &data);
                disk[*at..at + len].copy_from_slice(&data);
            }
        }
        let operation = if write { op::WRITE } else { op::READ };
        let request = front.request(operation, id, sector, &segments);
        okay(front.rings[ring].call(request));
        for (place, at, len) in places {
            let mut data = vec![0; len];
            front.data.read(place, &mut data);
            assert_eq!(data, disk[at..at + len], "request {id}");
        }
    }
}

fn verify(choice: Choice) {
    let mut disk = TestDisk::connect(image(), choice);
    let offer = disk.front.offers();
    assert!(offer.flush_cache && offer.barrier && offer.discard);
    assert_eq!(offer.persistent, choice.persistent);
    assert_eq!(disk.toolstack.node("sectors").unwrap(), SECTORS.to_string());
    write_read_verify(
        &mut disk.front,
        &mut Random::new(u64::from(choice.order)),
        200,
    );
    okay(disk.front.rings[0].call(flush(9)));
    disk.finish();
}

#[test]
fn data_is_right_in_each_abi() {
    for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
        verify(Choice {
            abi,
            ..Choice::PLAIN
        });
    }
}

#[test]
fn data_is_right_with_persistent_grants() {
    verify(Choice {
        persistent: true,
        ..Choice::PLAIN
    });
}

#[test]
fn no_more_queues_are_offered_than_the_image_supports() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let image = Box::new(OneQueue::new());
    let server = serve(&mut toolstack, image, &Options::new(dir.path()));
    let front = Front::connect(&mut toolstack, Choice::PLAIN);
    let offered = toolstack.node("multi-queue-max-queues");
    assert_eq!(offered.as_deref(), Some("1"));
    finish(toolstack, front, server);
}

#[test]
fn data_is_right_with_large_rings_and_several_queues() {
    for persistent in [false, true] {
        verify(Choice {
            order: 4,
            queues: 4,
            persistent,
            ..Choice::PLAIN
        });
    }
}

#[test]
fn a_disk_of_4096_byte_blocks_refuses_parts_of_blocks() {
    let toolstack = Toolstack::new("w");
    let mut disk = TestDisk::with(toolstack, image(), Choice::PLAIN, 4096);
    assert_eq!(disk.toolstack.node("sector-size").unwrap(), "4096");
    let whole = disk
        .front
        .request(op::WRITE, 1, 8, &[disk.front.segment(0, 0, 7)]);
    okay(disk.front.rings[0].call(whole));
    let part = disk
        .front
        .request(op::WRITE, 2, 8, &[disk.front.segment(0, 0, 3)]);
    assert_eq!(disk.front.rings[0].call(part).status, Status::Error);
    disk.finish();
}

#[test]
fn a_read_only_removable_disk_refuses_writes() {
    let mut toolstack = Toolstack::new("r");
    toolstack
        .store
        .write(&format!("{BACK}/removable"), "1")
        .unwrap();
    let options = engine::Options {
        read_only: true,
        ..engine::Options::default()
    };
    let image = Box::new(MemoryEngine::open(SECTORS * 512, &options).unwrap());
    let mut disk = TestDisk::with(toolstack, image, Choice::PLAIN, 512);
    let flags = info::READONLY | info::REMOVABLE;
    assert_eq!(disk.toolstack.node("info").unwrap(), flags.to_string());
    assert_eq!(disk.toolstack.node("feature-discard"), None);
    let segment = disk.front.segment(0, 0, 0);
    okay(disk.front.rings[0].call(direct(op::READ, 1, 0, &[segment])));
    for operation in [op::WRITE, op::WRITE_BARRIER] {
        let response = disk.front.rings[0].call(direct(operation, 2, 0, &[segment]));
        assert_eq!(response.status, Status::Error);
    }
    disk.finish();
}

#[test]
fn discarded_sectors_are_forgotten() {
    let mut disk = TestDisk::connect(image(), Choice::PLAIN);
    disk.front.data.write(0, &[7; 512]);
    let segment = disk.front.segment(0, 0, 0);
    okay(disk.front.rings[0].call(direct(op::WRITE, 1, 16, &[segment])));
    let discard = |flag| {
        WireRequest::Discard(DiscardRequest {
            flag,
            handle: 0,
            id: 2,
            sector: 16,
            nr_sectors: 8,
        })
    };
    okay(disk.front.rings[0].call(discard(0)));
    let secure = disk.front.rings[0].call(discard(1));
    assert_eq!(secure.status, Status::NotSupported);
    okay(disk.front.rings[0].call(direct(op::READ, 3, 16, &[segment])));
    let mut data = [1; 512];
    disk.front.data.read(0, &mut data);
    assert_eq!(data, [0; 512]);
    disk.finish();
}

#[test]
fn hostile_requests_are_answered_and_do_no_harm() {
    for persistent in [false, true] {
        let choice = Choice {
            persistent,
            ..Choice::PLAIN
        };
        let mut disk = TestDisk::connect(image(), choice);
        let good = disk.front.segment(0, 0, 7);
        let bad_grant = WireSegment { gref: 1, ..good };
        let too_many = vec![good; 257];
        let mut many = direct(op::READ, 5, 0, &[good; 11]);
        if let WireRequest::Rw(rw) = &mut many {
            rw.nr_segments = 12;
        }
        let mut no_list = disk.front.request(op::READ, 6, 0, &[good; 12]);
        if let WireRequest::Indirect(indirect) = &mut no_list {
            indirect.grefs[0] = 1;
        }
        let mut wrong_operation = disk.front.request(op::READ, 7, 0, &[good; 12]);
        if let WireRequest::Indirect(indirect) = &mut wrong_operation {
            indirect.operation = op::FLUSH_DISKCACHE;
        }
        let unknown = WireRequest::Unknown {
            operation: 77,
            id: 8,
        };
        let cases = [
            (direct(op::READ, 1, 0, &[]), Status::Error),
            (
                direct(op::READ, 1, 0, &[disk.front.segment(0, 5, 4)]),
                Status::Error,
            ),
            (
                direct(op::WRITE, 2, 0, &[disk.front.segment(0, 0, 8)]),
                Status::Error,
            ),
            (direct(op::READ, 3, SECTORS - 7, &[good]), Status::Error),
            (direct(op::READ, 3, u64::MAX, &[good]), Status::Error),
            (direct(op::READ, 4, 0, &[bad_grant]), Status::Error),
            (direct(op::WRITE, 4, 0, &[good, bad_grant]), Status::Error),
            (direct(op::WRITE_BARRIER, 4, 0, &[bad_grant]), Status::Error),
            (many, Status::Error),
            (no_list, Status::Error),
            (wrong_operation, Status::Error),
            (disk.front.request(op::READ, 9, 0, &too_many), Status::Error),
            (unknown, Status::NotSupported),
        ];
        for (request, status) in cases {
            let response = disk.front.rings[0].call(request);
            assert_eq!(response.status, status, "{request:?}");
            assert_eq!(response.operation, request.response_operation());
        }
        let last = direct(op::WRITE, 10, SECTORS - 8, &[good]);
        okay(disk.front.rings[0].call(last));
        disk.finish();
    }
}

#[test]
fn random_requests_are_all_answered() {
    for persistent in [false, true] {
        let choice = Choice {
            persistent,
            ..Choice::PLAIN
        };
        let mut disk = TestDisk::connect(image(), choice);
        let (memory, channel) = (&disk.front.rings[0].memory, &disk.front.rings[0].channel);
        let mut random = Random::new(3);
        for round in 0..1000u32 {
            // A slot is 28 words behind the 16 of the header.
            let slot = 16 + (round % 32) as usize * 28;
            let operation = random.below(8) as u32;
            let count = random.below(14) as u32;
            let other = random.below(1 << 16) as u32;
            memory.store(slot, operation | (count << 8) | (other << 16));
            for word in 1..28 {
                let value = match random.below(4) {
                    0 => random.below(1 << 31) as u32,
                    1 => disk.front.references[random.below(512) as usize],
                    2 => random.below(0x0808) as u32,
                    _ => 0,
                };
                memory.store(slot + word, value);
            }
            memory.store(0, round + 1);
            channel.notify().unwrap();
            wait_for("a response", || memory.load(2) == round + 1);
        }
        assert_eq!(disk.toolstack.state(), "4");
        disk.finish();
    }
}

#[test]
fn an_impossible_index_ends_the_connection() {
    let mut disk = TestDisk::connect(image(), Choice::PLAIN);
    disk.front.rings[0].memory.store(0, 33);
    disk.front.rings[0].channel.notify().unwrap();
    disk.toolstack.wait_state("5");
    let error = disk
        .toolstack
        .store
        .read_text(&format!("error/{BACK}/error"));
    assert!(error.unwrap().unwrap().contains("req_prod 33"));
    disk.finish();
}

#[test]
fn nodes_that_make_no_sense_are_reported() {
    for (node, value) in [
        ("ring-ref", "x"),
        ("ring-ref", "1"),
        ("event-channel", "999"),
        ("protocol", "sparc-abi"),
        ("multi-queue-num-queues", "99"),
        ("ring-page-order", "5"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut toolstack = Toolstack::new("w");
        let served = serve(&mut toolstack, image(), &Options::new(dir.path()));
        toolstack.wait_state("2");
        let mut front = Front::offer(&toolstack.host, Choice::PLAIN);
        front
            .store
            .write(&format!("{FRONT}/{node}"), value)
            .unwrap();
        front.set_state("3");
        toolstack.wait_state("5");
        let error = toolstack.store.read_text(&format!("error/{BACK}/error"));
        let error = error.unwrap().unwrap();
        assert!(error.contains(node) && error.contains(value), "{error}");
        finish(toolstack, front, served);
    }
}

#[test]
fn a_state_that_is_none_is_reported() {
    let mut disk = TestDisk::connect(image(), Choice::PLAIN);
    disk.front.set_state("4\x1b[2J");
    disk.toolstack.wait_state("5");
    let error = disk
        .toolstack
        .store
        .read_text(&format!("error/{BACK}/error"));
    assert!(error
        .unwrap()
        .unwrap()
        .contains("state = \"4?[2J\": not a state"));
    disk.finish();
}

#[test]
fn a_frontend_may_connect_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let served = serve(&mut toolstack, image(), &Options::new(dir.path()));
    for round in 0..5 {
        let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
        let segment = front.segment(0, 0, 7);
        okay(front.rings[0].call(direct(op::WRITE, round, 0, &[segment])));
        front.set_state("5");
        toolstack.wait_state("5");
        front.set_state("6");
        toolstack.wait_state("6");
        front.set_state("1");
    }
    let front = Front::connect(&mut toolstack, Choice::PLAIN);
    finish(toolstack, front, served);
}

#[test]
fn errors_of_the_image_that_pass_are_tried_again() {
    let image = image();
    let passing = [Errno::AGAIN, Errno::BUSY, Errno::TIMEDOUT];
    image.set_faults(|faults| {
        faults.errors = passing
            .map(Some)
            .into_iter()
            .chain([None, Some(Errno::IO)])
            .collect();
    });
    let mut disk = TestDisk::connect(image, Choice::PLAIN);
    let segment = disk.front.segment(0, 0, 7);
    okay(disk.front.rings[0].call(direct(op::WRITE, 1, 0, &[segment])));
    let failed = disk.front.rings[0].call(direct(op::WRITE, 2, 0, &[segment]));
    assert_eq!(failed.status, Status::Error);
    let stats = disk.stats();
    assert_eq!(stats["counters"]["retries"], 3);
    assert_eq!(stats["counters"]["errors"], 1);
    disk.finish();
}

#[test]
fn a_write_without_space_waits_or_fails() {
    for (wait_for_space, status, retries) in [(true, Status::Okay, 2), (false, Status::Error, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let mut toolstack = Toolstack::new("w");
        let image = image();
        let full = [Some(Errno::NOSPC), Some(Errno::DQUOT)];
        image.set_faults(|faults| faults.errors = full.into());
        let options = Options {
            wait_for_space,
            ..Options::new(dir.path())
        };
        let served = serve(&mut toolstack, image, &options);
        let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
        let segment = front.segment(0, 0, 7);
        let response = front.rings[0].call(direct(op::WRITE, 1, 0, &[segment]));
        assert_eq!(response.status, status);
        let stats = control(dir.path(), "stats");
        assert_eq!(stats["counters"]["retries"], retries);
        finish(toolstack, front, served);
    }
}

#[test]
fn a_request_that_takes_too_long_is_reported_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let image = image();
    image.set_faults(|faults| faults.errors = [Some(Errno::AGAIN); 7].into());
    let options = Options {
        stuck_time: Duration::from_millis(20),
        ..Options::new(dir.path())
    };
    let served = serve(&mut toolstack, image, &options);
    let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
    let segment = front.segment(0, 0, 7);
    front.rings[0].put(direct(op::WRITE, 1, 8, &[segment]));
    front.rings[0].publish();
    wait_for("the report", || {
        control(dir.path(), "stats")["counters"]["stuck"] == 1
    });
    okay(front.rings[0].response());
    assert_eq!(control(dir.path(), "stats")["counters"]["stuck"], 1);
    finish(toolstack, front, served);
}

#[test]
fn a_disk_keeps_to_its_quota() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let mut options = Options::new(dir.path());
    options.quota.requests = 1;
    let served = serve(&mut toolstack, image(), &options);
    let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
    let mut write_all = |waits: bool| {
        let counters = |name: &str| control(dir.path(), "stats")["counters"][name].as_u64();
        let waited = counters("waited");
        for id in 0..16 {
            let segment = front.segment(id, 0, 7);
            let request = front.request(op::WRITE, id as u64, 8 * id as u64, &[segment]);
            front.rings[0].put(request);
        }
        front.rings[0].publish();
        for _ in 0..16 {
            okay(front.rings[0].response());
        }
        assert_eq!(counters("waited") != waited, waits);
    };
    write_all(true);
    let quota = r#"set-quota","pages":64,"requests":16,"other":""#;
    assert_eq!(control(dir.path(), quota)["pages"], 64);
    write_all(false);
    finish(toolstack, front, served);
}

#[test]
fn a_refused_flush_is_withdrawn() {
    let image = image();
    image.set_faults(|faults| faults.errors = [Some(Errno::OPNOTSUPP)].into());
    let mut disk = TestDisk::connect(image, Choice::PLAIN);
    let response = disk.front.rings[0].call(flush(1));
    assert_eq!(response.status, Status::NotSupported);
    wait_for("feature-flush-cache = 0", || {
        disk.toolstack.node("feature-flush-cache").as_deref() == Some("0")
    });
    disk.finish();
}

#[test]
fn barriers_order_all_queues() {
    let choice = Choice {
        queues: 3,
        ..Choice::PLAIN
    };
    let mut disk = TestDisk::connect(image(), choice);
    for round in 0..50u64 {
        for ring in 0..3 {
            let segment = disk.front.segment(ring, 0, 7);
            let first = direct(op::WRITE, round, 8 * ring as u64, &[segment]);
            let barrier = direct(op::WRITE_BARRIER, 1000 + round, 8 * ring as u64, &[segment]);
            disk.front.rings[ring].put(first);
            disk.front.rings[ring].put(barrier);
            disk.front.rings[ring].put(direct(op::WRITE_BARRIER, 2000, 0, &[]));
            disk.front.rings[ring].put(first);
        }
        for ring in 0..3 {
            disk.front.rings[ring].publish();
        }
        for ring in 0..3 {
            let ids: Vec<u64> = (0..4)
                .map(|_| {
                    let response = disk.front.rings[ring].response();
                    okay(response);
                    response.id
                })
                .collect();
            assert_eq!(ids, [round, 1000 + round, 2000, round]);
        }
    }
    disk.finish();
}

#[test]
fn more_requests_than_there_is_memory_for_wait() {
    let choice = Choice {
        order: 4,
        ..Choice::PLAIN
    };
    let mut disk = TestDisk::connect(image(), choice);
    let segments: Vec<_> = (0..256)
        .map(|page| disk.front.segment(page, 0, 7))
        .collect();
    for id in 0..40 {
        let request = disk.front.request(op::WRITE, id, 0, &segments);
        disk.front.rings[0].put(request);
    }
    disk.front.rings[0].publish();
    for _ in 0..40 {
        okay(disk.front.rings[0].response());
    }
    let counters = &disk.stats()["counters"];
    assert_eq!(counters["writes"], 40);
    assert!(counters["waited"].as_u64().unwrap() > 0);
    disk.finish();
}

#[test]
fn a_paused_disk_starts_nothing() {
    let mut disk = TestDisk::connect(image(), Choice::PLAIN);
    // The second one finds the disk paused.
    for _ in 0..2 {
        control(disk.dir.path(), "pause");
        wait_for("the pause", || disk.stats()["queues"][0]["paused"] == true);
    }
    let segment = disk.front.segment(0, 0, 7);
    disk.front.rings[0].put(direct(op::WRITE, 1, 0, &[segment]));
    disk.front.rings[0].publish();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(disk.front.rings[0].try_response(), None);
    control(disk.dir.path(), "resume");
    okay(disk.front.rings[0].response());
    disk.finish();
}

#[test]
fn a_drain_ends_if_the_process_is_not_replaced() {
    let mut toolstack = Toolstack::new("w");
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        drain_time: Duration::from_millis(50),
        ..Options::new(dir.path())
    };
    let server = serve(&mut toolstack, image(), &options);
    let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
    assert_eq!(control(dir.path(), "drain")["paused"], true);
    let segment = front.segment(0, 0, 7);
    front.rings[0].put(direct(op::WRITE, 1, 0, &[segment]));
    front.rings[0].publish();
    okay(front.rings[0].response());
    // A disk that was paused before stays so.
    control(dir.path(), "pause");
    control(dir.path(), "drain");
    thread::sleep(Duration::from_millis(100));
    assert_eq!(control(dir.path(), "stats")["paused"], true);
    finish(toolstack, front, server);
}

#[test]
fn a_request_waits_for_memory_of_the_image_that_others_have() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&file);
    let Ok(created) = create.arg("4M").status() else {
        println!("skipped: qemu-img is not installed");
        return;
    };
    assert!(created.success());
    let uri = format!("qcow2:{}", file.display());
    let image = engine::open(&uri.parse().unwrap(), &engine::Options::default()).unwrap();
    let memory = image.shared_memory().unwrap();
    let mut all = Vec::new();
    for len in [1 << 20, 4096] {
        while let Ok(buffer) = memory.allocate(len) {
            all.push(buffer);
        }
    }
    let mut toolstack = Toolstack::new("w");
    let served = serve(&mut toolstack, image, &Options::new(dir.path()));
    let mut front = Front::connect(&mut toolstack, Choice::PLAIN);
    let segment = front.segment(0, 0, 7);
    front.rings[0].put(direct(op::READ, 1, 0, &[segment]));
    front.rings[0].publish();
    wait_for("the request that waits", || {
        control(dir.path(), "stats")["counters"]["waited"] == 1
    });
    drop(all);
    okay(front.rings[0].response());
    finish(toolstack, front, served);
}

#[test]
fn a_size_that_was_not_told_is_told_later() {
    let mut disk = TestDisk::connect(image(), Choice::PLAIN);
    let resize = format!(r#"{{"command":"resize","size":{}}}"#, SECTORS * 1024);
    let state = format!("{BACK}/state");
    // The state that another process writes is not overwritten.
    disk.toolstack.store.write(&state, "2").unwrap();
    control_with(disk.dir.path(), &resize);
    assert_eq!(disk.toolstack.node("sectors").unwrap(), SECTORS.to_string());
    disk.toolstack.store.write(&state, "4").unwrap();
    let answer = control_with(disk.dir.path(), &resize);
    assert_eq!(answer["sectors"], SECTORS * 2);
    let sectors = disk.toolstack.node("sectors").unwrap();
    assert_eq!(sectors, (SECTORS * 2).to_string());
    disk.finish();
}

#[test]
fn the_emulated_disk_is_the_same_image() {
    let mut disk = TestDisk::connect(image(), Choice::PLAIN);
    let emulated = emulated(disk.dir.path());
    assert_eq!(emulated.info().size, SECTORS * 512);
    write_emulated(&*emulated, b"boot");
    let segment = disk.front.segment(0, 0, 0);
    okay(disk.front.rings[0].call(direct(op::READ, 1, 1, &[segment])));
    let mut data = [1; 4];
    disk.front.data.read(0, &mut data);
    assert_eq!(&data, b"boot");
    // A client that stays does not keep the disk.
    disk.finish();
}

#[test]
fn a_frontend_waits_for_the_queue_of_the_emulated_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let image = Box::new(OneQueue::new());
    let served = serve(&mut toolstack, image, &Options::new(dir.path()));
    toolstack.wait_state("2");
    let emulated = emulated(dir.path());
    let mut front = Front::offer(&toolstack.host, Choice::PLAIN);
    front.set_state("3");
    wait_for("the reason", || {
        let error = format!("error/{BACK}/error");
        toolstack.store.read_text(&error).unwrap().is_some()
    });
    assert_eq!(toolstack.state(), "2");
    drop(emulated);
    toolstack.wait_state("4");
    front.set_state("4");
    finish(toolstack, front, served);
}
