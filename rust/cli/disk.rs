// SPDX-License-Identifier: GPL-2.0-only

//! `rblk disk`.

use crate::args::{DiskCommand, DiskName};
use crate::exit::{self, io_failure, print_json, Error};
use crate::explain;
use crate::table;
use api::agent::EVENTS_WAIT;
use api::{AgentCall, Counters, DiskEntry, DiskId, DiskStatus, Phase, Record, RunDir};
use api::{Event, Failure, FailureKind};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io;
use std::thread;
use std::time::Duration;

/// Limit for a reply of `rblkd`. A pause waits for requests in flight.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs a command.
pub fn run(run: &RunDir, command: &DiskCommand, json: bool) -> Result<(), Error> {
    match command {
        DiskCommand::List { watch: false } => list(run, json),
        DiskCommand::List { watch: true } => watch_list(run, json),
        DiskCommand::Stats { disk, watch: false } => print_stats(&stats(run, disk)?, json),
        DiskCommand::Stats { disk, watch: true } => watch(run, disk, json),
        DiskCommand::Explain { disk } => explain::run(run, disk, json),
        DiskCommand::Pause { disk } => {
            let disk = find(run, disk)?;
            done(call(run, &AgentCall::Pause { disk })?, json)
        }
        DiskCommand::Resume { disk } => {
            let disk = find(run, disk)?;
            done(call(run, &AgentCall::Resume { disk })?, json)
        }
        DiskCommand::Resize { disk, size } => {
            let (disk, size) = (find(run, disk)?, *size);
            done(call(run, &AgentCall::Resize { disk, size })?, json)
        }
        DiskCommand::Retarget { disk, image } => {
            let (disk, image) = (find(run, disk)?, image.clone());
            done(call(run, &AgentCall::Retarget { disk, image })?, json)
        }
        DiskCommand::Restart { disk } => {
            let disk = find(run, disk)?;
            done(call(run, &AgentCall::Restart { disk })?, json)
        }
    }
}

/// Prints what a call returned, for programs only: people see the exit status.
fn done(value: Value, json: bool) -> Result<(), Error> {
    if json {
        return print_json(&value);
    }
    Ok(())
}

fn call<R: DeserializeOwned>(run: &RunDir, call: &AgentCall) -> Result<R, Error> {
    Ok(api::socket::call(&run.agent_socket(), call, TIMEOUT)?)
}

fn stats(run: &RunDir, name: &DiskName) -> Result<DiskStatus, Error> {
    let disk = find(run, name)?;
    call(run, &AgentCall::Stats { disk })
}

fn find(run: &RunDir, name: &DiskName) -> Result<DiskId, Error> {
    // The call List asks all processes, and waits for those that do not answer.
    let records = run.records().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            let cause = format!("{}: {error}", run.path().display());
            Failure::new(FailureKind::NoAnswer, cause, "check that rblkd runs")
        }
        _ => io_failure(run.path().display(), &error),
    })?;
    let mut matching = records.iter().filter(|record| is_named(record, name));
    match (matching.next(), matching.next()) {
        (Some(record), None) => Ok(record.disk),
        (found, _) => {
            let what = if found.is_some() {
                "more than one disk is"
            } else {
                "no disk is"
            };
            let DiskName { domain, device } = name;
            let cause = format!("{what} called {domain}/{device}");
            let remedy = "rblk disk list shows the numbers of all disks";
            Err(Failure::new(FailureKind::NoSuchDisk, cause, remedy).into())
        }
    }
}

fn is_named(record: &Record, name: &DiskName) -> bool {
    let DiskId { domid, devid } = record.disk;
    let domain = record.domain.as_ref() == Some(&name.domain) || domid.to_string() == name.domain;
    domain && (record.name == name.device || devid.to_string() == name.device)
}

fn list(run: &RunDir, json: bool) -> Result<(), Error> {
    let entries: Vec<DiskEntry> = call(run, &AgentCall::List)?;
    if json {
        return print_json(&entries);
    }
    exit::print(&list_table(&entries))?;
    Ok(())
}

/// Prints the list, and again whenever something has happened.
fn watch_list(run: &RunDir, json: bool) -> Result<(), Error> {
    let mut after = last_event(run, 0, false)?;
    loop {
        list(run, json)?;
        // Within the limit for the wait there may be none: the sizes may have changed.
        after = last_event(run, after, true)?;
        if !json {
            exit::print("\n")?;
        }
    }
}

/// Returns the number of the last event, or `after` if there is none after it.
fn last_event(run: &RunDir, after: u64, wait: bool) -> Result<u64, Error> {
    let limit = TIMEOUT.saturating_add(EVENTS_WAIT);
    let call = AgentCall::Events { after, wait };
    let events: Vec<Event> = api::socket::call(&run.agent_socket(), &call, limit)?;
    Ok(events.last().map_or(after, |event| event.number))
}

fn list_table(entries: &[DiskEntry]) -> String {
    let mut rows = vec![[
        "DISK", "DOMAIN", "STATE", "SIZE", "PID", "RESTARTS", "IMAGE",
    ]
    .map(str::to_owned)];
    rows.extend(entries.iter().map(list_row));
    table::align(&rows)
}

fn list_row(entry: &DiskEntry) -> [String; 7] {
    let DiskEntry { record, status } = entry;
    let state = match (&record.phase, status) {
        (Phase::Starting, _) => "starting".to_owned(),
        (Phase::Opening { .. }, _) => "opening".to_owned(),
        (Phase::Failed { cause }, _) => format!("failed: {cause}"),
        (Phase::Running { .. }, None) => "no answer".to_owned(),
        (Phase::Running { .. }, Some(status)) if status.paused => "paused".to_owned(),
        (Phase::Running { .. }, Some(status)) if status.queues.is_empty() => {
            "not connected".to_owned()
        }
        (Phase::Running { .. }, Some(_)) => "connected".to_owned(),
    };
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let size = status
        .as_ref()
        .map(|status| table::size(bytes(status.sectors)));
    [
        format!("{}/{}", record.disk.domid, record.name),
        or_dash(record.domain.clone()),
        state,
        or_dash(size),
        or_dash(record.phase.pid().map(|pid| pid.to_string())),
        record.restarts.to_string(),
        record.image.clone(),
    ]
}

/// Returns the number of bytes of sectors.
fn bytes(sectors: u64) -> u64 {
    sectors.saturating_mul(512)
}

fn watch(run: &RunDir, disk: &DiskName, json: bool) -> Result<(), Error> {
    let mut last = stats(run, disk)?;
    loop {
        thread::sleep(Duration::from_secs(1));
        let now = stats(run, disk)?;
        let counters = difference(&now, &last);
        last = now.clone();
        print_stats(&DiskStatus { counters, ..now }, json)?;
    }
}

/// Returns what has happened between two samples. A new process counts from 0 on.
fn difference(now: &DiskStatus, before: &DiskStatus) -> Counters {
    if now.pid != before.pid {
        return now.counters;
    }
    let (now, before) = (&now.counters, &before.counters);
    Counters {
        reads_started: now.reads_started.saturating_sub(before.reads_started),
        reads: now.reads.saturating_sub(before.reads),
        sectors_read: now.sectors_read.saturating_sub(before.sectors_read),
        writes_started: now.writes_started.saturating_sub(before.writes_started),
        writes: now.writes.saturating_sub(before.writes),
        sectors_written: now.sectors_written.saturating_sub(before.sectors_written),
        flushes: now.flushes.saturating_sub(before.flushes),
        discards: now.discards.saturating_sub(before.discards),
        errors: now.errors.saturating_sub(before.errors),
        refused: now.refused.saturating_sub(before.refused),
        retries: now.retries.saturating_sub(before.retries),
        waited: now.waited.saturating_sub(before.waited),
        stuck: now.stuck.saturating_sub(before.stuck),
        read_us: now.read_us.saturating_sub(before.read_us),
        write_us: now.write_us.saturating_sub(before.write_us),
        adopted: now.adopted.saturating_sub(before.adopted),
    }
}

fn print_stats(status: &DiskStatus, json: bool) -> Result<(), Error> {
    if json {
        return print_json(status);
    }
    exit::print(&stats_table(status))?;
    Ok(())
}

fn stats_table(status: &DiskStatus) -> String {
    let counters = &status.counters;
    let mut rows = vec![["OPERATION", "REQUESTS", "DATA"].map(str::to_owned)];
    for (name, requests, sectors) in [
        ("read", counters.reads, Some(counters.sectors_read)),
        ("write", counters.writes, Some(counters.sectors_written)),
        ("flush", counters.flushes, None),
        ("discard", counters.discards, None),
    ] {
        let data = sectors.map_or_else(|| "-".to_owned(), |sectors| table::size(bytes(sectors)));
        rows.push([name.to_owned(), requests.to_string(), data]);
    }
    format!(
        "{}errors {}, refused {}, retries {}, waited {}, stuck {}, adopted {}\n\
         quota {} pages and {} requests\nin flight {}\n",
        table::align(&rows),
        counters.errors,
        counters.refused,
        counters.retries,
        counters.waited,
        counters.stuck,
        counters.adopted,
        status.quota.pages,
        status.quota.requests,
        table::in_flight(&status.queues),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::{OldestRequest, Operation, QueueStatus, Quota};
    use std::os::unix::net::UnixListener;

    fn entry(phase: Phase) -> DiskEntry {
        DiskEntry {
            record: Record {
                disk: DiskId {
                    domid: 5,
                    devid: 51712,
                },
                name: "xvda".to_owned(),
                domain: Some("web".to_owned()),
                image: "aio:/a".to_owned(),
                restarts: 1,
                replaced: None,
                phase,
            },
            status: None,
        }
    }

    fn running() -> DiskEntry {
        entry(Phase::Running {
            pid: 7,
            start_time: 1,
        })
    }

    fn status() -> DiskStatus {
        DiskStatus {
            pid: 7,
            sectors: 2048,
            block_size: 512,
            paused: false,
            stays_paused: false,
            queues: vec![QueueStatus {
                in_flight: 2,
                oldest: Some(OldestRequest {
                    operation: Operation::Write,
                    sector: 64,
                    sectors: 8,
                    retries: 1,
                    age_ms: 3,
                }),
                paused: false,
            }],
            quota: Quota {
                pages: 8,
                requests: 4,
            },
            counters: Counters {
                reads: 4,
                sectors_read: 32,
                ..Counters::default()
            },
        }
    }

    #[test]
    fn the_list_shows_states() {
        let mut connected = running();
        connected.status = Some(status());
        let failed = entry(Phase::Failed {
            cause: "no file".to_owned(),
        });
        assert_eq!(
            list_table(&[connected, running(), failed]),
            "DISK    DOMAIN  STATE            SIZE   PID  RESTARTS  IMAGE\n\
             5/xvda  web     connected        1 MiB  7    1         aio:/a\n\
             5/xvda  web     no answer        -      7    1         aio:/a\n\
             5/xvda  web     failed: no file  -      -    1         aio:/a\n"
        );
    }

    #[test]
    fn disks_have_names_and_numbers() {
        let record = running().record;
        for (name, found) in [
            ("web/xvda", true),
            ("5/xvda", true),
            ("5/51712", true),
            ("web/51712", true),
            ("5/xvdb", false),
            ("mail/xvda", false),
        ] {
            assert_eq!(is_named(&record, &name.parse().unwrap()), found, "{name}");
        }
    }

    #[test]
    fn statistics_are_a_table() {
        assert_eq!(
            stats_table(&status()),
            "OPERATION  REQUESTS  DATA\n\
             read       4         16 KiB\n\
             write      0         0 B\n\
             flush      0         -\n\
             discard    0         -\n\
             errors 0, refused 0, retries 0, waited 0, stuck 0, adopted 0\n\
             quota 8 pages and 4 requests\n\
             in flight 2, the oldest for 3 ms: write of sectors 64+8, retries 1\n"
        );
    }

    #[test]
    fn rates_are_of_one_process() {
        let mut now = status();
        now.counters.reads = 10;
        assert_eq!(difference(&now, &status()).reads, 6);
        assert_eq!(difference(&now, &status()).sectors_read, 0);
        now.pid = 8;
        assert_eq!(difference(&now, &status()).reads, 10);
    }

    #[test]
    fn a_command_reaches_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(dir.path());
        run_dir.write_record(&running().record).unwrap();
        let listener = UnixListener::bind(run_dir.agent_socket()).unwrap();
        let server = thread::spawn(move || {
            let mut calls = Vec::new();
            let (stream, _) = listener.accept().unwrap();
            let handle = |call: AgentCall| {
                calls.push(call);
                Ok(())
            };
            api::socket::serve(stream, handle).unwrap();
            calls
        });
        let disk = "web/xvda".parse().unwrap();
        run(&run_dir, &DiskCommand::Pause { disk }, false).unwrap();
        // Other processes are not asked.
        let disk = running().record.disk;
        assert_eq!(server.join().unwrap(), [AgentCall::Pause { disk }]);
    }
}
