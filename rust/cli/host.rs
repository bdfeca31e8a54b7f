// SPDX-License-Identifier: GPL-2.0-only

//! `rblk host`, `rblk storage` and `rblk events`: the state of `rblkd` and of storage.

use crate::exit::{self, print_json, Error};
use crate::table;
use api::agent::EVENTS_WAIT;
use api::{AgentCall, DiskEntry, Event, Failure, FailureKind, HostStatus, RunDir};
use api::{StorageState, StorageStatus};
use engine::{Options, Uri};
use serde::de::DeserializeOwned;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Limit for a reply that is not waited for by intention.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Limit for the I/O of a check of storage. `rblkd` ends it before.
const PROBE_TIMEOUT: Duration = Duration::from_secs(60);

/// The greatest number of bytes that a check reads.
const PROBE_BYTES: usize = 4096;

fn call<R: DeserializeOwned>(run: &RunDir, call: &AgentCall, wait: Duration) -> Result<R, Error> {
    Ok(api::socket::call(&run.agent_socket(), call, wait)?)
}

/// Prints the state of `rblkd`.
pub fn status(run: &RunDir, json: bool) -> Result<(), Error> {
    let status: HostStatus = call(run, &AgentCall::HostStatus, TIMEOUT)?;
    if json {
        return print_json(&status);
    }
    let disks: Vec<DiskEntry> = call(run, &AgentCall::List, TIMEOUT)?;
    exit::print(&status_text(&status, &disks))?;
    Ok(())
}

fn status_text(status: &HostStatus, disks: &[DiskEntry]) -> String {
    let served = disks.iter().filter(|entry| entry.record.phase.is_running());
    let mut rows = vec![
        [
            "rblkd".to_owned(),
            format!("{}, process {}", status.version, status.pid),
        ],
        ["ready for".to_owned(), duration(status.uptime)],
        [
            "disks".to_owned(),
            format!("{}, of which {} are served", disks.len(), served.count()),
        ],
    ];
    rows.extend(status.startup.iter().map(|step| {
        let milliseconds = step.microseconds as f64 / 1000.0;
        [
            format!("start: {}", step.name),
            format!("{milliseconds:.1} ms"),
        ]
    }));
    let mut text = table::align(&rows);
    if !status.storages.is_empty() {
        text.push('\n');
        text.push_str(&storage_table(&status.storages, now()));
    }
    text
}

/// Prints the states of the storage domains.
pub fn storage(run: &RunDir, json: bool) -> Result<(), Error> {
    let status: HostStatus = call(run, &AgentCall::HostStatus, TIMEOUT)?;
    if json {
        return print_json(&status.storages);
    }
    exit::print(&storage_table(&status.storages, now()))?;
    Ok(())
}

fn storage_table(storages: &[StorageStatus], now: u64) -> String {
    let mut rows =
        vec![["STORAGE", "STATE", "SINCE", "LATENCY", "IMAGE", "CAUSE"].map(str::to_owned)];
    rows.extend(storages.iter().map(|storage| {
        let latency = storage.latency_ms.map(|latency| format!("{latency} ms"));
        [
            storage.name.clone(),
            state_name(storage.state).to_owned(),
            duration(now.saturating_sub(storage.since)),
            latency.unwrap_or_else(|| "-".to_owned()),
            storage.image.clone(),
            storage.cause.clone().unwrap_or_default(),
        ]
    }));
    table::align(&rows)
}

/// Returns the name of a state.
pub fn state_name(state: StorageState) -> &'static str {
    match state {
        StorageState::Unknown => "unknown",
        StorageState::Up => "up",
        StorageState::Slow => "slow",
        StorageState::Down => "down",
    }
}

/// Reads the first bytes of an image, as `rblkd` does to check its storage.
pub fn probe(image: &Uri) -> Result<(), Error> {
    let options = Options {
        read_only: true,
        exclusive: false,
        reconnect_timeout: Duration::ZERO,
        ..Options::default()
    };
    read(image, &options).map_err(|error| {
        let (cause, remedy) = (error.cause(), error.remedy());
        Failure::new(FailureKind::Failed, cause, remedy)
    })?;
    Ok(())
}

fn read(image: &Uri, options: &Options) -> engine::Result<()> {
    let engine = engine::open(image, options)?;
    let size = usize::try_from(engine.info().size).unwrap_or(PROBE_BYTES);
    let buffer = engine.allocate(PROBE_BYTES.min(size))?;
    let mut queue = engine.queue(1)?;
    queue.submit(engine::Request::read(0, 0, vec![buffer]));
    let mut completions = Vec::new();
    queue.drain(PROBE_TIMEOUT, &mut completions)?;
    for completion in completions {
        completion.result?;
    }
    drop(queue);
    engine.close()
}

/// Prints the events, and with `follow` those that come.
pub fn events(run: &RunDir, follow: bool, json: bool) -> Result<(), Error> {
    let mut after = 0;
    let limit = TIMEOUT.saturating_add(EVENTS_WAIT);
    loop {
        let wait = follow;
        let events: Vec<Event> = call(run, &AgentCall::Events { after, wait }, limit)?;
        for event in &events {
            if json {
                print_json(event)?;
            } else {
                exit::print(&event_line(event))?;
            }
        }
        after = events.last().map_or(after, |event| event.number);
        if !follow {
            return Ok(());
        }
    }
}

fn event_line(event: &Event) -> String {
    let mut line = format!("{} ", time(event.time));
    if let Some(disk) = event.disk {
        // A string takes everything.
        let _ = write!(line, "{disk}: ");
    }
    line.push_str(&event.text);
    line.push('\n');
    line
}

/// Returns a time in UTC, as `date --iso-8601=seconds --utc` prints it.
fn time(seconds: u64) -> String {
    let (days, second) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Returns year, month and day of a day after 1970-01-01, in the Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64) {
    // Years are counted from March on, so that the day of a leap year is the last one.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, january) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + january, month, day)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Returns a duration in its two greatest units.
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::{EventKind, Step};

    fn san() -> StorageStatus {
        StorageStatus {
            name: "san".to_owned(),
            image: "raw:/srv/san/check".to_owned(),
            state: StorageState::Down,
            since: 1000,
            cause: Some("no answer for 10 seconds".to_owned()),
            latency_ms: None,
            checks: 3,
            failures: 1,
            history: Vec::new(),
        }
    }

    #[test]
    fn the_state_is_a_table() {
        let status = HostStatus {
            version: "0.1.0".to_owned(),
            pid: 7,
            uptime: 3661,
            startup: vec![Step {
                name: "ready".to_owned(),
                microseconds: 12_345,
            }],
            storages: Vec::new(),
        };
        assert_eq!(
            status_text(&status, &[]),
            "rblkd         0.1.0, process 7\n\
             ready for     1 h 1 min\n\
             disks         0, of which 0 are served\n\
             start: ready  12.3 ms\n"
        );
        assert_eq!(
            storage_table(&[san()], 1090),
            "STORAGE  STATE  SINCE       LATENCY  IMAGE               CAUSE\n\
             san      down   1 min 30 s  -        raw:/srv/san/check  no answer for 10 seconds\n"
        );
    }

    #[test]
    fn events_have_times() {
        let event = Event {
            number: 1,
            time: 1_796_000_000,
            disk: "5/51712".parse().ok(),
            kind: EventKind::Detached,
            text: "detached".to_owned(),
        };
        assert_eq!(
            event_line(&event),
            "2026-11-30T00:53:20Z 5/51712: detached\n"
        );
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(duration(90_000), "1 d 1 h");
    }

    #[test]
    fn an_image_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("check");
        let image: Uri = format!("raw:{}", path.display()).parse().unwrap();
        let Err(Error::Failure(failure)) = probe(&image) else {
            panic!("it is not there");
        };
        assert!(failure.text.cause.contains("check"), "{failure}");
        std::fs::write(&path, [0; 4096]).unwrap();
        probe(&image).unwrap();
    }
}
