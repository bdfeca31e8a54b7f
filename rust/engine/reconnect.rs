// SPDX-License-Identifier: GPL-2.0-only

//! Connecting again to the server of an image, in a thread.

use crate::error::{Error, Result};
use crate::event::Event;
use rustix::io::Errno;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, TryRecvError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Delays before the first and the later attempts to connect again.
const BACKOFF: Range<Duration> = Duration::from_millis(50)..Duration::from_secs(2);

/// Time for which a caller waits that has other things to do.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The server that is connected to.
pub(crate) struct Target {
    /// Its name in messages.
    pub(crate) name: String,
    /// The remedy if it cannot be reached.
    pub(crate) remedy: &'static str,
    /// No attempt begins after this time, except the second one, because the first may take longer
    /// than that.
    pub(crate) timeout: Duration,
    /// The number of connections that were lost, one after the other, without a reply: the first
    /// attempt has the delay of one after this number of failures.
    pub(crate) losses: u32,
}

/// A thread that connects, until it succeeds, its time is over or this is dropped.
pub(crate) struct Connecting<T> {
    result: Receiver<Result<T>>,
    stop: Arc<AtomicBool>,
}

impl<T: Send + 'static> Connecting<T> {
    /// Starts the thread, which calls `connect` for each attempt, and sets `event` at its end.
    ///
    /// The error `ENOTRECOVERABLE` ends the attempts.
    pub(crate) fn start(
        target: Target,
        event: &Arc<Event>,
        connect: impl FnMut() -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        let (sender, result) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let connecting = Self {
            result,
            stop: stop.clone(),
        };
        let event = event.clone();
        let thread = thread::Builder::new().name("connect".to_owned());
        let started = thread.spawn(move || {
            // If the queue is gone, nothing waits for the result.
            let _ = sender.send(connect_until(&target, &stop, connect));
            event.set();
        });
        started.map(|_| connecting).map_err(|_| thread_error())
    }

    /// Returns the result once there is one.
    pub(crate) fn result(&self) -> Option<Result<T>> {
        match self.result.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(thread_error())),
        }
    }
}

impl<T> Drop for Connecting<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn connect_until<T>(
    target: &Target,
    stop: &AtomicBool,
    mut connect: impl FnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + target.timeout;
    thread::sleep(delay_after(target.losses));
    let mut backoff = BACKOFF.start;
    let mut is_first = true;
    loop {
        let error = match connect() {
            Ok(connection) => return Ok(connection),
            Err(error) if error.errno() == Errno::NOTRECOVERABLE => return Err(error),
            Err(error) => error,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() && !is_first || stop.load(Ordering::Relaxed) {
            let Target { name, timeout, .. } = target;
            return Err(Error::new(
                Errno::NOTCONN,
                format!(
                    "{name} cannot be reached for {timeout:?}: {}",
                    error.cause()
                ),
                target.remedy,
            ));
        }
        is_first = false;
        thread::sleep(backoff.min(left));
        backoff = backoff.saturating_mul(2).min(BACKOFF.end);
    }
}

/// Returns the delay after a number of failures.
fn delay_after(failures: u32) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else {
        return Duration::ZERO;
    };
    let factor = 1u32.checked_shl(doublings).unwrap_or(u32::MAX);
    BACKOFF.start.saturating_mul(factor).min(BACKOFF.end)
}

/// Calls a function that connects in a thread, and waits for a limited time for its result, for a
/// caller that has other things to do.
pub(crate) fn connect_in_time<T: Send + 'static>(
    connect: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, result) = channel();
    let thread = thread::Builder::new().name("connect".to_owned());
    // If it takes longer, nothing waits for the result.
    let started = thread.spawn(move || drop(sender.send(connect())));
    started.map_err(|_| thread_error())?;
    result.recv_timeout(CONNECT_TIMEOUT).unwrap_or_else(|_| {
        Err(Error::new(
            Errno::AGAIN,
            format!("the server of the image does not answer in {CONNECT_TIMEOUT:?}"),
            "check it, and try again",
        ))
    })
}

fn thread_error() -> Error {
    Error::new(
        Errno::AGAIN,
        "there is no thread to connect to the server of the image",
        "raise the limit of threads",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_second_attempt_after_a_long_one() {
        let target = Target {
            name: "the server".to_owned(),
            remedy: "none",
            timeout: Duration::ZERO,
            losses: 0,
        };
        let mut attempts = 0;
        let result = connect_until(&target, &AtomicBool::new(false), || {
            attempts += 1;
            match attempts {
                1 => Err(thread_error()),
                _ => Ok(attempts),
            }
        });
        assert_eq!(result.unwrap(), 2);
        let result = connect_until(&target, &AtomicBool::new(false), || {
            attempts += 1;
            Err::<(), _>(thread_error())
        });
        assert_eq!(result.unwrap_err().errno(), Errno::NOTCONN);
        assert_eq!(attempts, 4);
    }

    #[test]
    fn delays_grow_up_to_a_limit() {
        let delays: Vec<_> = (0..100).map(delay_after).collect();
        assert_eq!(delays[..2], [Duration::ZERO, BACKOFF.start]);
        assert!(delays.is_sorted());
        assert_eq!(delay_after(u32::MAX), BACKOFF.end);
    }

    #[test]
    fn a_result_in_time_is_passed_on() {
        assert_eq!(connect_in_time(|| Ok(7)).unwrap(), 7);
        let error = connect_in_time(|| Err::<(), _>(thread_error())).unwrap_err();
        assert_eq!(error.cause(), thread_error().cause());
    }
}
