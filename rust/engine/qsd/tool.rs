// SPDX-License-Identifier: GPL-2.0-only

//! Commands that run QEMU's programs.
//!
//! They parse what a guest, or the maker of an image, has written. So a process with privileges
//! starts them through a launcher, which gives them access to the files that they need and to
//! nothing else: see [`Options::launcher`].

use crate::options::Options;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The files and directories that a program uses.
#[derive(Debug, Default)]
pub(super) struct Files {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Files {
    /// Returns the files of an image: it is written unless `read_only`, and the `backing` files
    /// are read.
    pub(super) fn of_image(path: &Path, read_only: bool, backing: &[PathBuf]) -> Self {
        let mut files = Self {
            read: backing.to_vec(),
            write: Vec::new(),
        };
        let image = if read_only {
            &mut files.read
        } else {
            &mut files.write
        };
        image.push(path.to_owned());
        files
    }

    /// Adds a file that is read.
    pub(super) fn reading(mut self, path: &Path) -> Self {
        self.read.push(path.to_owned());
        self
    }

    /// Adds a directory in which files are created.
    pub(super) fn writing(mut self, path: &Path) -> Self {
        self.write.push(path.to_owned());
        self
    }
}

/// Returns a command that runs a program, which may use `files`.
pub(super) fn command(program: &str, options: &Options, files: &Files) -> Command {
    let Some((launcher, arguments)) = options.launcher.split_first() else {
        return Command::new(program);
    };
    let mut command = Command::new(launcher);
    command.args(arguments);
    for (option, paths) in [("--read", &files.read), ("--write", &files.write)] {
        for path in paths {
            command.arg(option).arg(path);
        }
    }
    command.arg("--").arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_gets_the_files_and_the_program() {
        let files = Files::of_image(Path::new("/image"), false, &["/base".into()])
            .reading(Path::new("/key"))
            .writing(Path::new("/run"));
        let plain = command("qemu-img", &Options::default(), &files);
        assert_eq!(plain.get_program(), "qemu-img");
        assert_eq!(plain.get_args().count(), 0);
        let options = Options {
            launcher: vec!["launcher".into(), "--user".into(), "7".into()],
            ..Options::default()
        };
        let launched = command("qemu-img", &options, &files);
        assert_eq!(launched.get_program(), "launcher");
        let arguments: Vec<_> = launched
            .get_args()
            .map(|arg| arg.to_str().unwrap())
            .collect();
        let expected = "--user 7 --read /base --read /key --write /image --write /run -- qemu-img";
        assert_eq!(arguments.join(" "), expected);
    }
}
