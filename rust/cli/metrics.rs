// SPDX-License-Identifier: GPL-2.0-only

//! `rblk metrics`: counters and states in the text format of Prometheus.
//!
//! For the textfile collector of `node_exporter`, or any program that runs a command.

use crate::exit::{self, Error};
use crate::host::state_name;
use api::{AgentCall, Counters, DiskEntry, HostStatus, RunDir, StorageState, StorageStatus};
use std::fmt::{Display, Write as _};
use std::time::Duration;

/// Limit for a reply of `rblkd`.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A counter of a disk: its name, its description, and where it is.
type Counter = (&'static str, &'static str, fn(&Counters) -> u64);

const COUNTERS: [Counter; 8] = [
    ("reads_total", "Reads that were answered.", |counters| {
        counters.reads
    }),
    ("read_bytes_total", "Bytes that were read.", |counters| {
        counters.sectors_read.saturating_mul(512)
    }),
    ("writes_total", "Writes that were answered.", |counters| {
        counters.writes
    }),
    (
        "written_bytes_total",
        "Bytes that were written.",
        |counters| counters.sectors_written.saturating_mul(512),
    ),
    ("flushes_total", "Flushes and barriers.", |counters| {
        counters.flushes
    }),
    (
        "errors_total",
        "Requests that were answered with an error.",
        |counters| counters.errors,
    ),
    (
        "refused_total",
        "Requests that were not valid.",
        |counters| counters.refused,
    ),
    (
        "retries_total",
        "Tries after an error that may pass.",
        |counters| counters.retries,
    ),
];

/// Prints the metrics.
pub fn run(run: &RunDir) -> Result<(), Error> {
    let call = |call| api::socket::call(&run.agent_socket(), call, TIMEOUT);
    let host: HostStatus = call(&AgentCall::HostStatus)?;
    let disks = api::socket::call(&run.agent_socket(), &AgentCall::List, TIMEOUT)?;
    exit::print(&text(&host, disks))?;
    Ok(())
}

/// The text of all metrics.
#[derive(Default)]
struct Text(String);

impl Text {
    /// Begins a metric.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP rblk_{name} {help}"));
        self.line(format_args!("# TYPE rblk_{name} {kind}"));
    }

    /// Adds a value of a metric.
    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, text)| format!("{name}=\"{}\"", escape(text)))
            .collect();
        match labels.is_empty() {
            true => self.line(format_args!("rblk_{name} {value}")),
            false => self.line(format_args!("rblk_{name}{{{}}} {value}", labels.join(","))),
        }
    }

    fn line(&mut self, line: impl Display) {
        // A string takes everything.
        let _ = writeln!(self.0, "{line}");
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn text(host: &HostStatus, disks: Vec<DiskEntry>) -> String {
    let mut text = Text::default();
    text.metric("ready_seconds", "gauge", "Seconds since rblkd was ready.");
    text.value("ready_seconds", &[], host.uptime);
    storages(&mut text, &host.storages);
    let labelled: Vec<(String, DiskEntry)> = disks
        .into_iter()
        .map(|entry| (entry.record.disk.to_string(), entry))
        .collect();
    states(&mut text, &labelled);
    counters(&mut text, &labelled);
    text.0
}

fn storages(text: &mut Text, storages: &[StorageStatus]) {
    text.metric(
        "storage_state",
        "gauge",
        "1 for the state that a storage domain is in.",
    );
    let states = [
        StorageState::Unknown,
        StorageState::Up,
        StorageState::Slow,
        StorageState::Down,
    ];
    for storage in storages {
        for state in states {
            let labels = [
                ("storage", storage.name.as_str()),
                ("state", state_name(state)),
            ];
            text.value("storage_state", &labels, u8::from(state == storage.state));
        }
    }
    text.metric(
        "storage_latency_seconds",
        "gauge",
        "Time of the last check of a storage domain.",
    );
    for storage in storages {
        if let Some(latency) = storage.latency_ms {
            let labels = [("storage", storage.name.as_str())];
            text.value("storage_latency_seconds", &labels, latency as f64 / 1000.0);
        }
    }
    text.metric(
        "storage_failures_total",
        "counter",
        "Checks of a storage domain that failed.",
    );
    for storage in storages {
        let labels = [("storage", storage.name.as_str())];
        text.value("storage_failures_total", &labels, storage.failures);
    }
}

/// Returns the labels of a disk.
fn labels<'a>(disk: &'a str, entry: &'a DiskEntry) -> [(&'static str, &'a str); 3] {
    let domain = entry.record.domain.as_deref().unwrap_or_default();
    [
        ("disk", disk),
        ("domain", domain),
        ("device", entry.record.name.as_str()),
    ]
}

fn states(text: &mut Text, disks: &[(String, DiskEntry)]) {
    text.metric("disk_served", "gauge", "1 if a process serves the disk.");
    for (disk, entry) in disks {
        let served = u8::from(entry.record.phase.is_running());
        text.value("disk_served", &labels(disk, entry), served);
    }
    text.metric(
        "disk_restarts_total",
        "counter",
        "Processes that were started in place of one that died.",
    );
    for (disk, entry) in disks {
        text.value(
            "disk_restarts_total",
            &labels(disk, entry),
            entry.record.restarts,
        );
    }
    text.metric("disk_in_flight", "gauge", "Requests in flight.");
    for (disk, entry) in disks {
        if let Some(status) = &entry.status {
            let queues = status.queues.iter();
            let in_flight: u64 = queues.map(|queue| queue.in_flight).sum();
            text.value("disk_in_flight", &labels(disk, entry), in_flight);
        }
    }
}

fn counters(text: &mut Text, disks: &[(String, DiskEntry)]) {
    for (name, help, counter) in COUNTERS {
        let name = format!("disk_{name}");
        text.metric(
            &name,
            "counter",
            &format!("{help} Since the start of the disk's process."),
        );
        for (disk, entry) in disks {
            if let Some(status) = &entry.status {
                text.value(&name, &labels(disk, entry), counter(&status.counters));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::{Phase, Record};

    #[test]
    fn metrics_have_the_format_of_prometheus() {
        let host = HostStatus {
            version: String::new(),
            pid: 1,
            uptime: 5,
            startup: Vec::new(),
            storages: vec![StorageStatus {
                name: "san \"a\"".to_owned(),
                image: String::new(),
                state: StorageState::Up,
                since: 0,
                cause: None,
                latency_ms: Some(1500),
                checks: 2,
                failures: 1,
                history: Vec::new(),
            }],
        };
        let status = serde_json::from_str(
            r#"{"pid":7,"sectors":8,"block_size":512,"paused":false,"quota":{"pages":1,"requests":1},"queues":[],"counters":{"sectors_read":2}}"#,
        );
        let entry = DiskEntry {
            record: Record {
                disk: "5/51712".parse().unwrap(),
                name: "xvda".to_owned(),
                domain: Some("web".to_owned()),
                image: String::new(),
                restarts: 0,
                replaced: None,
                phase: Phase::Starting,
            },
            status: Some(status.unwrap()),
        };
        let text = text(&host, vec![entry]);
        let mut known = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                known.push(rest.split(' ').next().unwrap().to_owned());
            } else if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(known.last().map(String::as_str), name.split('{').next());
                assert!(value.parse::<f64>().is_ok(), "{line}");
            }
        }
        for line in [
            "rblk_ready_seconds 5",
            "rblk_storage_state{storage=\"san \\\"a\\\"\",state=\"up\"} 1",
            "rblk_storage_latency_seconds{storage=\"san \\\"a\\\"\"} 1.5",
            "rblk_disk_served{disk=\"5/51712\",domain=\"web\",device=\"xvda\"} 0",
            "rblk_disk_read_bytes_total{disk=\"5/51712\",domain=\"web\",device=\"xvda\"} 1024",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
