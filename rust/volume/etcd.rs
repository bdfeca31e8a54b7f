// SPDX-License-Identifier: GPL-2.0-only

//! etcd, by the JSON gateway of its version 3 protocol.
//!
//! A call that gets no answer is sent again, to the next member, for up to [`RETRY`]. The attempt
//! without an answer may have been applied, or may be applied at any later time. So each
//! transaction has a key of its own, which all of its attempts write unless it is there. The first
//! attempt that is applied decides, and the others find its result.

use crate::random::random_uuid;
use crate::store::{Change, Commit, Condition, Entry, Lease, Store};
use base64::prelude::{Engine as _, BASE64_STANDARD};
use engine::{Errno, Error, Result};
use serde_json::{json, Value};
use std::io::{self, BufRead, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Time for which a call is sent again. A new leader is elected within 3 seconds.
pub const RETRY: Duration = Duration::from_secs(5);

/// Limit of one attempt in seconds.
const ATTEMPT: u64 = 2;

/// Time between two attempts.
const INTERVAL: Duration = Duration::from_millis(200);

/// Time after which the key of a transaction ends.
const TOKEN_TIME: Duration = Duration::from_secs(60);

/// The start of the keys of transactions.
const TOKENS: &str = "/rblk/1/commit/";

/// The value of the key of a transaction whose conditions were not true.
const CONFLICT: &str = "conflict";

/// gRPC's numbers of errors after which a call is sent again: deadline exceeded and unavailable.
const PASSING: [i64; 2] = [4, 14];

/// gRPC's number of the error that there is no such lease.
const NOT_FOUND: i64 = 5;

/// A client of etcd.
pub struct Etcd {
    urls: Vec<String>,
    /// The member that has answered last.
    current: AtomicUsize,
}

/// Why one attempt has failed.
enum Failure {
    /// There was no answer, or one that says to try again.
    NoAnswer(String),
    /// The call is refused, with one of gRPC's numbers of errors.
    Refused(i64, String),
}

impl Etcd {
    /// Creates a client. The first call connects.
    pub fn new(urls: Vec<String>) -> Self {
        Self {
            urls,
            current: AtomicUsize::new(0),
        }
    }

    fn call(&self, method: &str, body: &Value) -> Result<Value> {
        self.call_unless(None, method, body)
    }

    /// Calls a method. Returns [`Value::Null`] if it is refused with the number `expected`.
    fn call_unless(&self, expected: Option<i64>, method: &str, body: &Value) -> Result<Value> {
        let deadline = Instant::now() + RETRY;
        loop {
            match attempt(self.url(), method, body) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Refused(code, _)) if Some(code) == expected => return Ok(Value::Null),
                Err(Failure::Refused(_, cause)) => return Err(refused(&cause)),
                Err(Failure::NoAnswer(cause)) if Instant::now() > deadline => {
                    return Err(self.no_answer(&cause));
                }
                Err(Failure::NoAnswer(_)) => self.take_next_member(),
            }
        }
    }

    /// Returns the URL of the member that is called.
    fn url(&self) -> &str {
        let current = self.current.load(Ordering::Relaxed);
        let index = current.checked_rem(self.urls.len()).unwrap_or(0);
        self.urls.get(index).map_or("", String::as_str)
    }

    fn take_next_member(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
        thread::sleep(INTERVAL);
    }

    /// Returns the revision of the store.
    pub fn revision(&self) -> Result<i64> {
        let body = json!({"key": encoded(TOKENS), "count_only": true});
        let answer = self.call("kv/range", &body)?;
        let revision = number(answer.pointer("/header/revision"));
        revision.ok_or_else(|| malformed("kv/range"))
    }

    /// Waits until a key that starts with `prefix` is changed after a revision, for up to `time`.
    ///
    /// May return earlier, for example if a member ends.
    pub fn wait_for_change(&self, prefix: &str, revision: i64, time: Duration) {
        let next = revision.saturating_add(1).to_string();
        let watch = json!({"create_request": {
            "key": encoded(prefix), "range_end": range_end(prefix), "start_revision": next,
        }});
        let response = request(self.url(), "watch", &watch)
            .with_timeout(time.as_secs().max(1))
            .send_lazy();
        let Ok(response) = response else {
            return self.take_next_member();
        };
        // The first line says that the watch was created; any other one is a change.
        let mut lines = BufReader::new(response).lines().map_while(io::Result::ok);
        if lines.nth(1).is_none() {
            self.take_next_member();
        }
    }

    fn no_answer(&self, cause: &str) -> Error {
        Error::new(
            Errno::TIMEDOUT,
            format!("etcd at {} does not answer: {cause}", self.urls.join(" ")),
            "check that a majority of its members run: etcdctl endpoint status; disks that are \
             attached are not affected",
        )
    }
}

fn request(url: &str, method: &str, body: &Value) -> minreq::Request {
    minreq::post(format!("{url}/v3/{method}"))
        .with_header("Content-Type", "application/json")
        .with_body(body.to_string())
}

fn attempt(url: &str, method: &str, body: &Value) -> std::result::Result<Value, Failure> {
    let response = request(url, method, body)
        .with_timeout(ATTEMPT)
        .send()
        .map_err(|error| Failure::NoAnswer(error.to_string()))?;
    let text = response.as_str().unwrap_or_default();
    // A stream answers with one object a line.
    let line = text.lines().next().unwrap_or_default();
    let answer: Value =
        serde_json::from_str(line).map_err(|error| Failure::NoAnswer(error.to_string()))?;
    if response.status_code == 200 && answer.get("error").is_none() {
        return Ok(answer);
    }
    let message = answer.get("message").or(answer.get("error"));
    let message = message.and_then(Value::as_str).unwrap_or(line).to_owned();
    match answer.get("code").and_then(Value::as_i64) {
        Some(code) if !PASSING.contains(&code) => Err(Failure::Refused(code, message)),
        _ => Err(Failure::NoAnswer(message)),
    }
}

fn refused(cause: &str) -> Error {
    Error::new(
        Errno::IO,
        format!("etcd refuses a call: {cause}"),
        "check that it is version 3.4 or later, without authentication",
    )
}

fn malformed(method: &str) -> Error {
    refused(&format!("the answer of {method} has no result"))
}

fn encoded(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

fn decoded(value: Option<&Value>) -> String {
    let bytes = value
        .and_then(Value::as_str)
        .and_then(|text| BASE64_STANDARD.decode(text).ok());
    String::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
}

/// Returns a number, which the gateway writes as a text.
fn number(value: Option<&Value>) -> Option<i64> {
    value?.as_str()?.parse().ok()
}

/// Returns the end of the range of keys that start with `prefix`.
fn range_end(prefix: &str) -> String {
    let mut bytes = prefix.as_bytes().to_vec();
    if let Some(last) = bytes.last_mut() {
        // Keys are ASCII.
        *last = last.saturating_add(1);
    }
    BASE64_STANDARD.encode(bytes)
}

fn condition(condition: &Condition) -> Value {
    match condition {
        Condition::Absent(key) => {
            json!({"key": encoded(key), "target": "VERSION", "result": "EQUAL", "version": "0"})
        }
        Condition::Present(key) => {
            json!({"key": encoded(key), "target": "VERSION", "result": "GREATER", "version": "0"})
        }
        Condition::Unchanged(key, revision) => json!({
            "key": encoded(key), "target": "MOD", "result": "EQUAL",
            "mod_revision": revision.to_string(),
        }),
        Condition::NoneWith(prefix) => json!({
            "key": encoded(prefix), "range_end": range_end(prefix),
            "target": "VERSION", "result": "EQUAL", "version": "0",
        }),
    }
}

fn change(change: &Change) -> Value {
    match change {
        Change::Put(key, value, lease) => json!({"request_put": {
            "key": encoded(key), "value": encoded(value),
            "lease": lease.map_or(0, |lease| lease.0).to_string(),
        }}),
        Change::Delete(key) => json!({"request_delete_range": {"key": encoded(key)}}),
    }
}

/// Returns the result of a transaction from the answer to an attempt; [`None`] if there is none.
fn commit_result(answer: &Value) -> Option<Commit> {
    if answer.get("succeeded").and_then(Value::as_bool) == Some(true) {
        return number(answer.pointer("/header/revision")).map(Commit::Done);
    }
    // An earlier attempt has decided if the key is there.
    let token = "/responses/0/response_txn/responses/0/response_range/kvs/0";
    match answer.pointer(token) {
        Some(token) if decoded(token.get("value")) != CONFLICT => {
            number(token.get("mod_revision")).map(Commit::Done)
        }
        _ => Some(Commit::Conflict),
    }
}

impl Store for Etcd {
    fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        let body = json!({"key": encoded(prefix), "range_end": range_end(prefix)});
        let answer = self.call("kv/range", &body)?;
        let entries = answer.get("kvs").and_then(Value::as_array);
        let entry = |value: &Value| Entry {
            key: decoded(value.get("key")),
            value: decoded(value.get("value")),
            revision: number(value.get("mod_revision")).unwrap_or(0),
        };
        Ok(entries.map_or_else(Vec::new, |entries| entries.iter().map(entry).collect()))
    }

    fn commit(&self, conditions: &[Condition], changes: &[Change]) -> Result<Commit> {
        let lease = self.grant(TOKEN_TIME)?;
        let token = format!("{TOKENS}{}", random_uuid()?);
        let put_token =
            |value: &str| change(&Change::Put(token.clone(), value.to_owned(), Some(lease)));
        let is_first = condition(&Condition::Absent(token.clone()));
        let mut compare: Vec<Value> = conditions.iter().map(condition).collect();
        compare.push(is_first.clone());
        let mut success: Vec<Value> = changes.iter().map(change).collect();
        success.push(put_token(""));
        let failure = json!({
            "compare": [is_first],
            "success": [put_token(CONFLICT)],
            "failure": [{"request_range": {"key": encoded(&token)}}],
        });
        let failure = json!([{"request_txn": failure}]);
        let body = json!({"compare": compare, "success": success, "failure": failure});
        let answer = self.call("kv/txn", &body)?;
        commit_result(&answer).ok_or_else(|| malformed("kv/txn"))
    }

    fn grant(&self, time: Duration) -> Result<Lease> {
        let seconds = time.as_secs().max(1).to_string();
        let answer = self.call("lease/grant", &json!({"TTL": seconds}))?;
        let id = number(answer.get("ID"));
        id.map(Lease).ok_or_else(|| malformed("lease/grant"))
    }

    fn keep_alive(&self, lease: Lease) -> Result<bool> {
        let answer = self.call("lease/keepalive", &json!({"ID": lease.0.to_string()}))?;
        let result = answer
            .get("result")
            .ok_or_else(|| malformed("lease/keepalive"))?;
        Ok(number(result.get("TTL")).unwrap_or(0) > 0)
    }

    fn revoke(&self, lease: Lease) -> Result<()> {
        // It may have ended by itself, or by an earlier attempt.
        let body = json!({"ID": lease.0.to_string()});
        self.call_unless(Some(NOT_FOUND), "lease/revoke", &body)?;
        Ok(())
    }
}
