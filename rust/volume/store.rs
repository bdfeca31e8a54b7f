// SPDX-License-Identifier: GPL-2.0-only

//! Keys and values with transactions and leases.

use engine::Result;
use std::time::Duration;

/// A key with its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
    /// The number of the last change of this key.
    pub revision: i64,
}

/// A lease, with which the keys end that were written under it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lease(pub i64);

/// A condition of a transaction.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Condition {
    /// There is no such key.
    Absent(String),
    /// There is such a key.
    Present(String),
    /// The key has not changed since this revision.
    Unchanged(String, i64),
    /// No key starts with this text.
    NoneWith(String),
}

/// A change of a transaction.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// Writes a value, under a lease if there is one.
    Put(String, String, Option<Lease>),
    /// Removes a key.
    Delete(String),
}

/// The result of a transaction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Commit {
    /// All conditions were true, and all changes were made once. The number is the revision of the
    /// keys that were written.
    Done(i64),
    /// A condition was not true, and nothing has changed.
    Conflict,
}

/// A store that all hosts share.
///
/// An error of [`Self::commit`] leaves open whether the changes were made.
pub trait Store: Send + Sync {
    /// Returns all keys that start with `prefix`, in order, as they were at one moment.
    fn list(&self, prefix: &str) -> Result<Vec<Entry>>;

    /// Makes all changes at once if all conditions are true.
    fn commit(&self, conditions: &[Condition], changes: &[Change]) -> Result<Commit>;

    /// Creates a lease that ends after `time`, unless it is kept alive.
    fn grant(&self, time: Duration) -> Result<Lease>;

    /// Starts the time of a lease again. Returns `false` if it has ended.
    fn keep_alive(&self, lease: Lease) -> Result<bool>;

    /// Ends a lease. One that has ended is no error.
    fn revoke(&self, lease: Lease) -> Result<()>;

    /// Returns one key.
    fn get(&self, key: &str) -> Result<Option<Entry>> {
        let mut entries = self.list(key)?;
        entries.retain(|entry| entry.key == key);
        Ok(entries.pop())
    }
}
