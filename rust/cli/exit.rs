// SPDX-License-Identifier: GPL-2.0-only

//! Exit statuses.

use api::{Failure, FailureKind};
use serde::Serialize;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// The exit statuses, as help and man pages show them.
pub const HELP: &str = "\
Exit status:
  0  done
  1  failed
  2  the command line is not valid
  3  there is no such disk
  4  rblkd or the disk's process does not answer
  5  the disk cannot do this now, or its engine cannot do it
  6  rblk check has found a setting that causes trouble";

/// Why a command ends without success.
#[derive(Debug)]
pub enum Error {
    /// The command line is not valid, or it asks for help.
    Usage(clap::Error),
    /// The command failed.
    Failure(Failure),
    /// `rblk check` has printed what it has found.
    Findings,
}

impl Error {
    /// Prints the error and returns the exit status.
    pub fn report(&self) -> ExitCode {
        match self {
            Self::Usage(error) => {
                // Nothing is left to do if the terminal is gone.
                let _ = error.print();
                ExitCode::from(if error.use_stderr() { 2 } else { 0 })
            }
            Self::Failure(failure) => {
                eprintln!("error: {failure}");
                ExitCode::from(status(failure.kind))
            }
            Self::Findings => ExitCode::from(6),
        }
    }
}

/// Returns the exit status of a failure, see [`HELP`].
fn status(kind: FailureKind) -> u8 {
    match kind {
        FailureKind::Failed => 1,
        FailureKind::InvalidCall => 2,
        FailureKind::NoSuchDisk => 3,
        FailureKind::NoAnswer => 4,
        FailureKind::Refused => 5,
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// Prints text. `print!` ends the process with a signal if that fails.
///
/// If no one reads the text any more, as in `rblk events | head`, the process ends with success.
pub fn print(text: &str) -> Result<(), Error> {
    let mut output = io::stdout();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(io_failure("the standard output", &error).into()),
        Ok(()) => Ok(()),
    }
}

/// Prints a value as a line of JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string(value).map_err(|error| {
        Failure::new(FailureKind::Failed, format!("JSON: {error}"), "report this")
    })?;
    print(&format!("{text}\n"))?;
    Ok(())
}

/// Returns a failure for an I/O error of `what`.
pub fn io_failure(what: impl fmt::Display, error: &io::Error) -> Failure {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => "run this as root",
        io::ErrorKind::NotFound => "check that it exists",
        _ => "check the file system and the permissions",
    };
    Failure::new(FailureKind::Failed, format!("{what}: {error}"), remedy)
}
