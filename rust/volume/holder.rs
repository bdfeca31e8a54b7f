// SPDX-License-Identifier: GPL-2.0-only

//! The process that has a volume attached.

use crate::config::Config;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::process;

/// The process that has a volume attached.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Holder {
    /// The name of the host.
    pub host: String,
    /// The disk there: `DOMAIN/DEVICE`.
    pub disk: String,
    /// The pid.
    pub pid: u32,
    /// The start time in clock ticks after boot.
    start_time: u64,
    /// The boot of the host.
    boot: String,
    /// The namespace of the pid.
    namespace: String,
}

impl Holder {
    /// Returns this process, as the one that serves `disk`.
    pub fn this_process(config: &Config, disk: &str) -> Self {
        let pid = process::id();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Self {
            host: config.host.clone(),
            disk: disk.to_owned(),
            pid,
            start_time: start_time(pid).unwrap_or(0),
            boot: boot.trim().to_owned(),
            namespace: namespace.display().to_string(),
        }
    }

    /// Returns `true` if this is a process of the same host that has ended.
    pub(crate) fn has_ended(&self, on: &Self) -> bool {
        let names = |holder: &Self| {
            let Self {
                host,
                boot,
                namespace,
                ..
            } = holder.clone();
            (host, boot, namespace)
        };
        names(self) == names(on) && start_time(self.pid) != Some(self.start_time)
    }

    /// Returns `true` if this is a process of the same host before it was booted.
    ///
    /// Hosts have different names.
    pub(crate) fn has_rebooted(&self, on: &Self) -> bool {
        self.host == on.host && self.boot != on.boot
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "by disk {} on host {}, process {}",
            self.disk, self.host, self.pid
        )
    }
}

/// Returns when a process was started; [`None`] if there is none, or it has ended.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may contain spaces.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_has_ended_only_if_its_host_says_so() {
        let config = Config {
            etcd: Vec::new(),
            host: "a".to_owned(),
        };
        let this = Holder::this_process(&config, "1/2");
        assert!(!this.has_ended(&this) && !this.has_rebooted(&this));
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let pid = child.id();
        let dead = Holder {
            pid,
            ..this.clone()
        };
        assert!(dead.has_ended(&this) && !dead.has_rebooted(&this));
        let elsewhere = Holder {
            host: "b".to_owned(),
            ..dead.clone()
        };
        assert!(!elsewhere.has_ended(&this) && !elsewhere.has_rebooted(&this));
        let inside = Holder {
            namespace: "b".to_owned(),
            ..dead.clone()
        };
        assert!(!inside.has_ended(&this) && !inside.has_rebooted(&this));
        let before = Holder {
            boot: "b".to_owned(),
            ..dead
        };
        assert!(!before.has_ended(&this) && before.has_rebooted(&this));
    }
}
