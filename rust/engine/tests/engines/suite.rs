// SPDX-License-Identifier: GPL-2.0-only

//! The tests that every engine passes.

use crate::disk::{buffers, bytes, patient, pattern, Cut, Disk};
use engine::{Engine, Errno, Operation, Options, Request};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::thread;

/// The size of the images of this suite.
pub const SIZE: u64 = 4 << 20;

/// An image of [`SIZE`] zeroed bytes, which an engine can open several times in a row.
pub trait Target {
    /// Opens the image.
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>>;

    /// Changes the size of the image while it is open; returns `false` if that is impossible.
    fn resize(&self, size: u64) -> bool;

    /// Returns `true` if data is kept from one opening to the next.
    fn is_persistent(&self) -> bool {
        true
    }

    /// Returns the number of runs of the property test.
    fn cases(&self) -> u32 {
        12
    }

    fn disk(&self) -> Disk {
        Disk::new(self.open(&patient()).unwrap())
    }
}

/// Makes one test of each function of the suite; `$target` creates a target.
macro_rules! conformance {
    ($target:expr) => {
        conformance!(
            $target,
            geometry,
            sizes_and_alignments,
            unit_of_writes,
            forced_unit_access,
            discards,
            write_zeroes,
            invalid_requests,
            end_of_device,
            read_only_image,
            size_changes,
            more_requests_than_the_queue_is_deep,
            readable_while_completions_wait,
            closed_with_requests_in_flight,
            data_survives_close,
            several_queues,
            same_as_a_model,
        );
    };
    ($target:expr, $($test:ident),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                if let Some(target) = $target {
                    crate::suite::$test(&target);
                }
            }
        )*
    };
}

pub fn geometry(target: &dyn Target) {
    let disk = target.disk();
    let info = disk.info();
    assert_eq!(info.size, SIZE);
    assert!(info.logical_block_size.is_power_of_two() && info.logical_block_size >= 512);
    assert_eq!(info.physical_block_size % info.logical_block_size, 0);
    assert!(info.max_transfer >= 1 << 20 && info.max_buffers >= 256);
    assert!(info.buffer_alignment.is_power_of_two());
    assert!(!info.read_only);
    assert_eq!(disk.engine.refresh().unwrap(), info);
    let memory = disk.engine.allocate(4096).unwrap();
    assert_eq!(memory.as_ptr() as usize % info.buffer_alignment, 0);
    disk.close();
}

pub fn sizes_and_alignments(target: &dyn Target) {
    let mut disk = target.disk();
    let block = disk.info().logical_block_size as usize;
    let cuts = [
        Cut::Whole,
        Cut::Odd,
        Cut::At(512),
        Cut::At(100),
        Cut::At(4096),
        Cut::Sectors,
    ];
    let mut seed = 0;
    for len in [512, 1024, 4096, 4608, 65536, 135_168] {
        for offset in [0, 512, 3584, 4096, 65024] {
            if len % block != 0 || offset as usize % block != 0 {
                continue;
            }
            for cut in cuts {
                seed += 1;
                let data = pattern(seed, len);
                disk.write(offset, &data, cut);
                assert_eq!(disk.read(offset, len, cut), data, "{offset} {len} {cut:?}");
            }
            let around = disk.read(
                0,
                (offset as usize + len).next_multiple_of(4096),
                Cut::Whole,
            );
            assert_eq!(around[offset as usize..][..len], pattern(seed, len));
        }
    }
    let len = 1 << 20;
    let data = pattern(seed, len);
    disk.write(1 << 20, &data, Cut::At(12288));
    assert_eq!(disk.read(1 << 20, len, Cut::Whole), data);
    disk.close();
}

pub fn unit_of_writes(target: &dyn Target) {
    const LEN: usize = 64 << 10;
    let mut disk = target.disk();
    let unit = disk.info().logical_block_size as usize;
    for round in 0..4 {
        for tag in 1..=8 {
            let data = vec![tag * 10 + round; LEN];
            let buffers = buffers(&*disk.engine, LEN, Cut::Whole, Some(&data));
            let offset = u64::from(tag) * 8192;
            disk.queue
                .submit(Request::write(u64::from(tag), offset, buffers));
        }
        let completions = disk.drain();
        assert_eq!(completions.len(), 8);
        assert!(completions
            .iter()
            .all(|completion| completion.result.is_ok()));
        for (index, part) in disk.read(8192, LEN, Cut::Whole).chunks(unit).enumerate() {
            assert!(part.iter().all(|byte| *byte == part[0]), "block {index}");
            let newest = (index * unit / 8192 + 1) as u8;
            assert!(part[0] % 10 == round && part[0] / 10 <= newest);
        }
    }
    disk.close();
}

pub fn forced_unit_access(target: &dyn Target) {
    let mut disk = target.disk();
    let data = pattern(7, 4096);
    let buffers = buffers(&*disk.engine, data.len(), Cut::Whole, Some(&data));
    let mut request = Request::write(5, 4096, buffers);
    request.operation = Operation::Write { fua: true };
    assert_eq!(disk.errno(request), None);
    disk.flush();
    assert_eq!(disk.read(4096, 4096, Cut::Whole), data);
    disk.close();
}

pub fn discards(target: &dyn Target) {
    let mut disk = target.disk();
    let data = pattern(8, 1 << 20);
    disk.write(0, &data, Cut::Whole);
    let result = disk.errno(Request::discard(1, 65536, 131_072));
    if disk.info().discard.is_none() {
        assert_eq!(result, Some(Errno::OPNOTSUPP));
    } else {
        assert_eq!(result, None);
        // In units smaller than storage is freed in.
        let block = u64::from(disk.info().logical_block_size);
        assert_eq!(
            disk.errno(Request::discard(1, 262_144 + block, block)),
            None
        );
    }
    assert_eq!(disk.read(0, 65536, Cut::Whole), data[..65536]);
    assert_eq!(
        disk.read(196_608, 65536, Cut::Whole),
        data[196_608..262_144]
    );
    assert_eq!(disk.read(327_680, 720_896, Cut::Whole), data[327_680..]);
    disk.write(65536, &data[..131_072], Cut::Whole);
    assert_eq!(disk.read(65536, 131_072, Cut::Whole), data[..131_072]);
    disk.close();
}

pub fn write_zeroes(target: &dyn Target) {
    let mut disk = target.disk();
    if !disk.info().write_zeroes {
        assert_eq!(
            disk.errno(Request::write_zeroes(1, 0, 4096, true)),
            Some(Errno::OPNOTSUPP)
        );
        return disk.close();
    }
    let data = pattern(9, 1 << 20);
    for may_unmap in [false, true] {
        for (start, len) in [(4096, 4096), (65536, 131_072), (36864, 12288)] {
            disk.write(0, &data, Cut::Whole);
            let request = Request::write_zeroes(1, start as u64, len as u64, may_unmap);
            assert_eq!(disk.errno(request), None);
            let mut expected = data.clone();
            expected[start..start + len].fill(0);
            assert!(
                disk.read(0, 1 << 20, Cut::Whole) == expected,
                "{start} {len}"
            );
        }
    }
    assert_eq!(disk.errno(Request::write_zeroes(1, 0, SIZE, false)), None);
    assert!(disk
        .read(0, 1 << 20, Cut::Whole)
        .iter()
        .all(|byte| *byte == 0));
    disk.close();
}

pub fn invalid_requests(target: &dyn Target) {
    let mut disk = target.disk();
    let memory = |len| buffers(&*target_engine(), len, Cut::Whole, None);
    let mut short = Request::read(1, 0, memory(4096));
    short.length = 8192;
    let mut with_range = Request::flush(1);
    with_range.length = 4096;
    for request in [
        short,
        with_range,
        Request::read(1, 1, memory(4096)),
        Request::write(1, 100, memory(4096)),
        Request::write(1, 0, memory(100)),
        Request::read(1, 0, Vec::new()),
        Request::discard(1, 0, 0),
        Request::write_zeroes(1, 0, 100, true),
    ] {
        let buffers = request.buffers.len();
        let unsupported = match request.operation {
            Operation::Discard => disk.info().discard.is_none(),
            Operation::WriteZeroes { .. } => !disk.info().write_zeroes,
            _ => false,
        };
        let completion = disk.run(request);
        let expected = if unsupported {
            Errno::OPNOTSUPP
        } else {
            Errno::INVAL
        };
        assert_eq!(completion.result.unwrap_err().errno(), expected);
        assert_eq!(completion.buffers.len(), buffers);
    }
    disk.write(0, &pattern(1, 4096), Cut::Whole);
    disk.close();
}

/// Returns an engine whose memory is foreign to all others.
fn target_engine() -> Box<dyn Engine> {
    engine::open(&"memory:4096".parse().unwrap(), &Options::default()).unwrap()
}

pub fn end_of_device(target: &dyn Target) {
    let mut disk = target.disk();
    let data = pattern(3, 8192);
    disk.write(SIZE - 8192, &data, Cut::Whole);
    assert_eq!(disk.read(SIZE - 8192, 8192, Cut::At(512)), data);
    for (offset, len) in [
        (SIZE, 4096),
        (SIZE - 4096, 8192),
        (SIZE + (1 << 40), 4096),
        (u64::MAX - 4095, 4096),
    ] {
        let read = buffers(&*disk.engine, len, Cut::Whole, None);
        let write = buffers(&*disk.engine, len, Cut::Whole, None);
        assert_eq!(disk.errno(Request::read(1, offset, read)), Some(Errno::IO));
        assert_eq!(
            disk.errno(Request::write(1, offset, write)),
            Some(Errno::IO)
        );
    }
    assert_eq!(disk.read(SIZE - 8192, 8192, Cut::Whole), data);
    disk.close();
}

pub fn read_only_image(target: &dyn Target) {
    let data = pattern(4, 8192);
    if target.is_persistent() {
        let mut disk = target.disk();
        disk.write(0, &data, Cut::Whole);
        disk.close();
    }
    let mut disk = Disk::new(
        target
            .open(&Options {
                read_only: true,
                ..patient()
            })
            .unwrap(),
    );
    assert!(disk.info().read_only);
    for request in [
        Request::write(1, 0, buffers(&*disk.engine, 4096, Cut::Whole, None)),
        Request::discard(1, 0, 4096),
        Request::write_zeroes(1, 0, 4096, true),
    ] {
        assert_eq!(disk.errno(request), Some(Errno::ROFS));
    }
    let read = disk.read(0, 8192, Cut::Whole);
    if target.is_persistent() {
        assert_eq!(read, data);
    }
    disk.flush();
    disk.close();
}

pub fn size_changes(target: &dyn Target) {
    let mut disk = target.disk();
    if !target.resize(SIZE * 2) {
        return;
    }
    assert_eq!(disk.engine.refresh().unwrap().size, SIZE * 2);
    let data = pattern(5, 8192);
    disk.write(SIZE - 4096, &data, Cut::Whole);
    disk.write(SIZE * 2 - 8192, &data, Cut::Whole);
    assert_eq!(disk.read(SIZE - 4096, 8192, Cut::Whole), data);
    if target.resize(SIZE) {
        assert_eq!(disk.engine.refresh().unwrap().size, SIZE);
        let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
        assert_eq!(disk.errno(Request::read(1, SIZE, memory)), Some(Errno::IO));
        assert_eq!(disk.read(SIZE - 4096, 4096, Cut::Whole), data[..4096]);
    }
    disk.close();
}

pub fn more_requests_than_the_queue_is_deep(target: &dyn Target) {
    let engine = target.open(&patient()).unwrap();
    let queue = engine.queue(2).unwrap();
    let mut disk = Disk { engine, queue };
    for tag in 0..100 {
        let data = pattern(tag, 4096);
        let memory = buffers(&*disk.engine, 4096, Cut::Whole, Some(&data));
        disk.queue.submit(Request::write(tag, tag * 4096, memory));
    }
    assert_eq!(disk.queue.in_flight(), 100);
    let completions = disk.drain();
    let mut tags: Vec<_> = completions
        .iter()
        .map(|completion| completion.tag)
        .collect();
    tags.sort_unstable();
    assert!(tags.into_iter().eq(0..100));
    for tag in 0..100 {
        assert_eq!(disk.read(tag * 4096, 4096, Cut::Whole), pattern(tag, 4096));
    }
    disk.close();
}

pub fn readable_while_completions_wait(target: &dyn Target) {
    let mut disk = target.disk();
    let readable = |disk: &Disk, timeout| {
        let mut fds = [PollFd::new(&disk.queue, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: timeout,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&timeout)).unwrap() == 1
    };
    for _ in 0..20 {
        // The announcement of a completion may come after the completion was taken.
        for _ in 0..3 {
            if readable(&disk, 0) {
                let mut completions = Vec::new();
                disk.queue.completions(&mut completions).unwrap();
                assert!(completions.is_empty());
            }
        }
        assert!(!readable(&disk, 0));
        // One that is refused, one that is carried out.
        disk.queue.submit(Request::read(1, 0, Vec::new()));
        let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
        disk.queue.submit(Request::read(2, 0, memory));
        disk.queue.kick().unwrap();
        let mut completions = Vec::new();
        while completions.len() < 2 {
            assert!(readable(&disk, 60));
            disk.queue.completions(&mut completions).unwrap();
        }
        assert_eq!(disk.queue.in_flight(), 0);
    }
    disk.close();
}

pub fn closed_with_requests_in_flight(target: &dyn Target) {
    let mut disk = target.disk();
    for tag in 0..32 {
        let data = pattern(tag, 65536);
        let memory = buffers(&*disk.engine, 65536, Cut::Whole, Some(&data));
        disk.queue.submit(Request::write(tag, tag * 65536, memory));
    }
    disk.queue.kick().unwrap();
    assert_eq!(disk.engine.close().unwrap_err().errno(), Errno::BUSY);
    drop(disk.queue);
    let mut disk = target.disk();
    if target.is_persistent() {
        for tag in 0..32 {
            let data = disk.read(tag * 65536, 65536, Cut::Whole);
            assert!(data == pattern(tag, 65536), "write {tag}");
        }
    }
    disk.close();
}

pub fn data_survives_close(target: &dyn Target) {
    if !target.is_persistent() {
        return;
    }
    let data = pattern(6, 65536);
    let mut disk = target.disk();
    disk.write(65536, &data, Cut::Whole);
    disk.flush();
    disk.close();
    let mut disk = target.disk();
    assert_eq!(disk.read(65536, 65536, Cut::Odd), data);
    disk.close();
}

pub fn several_queues(target: &dyn Target) {
    let engine = target.open(&patient()).unwrap();
    let queues = engine.info().max_queues.min(4) as u64;
    thread::scope(|scope| {
        for number in 0..queues {
            let engine = &*engine;
            let mut queue = engine.queue(8).unwrap();
            scope.spawn(move || {
                let mut completions = Vec::new();
                for round in 0..16 {
                    let offset = (round * queues + number) * 8192;
                    let data = pattern(offset, 8192);
                    let memory = buffers(engine, 8192, Cut::Whole, Some(&data));
                    queue.submit(Request::write(round, offset, memory));
                    queue.submit(Request::flush(100));
                }
                queue.drain(crate::disk::TIMEOUT, &mut completions).unwrap();
                assert_eq!(completions.len(), 32);
                assert!(completions.iter().all(|done| done.result.is_ok()));
            });
        }
    });
    let mut disk = Disk::new(engine);
    for offset in (0..queues * 16 * 8192).step_by(8192) {
        assert!(disk.read(offset, 8192, Cut::Whole) == pattern(offset, 8192));
    }
    disk.close();
}

/// A request of the property test, in blocks of the image.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64, Cut),
    Read(u64, u64, Cut),
    WriteZeroes(u64, u64, bool),
    Flush,
    /// Waits for all requests so far.
    Wait,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0u64..120, 1u64..40);
    let cut = || {
        prop_oneof![
            Just(Cut::Whole),
            Just(Cut::Odd),
            Just(Cut::Sectors),
            (1usize..5000).prop_map(Cut::At),
        ]
    };
    prop_oneof![
        4 => (range(), cut()).prop_map(|((start, len), cut)| Step::Write(start, len, cut)),
        4 => (range(), cut()).prop_map(|((start, len), cut)| Step::Read(start, len, cut)),
        1 => (range(), any::<bool>())
            .prop_map(|((start, len), may_unmap)| Step::WriteZeroes(start, len, may_unmap)),
        1 => Just(Step::Flush),
        2 => Just(Step::Wait),
        1 => Just(Step::Reopen),
    ]
}

/// The blocks of a request in flight.
struct Claim {
    start: usize,
    end: usize,
    is_write: bool,
}

struct Checker<'a> {
    target: &'a dyn Target,
    disk: Disk,
    model: Vec<u8>,
    claims: Vec<Claim>,
    expected: Vec<Option<Vec<u8>>>,
}

impl Checker<'_> {
    /// Waits if the request overlaps one in flight, unless both are reads.
    fn claim(&mut self, start: usize, end: usize, is_write: bool) {
        let conflicts =
            |claim: &Claim| claim.start < end && start < claim.end && (is_write || claim.is_write);
        if self.claims.iter().any(conflicts) {
            self.wait();
        }
        self.claims.push(Claim {
            start,
            end,
            is_write,
        });
    }

    fn wait(&mut self) {
        for completion in self.disk.drain() {
            completion.result.unwrap();
            if let Some(expected) = &self.expected[completion.tag as usize] {
                assert!(bytes(&completion.buffers) == *expected);
            }
        }
        self.claims.clear();
    }

    fn step(&mut self, step: Step) {
        let info = self.disk.info();
        let block = info.logical_block_size as usize;
        let range = |start: u64, len: u64| {
            let start = start as usize * block;
            (start, len as usize * block)
        };
        let tag = self.expected.len() as u64;
        let mut expected = None;
        match step {
            Step::Write(start, len, cut) => {
                let (start, len) = range(start, len);
                self.claim(start, start + len, true);
                let data = pattern(tag, len);
                let memory = buffers(&*self.disk.engine, len, cut, Some(&data));
                self.model[start..start + len].copy_from_slice(&data);
                self.disk
                    .queue
                    .submit(Request::write(tag, start as u64, memory));
            }
            Step::Read(start, len, cut) => {
                let (start, len) = range(start, len);
                self.claim(start, start + len, false);
                let memory = buffers(&*self.disk.engine, len, cut, None);
                expected = Some(self.model[start..start + len].to_vec());
                self.disk
                    .queue
                    .submit(Request::read(tag, start as u64, memory));
            }
            Step::WriteZeroes(start, len, may_unmap) if info.write_zeroes => {
                let (start, len) = range(start, len);
                self.claim(start, start + len, true);
                self.model[start..start + len].fill(0);
                let request = Request::write_zeroes(tag, start as u64, len as u64, may_unmap);
                self.disk.queue.submit(request);
            }
            Step::Flush => self.disk.queue.submit(Request::flush(tag)),
            Step::Reopen if self.target.is_persistent() => {
                self.wait();
                self.reopen();
            }
            Step::WriteZeroes(..) | Step::Wait | Step::Reopen => self.wait(),
        }
        self.expected.push(expected);
        self.disk.queue.kick().unwrap();
    }

    fn reopen(&mut self) {
        let spare = Disk::new(target_engine());
        std::mem::replace(&mut self.disk, spare).close();
        self.disk = self.target.disk();
    }
}

pub fn same_as_a_model(target: &dyn Target) {
    let config = Config {
        cases: target.cases(),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let steps = proptest::collection::vec(step(), 1..60);
    TestRunner::new(config)
        .run(&steps, |steps| {
            let mut disk = target.disk();
            let len = 160 * disk.info().logical_block_size as usize;
            disk.write(0, &vec![0; len], Cut::Whole);
            let mut checker = Checker {
                target,
                disk,
                model: vec![0; len],
                claims: Vec::new(),
                expected: Vec::new(),
            };
            for step in steps {
                checker.step(step);
            }
            checker.wait();
            let data = checker.disk.read(0, len, Cut::Whole);
            prop_assert!(data == checker.model);
            checker.disk.close();
            Ok(())
        })
        .unwrap();
}
