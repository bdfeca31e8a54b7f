// SPDX-License-Identifier: GPL-2.0-only

//! The process that has a volume attached.

use crate::config::Config;
use engine::{Errno, Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::io;
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
    pub fn this_process(config: &Config, disk: &str) -> Result<Self> {
        let read = || -> io::Result<Self> {
            let pid = process::id();
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
            let namespace = fs::read_link("/proc/self/ns/pid")?;
            Ok(Self {
                host: config.host.clone(),
                disk: disk.to_owned(),
                pid,
                start_time: start_time(pid)?.ok_or(io::ErrorKind::NotFound)?,
                boot: boot.trim().to_owned(),
                namespace: namespace.display().to_string(),
            })
        };
        read().map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            Error::new(errno, format!("reading /proc: {error}"), "mount /proc")
        })
    }

    /// Returns the disk that this process serves.
    pub(crate) fn user(&self) -> User {
        User {
            host: self.host.clone(),
            disk: self.disk.clone(),
            boot: self.boot.clone(),
        }
    }

    /// Returns `true` if this is a process of the same host that has ended. If that cannot be found
    /// out, it counts as one that has not.
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
        let has_ended = || start_time(self.pid).is_ok_and(|time| time != Some(self.start_time));
        names(self) == names(on) && has_ended()
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

/// The disk of a guest that has used a volume.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct User {
    /// The name of the host.
    host: String,
    /// The disk there: `DOMAIN/DEVICE`.
    disk: String,
    /// The boot of the host, after which another domain may have the number.
    boot: String,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "by disk {} on host {}", self.disk, self.host)
    }
}

/// Returns when a process was started; [`None`] if there is none, or it has ended.
fn start_time(pid: u32) -> io::Result<Option<u64>> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => start_time_of(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::SRCH) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Returns when a process was started, from its `/proc/PID/stat`. The inner [`None`] says that it
/// has ended, the outer one that the text is not valid.
fn start_time_of(stat: &str) -> Option<Option<u64>> {
    // The name before it may contain spaces.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    match fields.next()? {
        "Z" | "X" => Some(None),
        _ => fields.nth(18)?.parse().ok().map(Some),
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
        let this = Holder::this_process(&config, "1/2").unwrap();
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

    #[test]
    fn only_what_proc_says_ends_a_process() {
        let fields = "1 ".repeat(18);
        assert_eq!(
            start_time_of(&format!("7 (a) b) S {fields}42 9")),
            Some(Some(42))
        );
        assert_eq!(start_time_of(&format!("7 (a) Z {fields}42 9")), Some(None));
        for text in ["", "7 (a)", "7 (a) S 1", "7 (a) S x"] {
            assert_eq!(start_time_of(text), None, "{text}");
        }
    }
}
