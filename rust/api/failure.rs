// SPDX-License-Identifier: GPL-2.0-only

//! Errors on the wire.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The kind of a failure, which decides the exit status of `rblk`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum FailureKind {
    /// The call is not valid.
    InvalidCall,
    /// There is no such disk.
    NoSuchDisk,
    /// The process does not run, or it does not answer in time.
    NoAnswer,
    /// The disk cannot do this now, or its engine cannot do it at all.
    Refused,
    /// Something failed.
    Failed,
}

/// Why a call failed, and the administrator's remedy.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// The kind of the failure.
    #[serde(rename = "error")]
    pub kind: FailureKind,
    /// Cause and remedy.
    #[serde(rename = "parameters")]
    pub text: FailureText,
}

/// The text of a failure, without a capital at the start and a full stop at the end.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct FailureText {
    /// The cause: the operation that failed, and why.
    pub cause: String,
    /// The remedy for the administrator.
    pub remedy: String,
}

impl Failure {
    /// Creates a failure from its cause and its remedy.
    pub fn new(kind: FailureKind, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            kind,
            text: FailureText {
                cause: cause.into(),
                remedy: remedy.into(),
            },
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.text.cause, self.text.remedy)
    }
}

impl std::error::Error for Failure {}
