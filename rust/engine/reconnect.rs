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

/// The server that is connected to.
pub(crate) struct Target {
    /// Its name in messages.
    pub(crate) name: String,
    /// The remedy if it cannot be reached.
    pub(crate) remedy: &'static str,
    /// Time after which no attempt is made, except the second: the first one may take longer.
    pub(crate) timeout: Duration,
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
}
