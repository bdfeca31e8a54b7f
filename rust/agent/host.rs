// SPDX-License-Identifier: GPL-2.0-only

//! The state of `rblkd`: the steps of its start, its storage domains, the last events.

use crate::events::Journal;
use crate::storage::Storages;
use api::{HostStatus, Step};
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The start of `rblkd`: each step is logged with its duration.
pub struct Startup {
    began: Instant,
    steps: Vec<Step>,
}

/// The state of `rblkd`, as it reports it.
#[derive(Clone)]
pub struct Host {
    ready: Instant,
    startup: Vec<Step>,
    /// The last events.
    pub journal: Arc<Journal>,
    /// The storage domains.
    pub storages: Arc<Storages>,
}

impl Startup {
    /// Begins a start.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            steps: Vec::new(),
        }
    }

    /// Does a step, and logs its duration.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = work();
        self.log(name, began.elapsed());
        result
    }

    fn log(&mut self, name: &str, took: Duration) {
        api::message!("start: {name}: {:.1} ms", took.as_secs_f64() * 1000.0);
        self.steps.push(Step {
            name: name.to_owned(),
            microseconds: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        });
    }

    /// Ends the start: `rblkd` is ready.
    pub fn finish(mut self, journal: Arc<Journal>, storages: Arc<Storages>) -> Host {
        self.log("ready", self.began.elapsed());
        Host {
            ready: Instant::now(),
            startup: self.steps,
            journal,
            storages,
        }
    }
}

impl Default for Startup {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// Returns the state of `rblkd`.
    pub fn status(&self) -> HostStatus {
        HostStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            uptime: self.ready.elapsed().as_secs(),
            startup: self.startup.clone(),
            storages: self.storages.status(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_the_start_are_kept() {
        let mut startup = Startup::new();
        assert_eq!(startup.step("records", || 7), 7);
        let status = startup.finish(Arc::default(), Arc::default()).status();
        let names: Vec<&str> = status
            .startup
            .iter()
            .map(|step| step.name.as_str())
            .collect();
        assert_eq!(names, ["records", "ready"]);
        assert_eq!(status.pid, process::id());
    }
}
