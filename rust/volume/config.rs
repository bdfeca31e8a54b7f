// SPDX-License-Identifier: GPL-2.0-only

//! The configuration file: where etcd is, and the name of this host.
//!
//! ```text
//! # /etc/rblk/volumes.conf
//! etcd = http://10.0.0.1:2379 http://10.0.0.2:2379 http://10.0.0.3:2379
//! host = xen1
//! ```

use engine::{Errno, Error, Result};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The path of the configuration file.
const PATH: &str = "/etc/rblk/volumes.conf";

/// The variable with another path.
const VARIABLE: &str = "RBLK_VOLUMES_CONF";

/// The configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The URLs of the members of etcd.
    pub etcd: Vec<String>,
    /// The name of this host, by which other hosts know it.
    pub host: String,
}

impl Config {
    /// Reads the configuration file: `/etc/rblk/volumes.conf`, or that in the environment variable
    /// `RBLK_VOLUMES_CONF`.
    pub fn load() -> Result<Self> {
        let path = env::var_os(VARIABLE).map_or_else(|| PathBuf::from(PATH), PathBuf::from);
        let text = fs::read_to_string(&path).map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            Error::new(
                errno,
                format!("reading {}: {error}", path.display()),
                "create it with the line: etcd = http://HOST:2379",
            )
        })?;
        Self::parse(&text, &path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut config = Self {
            etcd: Vec::new(),
            host: host_name(),
        };
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line
                .split_once('=')
                .map(|(key, value)| (key.trim(), value.trim()))
            {
                Some(("etcd", urls)) => {
                    config.etcd = urls.split_whitespace().map(str::to_owned).collect();
                }
                Some(("host", host)) => config.host = host.to_owned(),
                _ => return Err(invalid(path, &format!("the line \"{line}\" is not known"))),
            }
        }
        if config.etcd.is_empty() || config.etcd.iter().any(|url| !url.starts_with("http://")) {
            return Err(invalid(path, "etcd has no URL that starts with http://"));
        }
        Ok(config)
    }
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

fn invalid(path: &Path, why: &str) -> Error {
    Error::new(
        Errno::INVAL,
        format!("{}: {why}", path.display()),
        "use the lines: etcd = http://HOST:2379 and host = NAME",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("/a"))
    }

    #[test]
    fn a_configuration_is_parsed_or_refused() {
        let config = parse("# a\n\netcd = http://a:1 http://b:2\nhost=x\n").unwrap();
        assert_eq!(config.etcd, ["http://a:1", "http://b:2"]);
        assert_eq!(config.host, "x");
        assert!(!parse("etcd = http://a:1").unwrap().host.is_empty());
        for text in ["", "etcd =", "etcd = a:1", "port = 1", "etcd"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
