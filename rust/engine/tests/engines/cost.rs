// SPDX-License-Identifier: GPL-2.0-only

//! The cost of requests, beside QEMU's driver `rbd` and `rbd bench`, on the same image.
//!
//! Each program runs alone, writes or reads blocks of 4 KiB from the start of the image, and does
//! that three times in turn with the others. A run with one request is subtracted from each: it is
//! the cost of opening and closing the image, a row of its own.

use crate::disk::{buffers, patient, Cut, Disk};
use crate::rbd::Image;
use engine::{Options, Request};
use rustix::event::{poll, PollFd, PollFlags};
use std::process::{Command, Stdio};
use std::time::Instant;

const BLOCK: u64 = 4096;
const RUNS: usize = 3;

/// The size of the image.
const SIZE: u64 = 64 << 20;

/// The requests of a run one at a time; a deep queue gets as many times as it is deep, up to four.
const REQUESTS: u64 = 2000;

/// The time and the CPU time of a process in seconds.
#[derive(Clone, Copy)]
struct Cost {
    time: f64,
    cpu: f64,
}

/// A program that is compared.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Program {
    Engine,
    Qemu,
    RbdBench,
}

/// The operation of a program.
#[derive(Clone, Copy)]
struct Workload {
    writes: bool,
    depth: u64,
    requests: u64,
}

/// Runs a command, without its output.
fn measure(command: &[String]) -> Cost {
    let script = "TIMEFORMAT='%R %U %S'; time \"$@\" >/dev/null 2>&1";
    let output = Command::new("bash")
        .args(["-ec", script, "bash"])
        .args(command)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{command:?}: {text}");
    let numbers: Vec<f64> = text
        .split_whitespace()
        .map(|part| part.parse().unwrap())
        .collect();
    Cost {
        time: numbers[0],
        cpu: numbers[1] + numbers[2],
    }
}

/// Returns the command of a program.
fn command(program: Program, image: &Image, workload: Workload) -> Vec<String> {
    let Workload {
        writes,
        depth,
        requests,
    } = workload;
    let conf = image.address.conf.clone().unwrap();
    let kind = if writes { "write" } else { "read" };
    let line = match program {
        Program::Engine => format!(
            "env COST_URI={} COST_DEPTH={depth} COST_REQUESTS={requests} COST_KIND={kind} {} \
             --exact cost::process --ignored",
            image.uri(),
            std::env::current_exe().unwrap().display(),
        ),
        Program::Qemu => format!(
            "qemu-img bench -f raw -t none -s {BLOCK} -c {requests} -d {depth} {} \
             rbd:rbd/{}:conf={conf}",
            if writes { "-w" } else { "-q" },
            image.name,
        ),
        Program::RbdBench => format!(
            "rbd -c {conf} bench --io-type {kind} --io-pattern seq --io-size {BLOCK} \
             --io-threads {depth} --io-total {} --rbd_cache=false {}",
            requests * BLOCK,
            image.name,
        ),
    };
    line.split_whitespace().map(str::to_owned).collect()
}

/// Returns the cost of a request, in microseconds.
fn cost_of_request(program: Program, image: &Image, workload: Workload) -> Cost {
    let one = Workload {
        requests: 1,
        depth: 1,
        ..workload
    };
    let base = measure(&command(program, image, one));
    let all = measure(&command(program, image, workload));
    let per_request = |all: f64, base: f64| (all - base) * 1e6 / workload.requests as f64;
    Cost {
        time: per_request(all.time, base.time),
        cpu: per_request(all.cpu, base.cpu),
    }
}

fn median(costs: &[Cost]) -> Cost {
    let middle = |number: fn(&Cost) -> f64| {
        let mut numbers: Vec<f64> = costs.iter().map(number).collect();
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    Cost {
        time: middle(|cost| cost.time),
        cpu: middle(|cost| cost.cpu),
    }
}

/// Runs the programs in turn, and prints a row of the table with the medians.
fn row(title: &str, programs: &[Program], cost: impl Fn(Program) -> Cost) {
    let mut costs: Vec<Vec<Cost>> = vec![Vec::new(); programs.len()];
    for _ in 0..RUNS {
        for (program, costs) in programs.iter().zip(&mut costs) {
            costs.push(cost(*program));
        }
    }
    let costs: Vec<Cost> = costs.iter().map(|costs| median(costs)).collect();
    let (ours, qemu) = (costs[0], costs[1]);
    let bench = costs
        .get(2)
        .map_or_else(String::new, |cost| format!("{:.0}", cost.time));
    println!(
        "row {title};{:.0};{:.0};{:.2};{bench};{:.0};{:.0};{:.2}",
        ours.time,
        qemu.time,
        ours.time / qemu.time,
        ours.cpu,
        qemu.cpu,
        ours.cpu / qemu.cpu,
    );
}

/// Prints the table.
#[test]
#[ignore = "a measurement, see scripts/bench-cluster"]
fn table() {
    let image = Image::create();
    image.pool().enlarge(&image.name, SIZE).unwrap();
    let all = [Program::Engine, Program::Qemu, Program::RbdBench];
    // So that all blocks are there.
    let fill = Workload {
        writes: true,
        depth: 32,
        requests: SIZE / BLOCK,
    };
    measure(&command(Program::Qemu, &image, fill));
    for (depth, factor) in [(1, 1), (32, 4)] {
        for writes in [false, true] {
            let workload = Workload {
                writes,
                depth,
                requests: REQUESTS * factor,
            };
            let title = format!("{}, {depth}", if writes { "write" } else { "read" });
            row(&title, &all, |program| {
                cost_of_request(program, &image, workload)
            });
        }
    }
    let one = Workload {
        writes: false,
        depth: 1,
        requests: 1,
    };
    row("open, read once, close", &all[..2], |program| {
        let cost = measure(&command(program, &image, one));
        Cost {
            time: cost.time * 1e6,
            cpu: cost.cpu * 1e6,
        }
    });
}

/// The process of the engine.
#[test]
#[ignore = "it is a process of the measurement"]
fn process() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let number = |name: &str| variable(name).parse::<u64>().unwrap();
    let (requests, depth) = (number("COST_REQUESTS"), number("COST_DEPTH"));
    let writes = variable("COST_KIND") == "write";
    let options = Options {
        runtime_dir: daemons::work_dir("run"),
        ..patient()
    };
    let engine = engine::open(&variable("COST_URI").parse().unwrap(), &options).unwrap();
    let mut disk = Disk::new(engine);
    let mut free: Vec<_> = (0..depth)
        .map(|_| buffers(&*disk.engine, BLOCK as usize, Cut::Whole, None))
        .collect();
    let (mut started, mut completed) = (0, 0);
    let begin = Instant::now();
    while completed < requests {
        while started < requests {
            let Some(buffers) = free.pop() else {
                break;
            };
            let offset = started * BLOCK % SIZE;
            disk.queue.submit(match writes {
                true => Request::write(started, offset, buffers),
                false => Request::read(started, offset, buffers),
            });
            started += 1;
        }
        disk.queue.kick().unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            poll(&mut [PollFd::new(&disk.queue, PollFlags::IN)], None).unwrap();
            disk.queue.completions(&mut done).unwrap();
        }
        for completion in done {
            completion.result.unwrap();
            free.push(completion.buffers);
            completed += 1;
        }
    }
    eprintln!("{requests} requests in {:?}", begin.elapsed());
    disk.close();
}
