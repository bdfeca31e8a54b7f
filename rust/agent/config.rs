// SPDX-License-Identifier: GPL-2.0-only

//! The configuration file, by default `/etc/rblk/rblkd.conf`.
//!
//! ```text
//! # Members of this group may look at disks and storage.
//! group = rblk
//! # A storage domain is checked by reading an image that is on it.
//! storage san = raw:/srv/san/check
//! # A guest is paused when a request has waited for its storage for 30 seconds.
//! pause-after = 30
//! ```

use std::fs;
use std::io;
use std::path::Path;

/// The path unless another one is given.
pub const DEFAULT: &str = "/etc/rblk/rblkd.conf";

/// The configuration.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Config {
    /// The group whose members may make calls that change nothing.
    pub group: Option<String>,
    /// The names of the storage domains, and the image of each that is read.
    pub storages: Vec<(String, String)>,
    /// The age of a request, in seconds, at which its guest is paused.
    pub pause_after: Option<u32>,
}

impl Config {
    /// Reads a file. One that does not exist is empty.
    ///
    /// The error names the line and the remedy.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        Self::parse(&text).map_err(|(line, error)| format!("{}:{line}: {error}", path.display()))
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut config = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            config.set(line).map_err(|error| (number, error))?;
        }
        Ok(config)
    }

    fn set(&mut self, line: &str) -> Result<(), String> {
        let (key, value) = line
            .split_once('=')
            .ok_or("there is no \"=\"; write KEY = VALUE")?;
        let (key, value) = (key.trim(), value.trim());
        if value.is_empty() {
            return Err(format!("{key} has no value; write one, or remove the line"));
        }
        match key.split_once(' ').map(|(key, name)| (key, name.trim())) {
            None if key == "group" => self.group = Some(value.to_owned()),
            None if key == "pause-after" => self.pause_after = Some(seconds(key, value)?),
            Some(("storage", name)) if self.storages.iter().any(|(other, _)| other == name) => {
                return Err(format!("there are two storage domains {name}; rename one"));
            }
            Some(("storage", name)) => self.storages.push((name.to_owned(), value.to_owned())),
            _ => {
                return Err(format!(
                    "{key} is not known; the keys are group, pause-after, and storage NAME"
                ))
            }
        }
        Ok(())
    }
}

/// Returns a time in seconds: an hour at most.
fn seconds(key: &str, value: &str) -> Result<u32, String> {
    let number = value
        .parse()
        .ok()
        .filter(|number| (1..=3600).contains(number));
    number.ok_or_else(|| format!("{key} is {value}; write a number of seconds from 1 to 3600"))
}

/// Returns the number of a group in the text of `/etc/group`.
pub fn group_number(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next() == Some(name);
        let number = fields.nth(1)?;
        found.then(|| number.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read() {
        let text = "# comment\n\ngroup = rblk\npause-after = 30\nstorage san = raw:/srv/san/check\n storage nfs=/n\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.group.as_deref(), Some("rblk"));
        assert_eq!(config.pause_after, Some(30));
        let storages = [("san", "raw:/srv/san/check"), ("nfs", "/n")];
        assert_eq!(
            config.storages,
            storages.map(|(name, image)| (name.to_owned(), image.to_owned()))
        );
        assert_eq!(
            Config::read(Path::new("/nonexistent")),
            Ok(Config::default())
        );
    }

    #[test]
    fn an_error_names_the_line_and_the_remedy() {
        for (text, line, error) in [
            ("group", 1, "no \"=\"; write KEY = VALUE"),
            ("\ngroup =", 2, "no value"),
            ("gruop = x", 1, "gruop is not known; the keys are"),
            ("storage a = /a\nstorage a = /b", 2, "two storage domains a"),
            ("pause-after = 0", 1, "a number of seconds from 1 to 3600"),
            ("pause-after = 1 h", 1, "a number of seconds from 1 to 3600"),
        ] {
            let (found, message) = Config::parse(text).unwrap_err();
            assert_eq!(found, line, "{text}");
            assert!(message.contains(error), "{message}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rblkd.conf");
        fs::write(&path, "x\n").unwrap();
        let error = Config::read(&path).unwrap_err();
        assert!(error.contains("rblkd.conf:1: there is no"), "{error}");
        assert!(Config::read(dir.path()).is_err());
    }

    #[test]
    fn groups_have_numbers() {
        let text = "root:x:0:\nrblk:x:997:alice\nbroken\nother:x:y:\n";
        assert_eq!(group_number(text, "rblk"), Some(997));
        for name in ["broken", "other", "x"] {
            assert_eq!(group_number(text, name), None, "{name}");
        }
    }
}
