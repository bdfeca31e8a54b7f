// SPDX-License-Identifier: GPL-2.0-only

//! Errors of engines: an errno for the guest and a text for the administrator.

use io_buffer::AccessError;
use rustix::io::Errno;
use std::borrow::Cow;
use std::fmt;

/// The result of an operation of an engine.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its errno, its cause and its remedy.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Error {
    errno: Errno,
    cause: Cow<'static, str>,
    remedy: Cow<'static, str>,
}

impl Error {
    /// Creates an error.
    ///
    /// `cause` says what failed and why, `remedy` what the administrator can do, both without a
    /// capital at the start and a full stop at the end.
    pub fn new(
        errno: Errno,
        cause: impl Into<Cow<'static, str>>,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            errno,
            cause: cause.into(),
            remedy: remedy.into(),
        }
    }

    /// Creates an error from an error of the standard library; `doing` says what failed.
    pub(crate) fn from_io(
        error: &std::io::Error,
        doing: impl fmt::Display,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
        Self::new(errno, format!("{doing}: {error}"), remedy)
    }

    /// Returns the error number.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// Returns what failed and why.
    pub fn cause(&self) -> &str {
        &self.cause
    }

    /// Returns what the administrator can do.
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.cause, self.remedy)
    }
}

impl std::error::Error for Error {}

impl From<AccessError> for Error {
    fn from(error: AccessError) -> Self {
        Self::new(
            Errno::FAULT,
            error.to_string(),
            "this is an error of the program, report it",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_cause_and_remedy() {
        let error = Error::new(Errno::NOSPC, "writing /a: no space", "free some space");
        assert_eq!(error.errno(), Errno::NOSPC);
        assert_eq!(error.to_string(), "writing /a: no space; free some space");
    }
}
